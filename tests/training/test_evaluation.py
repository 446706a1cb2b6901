"""What a run measures of itself against generation and a plain loss in float64."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minimax_m1 import shipped
from minimax_m1.batch import ForwardBatch
from minimax_m1.generation import generate_batch
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams
from minimax_m1.tasks import NANO_TASKS
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.data import make_sample, pack, prompt_ids
from minimax_m1.training.evaluation import Evaluation, solved
from minimax_m1.training.parallel import World
from minimax_m1.training.settings import TrainSettings
from tests.tolerances import LOGITS

ONE_PROCESS = World(0, 1, torch.device("cpu"), None, 0, 1, 0, 1, None)
DOCUMENTS = [f"Pear {i} and plum {i * i} are in basket {i % 7}." for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> MiniMaxM1Tokenizer:
    return MiniMaxM1Tokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> MiniMaxM1ForCausalLM:
    return MiniMaxM1ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


def run_settings(folder: Path, **changes: Any) -> TrainSettings:
    values = dict(
        output=str(folder), mixture={"addition": 1.0, "sorting": 2.0, "remainder": 0.0}, eval_problems=3, window=[300],
        tokens_per_batch=300, eval_tokens=800, sample_tokens=6,
    )  # fmt: skip
    return TrainSettings.from_dict({**values, **changes})


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    file = tmp_path / "fruit.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return run_settings(tmp_path, eval_data=[str(file)], sample_prompts=["How many plums?", "Größe?"])


def test_solved_are_those_that_greedy_generation_writes() -> None:
    """The shipped model; every other problem has a worked solution of another one, which it would not write."""
    model = MiniMaxM1ForCausalLM.from_pretrained(shipped.path(), dtype=torch.float32).eval()
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(shipped.path())
    rng = random.Random(0)
    problems = [NANO_TASKS[family].sample(rng, "test") for family in ("addition", "sorting") for _ in range(6)]
    problems[::3] = [replace(problem, thinking=problems[1].thinking) for problem in problems[::3]]
    samples = [make_sample(tokenizer, problem) for problem in problems]
    responses = [[token for token, learned in zip(s.ids, s.learned, strict=True) if learned] for s in samples]
    params = SamplingParams(temperature=0.0, max_new_tokens=max(map(len, responses)))
    written = generate_batch(model, [prompt_ids(tokenizer, p.prompt) for p in problems], params, tokenizer=tokenizer)
    # generation may leave out the end of sentence that stopped it
    end = tokenizer.eos_token_id
    right = [ids == response or [*ids, end] == response for ids, response in zip(written, responses, strict=True)]
    assert 0 < sum(right) < len(right)
    assert solved(model, pack(samples)) == sum(right) / len(right)
    for sample, is_right in zip(samples, right, strict=True):
        assert solved(model, pack([sample])) == is_right


def test_problems_are_those_of_the_mixture_and_unseen(settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer) -> None:
    evaluation = Evaluation(settings, tokenizer, ONE_PROCESS)
    assert list(evaluation.problems) == ["addition", "sorting"]
    for family, batch in evaluation.problems.items():
        rng = random.Random(f"evaluation:0:{family}")
        unseen = [make_sample(tokenizer, NANO_TASKS[family].sample(rng, "test")) for _ in range(3)]
        assert batch.input_ids.tolist() == [token for sample in unseen for token in sample.ids]


@torch.no_grad()
def test_the_loss_of_a_file_is_that_of_its_documents_one_by_one(
    settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer, model: MiniMaxM1ForCausalLM
) -> None:
    evaluation = Evaluation(settings, tokenizer, ONE_PROCESS)
    [(name, batches)] = evaluation.files.items()
    assert name == str(settings.eval_data[0]) and len(batches) == 800 // 300
    documents = [ids.tolist() for batch in batches for ids in batch.input_ids.split(batch.layout.seqlens)]
    known = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in DOCUMENTS]
    assert all(ids in known for ids in documents) and len(documents) > 10
    total, exact = 0.0, copy.deepcopy(model).double()
    for ids in documents:
        layout = ForwardBatch.packed([len(ids)], backend="reference")
        hidden, _ = exact.forward_packed(torch.tensor(ids), layout)
        logits = hidden.double() @ exact.lm_head.weight.T
        total += F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
    expected = total / sum(len(ids) - 1 for ids in documents)
    assert evaluation.run(model, 1)["eval_loss"] == {name: pytest.approx(expected, rel=LOGITS)}


def test_an_answer_to_each_prompt_is_a_line(
    settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer, model: MiniMaxM1ForCausalLM
) -> None:
    evaluation = Evaluation(settings, tokenizer, ONE_PROCESS)
    evaluation.run(model, 5)
    evaluation.run(model, 10)
    lines = [json.loads(line) for line in (settings.output / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (5, 10) for prompt in settings.sample_prompts
    ]
    prompts = [prompt_ids(tokenizer, prompt) for prompt in settings.sample_prompts]
    answers = generate_batch(model, prompts, SamplingParams(temperature=0.0, max_new_tokens=6), tokenizer=tokenizer)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    assert all(texts) and [line["text"] for line in lines] == texts * 2


def test_the_same_is_measured_every_time_and_nothing_is_left_behind(
    settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer, model: MiniMaxM1ForCausalLM
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluation = Evaluation(settings, tokenizer, ONE_PROCESS)
    first = evaluation.run(model, 1)
    torch.manual_seed(9)
    random.seed(9)
    assert first == evaluation.run(model, 2) == Evaluation(settings, tokenizer, ONE_PROCESS).run(model, 3)
    assert set(first) == {"solved", "eval_loss"} and set(first["solved"]) == {"addition", "sorting"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    other = Evaluation(replace(settings, seed=1), tokenizer, ONE_PROCESS)
    assert not torch.equal(other.problems["sorting"].input_ids, evaluation.problems["sorting"].input_ids)
    assert other.run(model, 4)["eval_loss"] == first["eval_loss"]  # files begin the same whatever the seed


def test_what_is_not_asked_for_is_not_there(
    tmp_path: Path, tokenizer: MiniMaxM1Tokenizer, model: MiniMaxM1ForCausalLM
) -> None:
    evaluation = Evaluation(run_settings(tmp_path), tokenizer, ONE_PROCESS)
    assert set(evaluation.run(model, 1)) == {"solved"}
    assert not (tmp_path / "samples.jsonl").exists()
