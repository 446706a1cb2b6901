"""What must not change a training run: micro-batches, packing, ranks, and being stopped and resumed."""

import json
import os

import pytest
import torch

from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.settings import to_toml
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training import trainer, vocabulary
from minimax_m1.training.checkpoint import list_steps
from minimax_m1.training.data import pack
from minimax_m1.training.optimizer import build_optimizers
from minimax_m1.training.parallel import init_world
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.stream import SampleStream
from minimax_m1.training.trainer import build_model, train, train_step
from minimax_m1.training.vocabulary import build_tokenizer
from tests.ranks import launch

TINY = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rotary_dim=8,
    attn_type_list=[1, 0],
    num_local_experts=4,
    max_position_embeddings=2048,
    router_aux_loss_coef=0.0,
)
# What a run on the same seed may differ in.
OF_THE_CLOCK = ("seconds", "tokens_per_second", "mfu")


@pytest.fixture(autouse=True, scope="module")
def small_and_single():
    """One thread, because resuming is exact for one number of threads; a small vocabulary and no report, for speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "VOCABULARY_RECORDS", 300)
        patch.setattr(trainer, "_write_report", lambda output: None)  # most of the time that so small a run takes
        yield
    torch.set_num_threads(threads)


def settings(folder, **changes):
    values = dict(
        output=str(folder), steps=6, tokens_per_batch=400, window=[400], vocab_size=320, log_every=1, save_every=3,
        eval_every=3, eval_problems=2, warmup_steps=2, decay_steps=2, model=TINY,
        mixture={"addition": 1.0, "reversing a word": 1.0},
    )  # fmt: skip
    return TrainSettings.from_dict({**values, **changes})


def read_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THE_CLOCK} for line in lines]


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def norms(folder):
    return [line["grad_norm"] for line in read_metrics(folder) if "loss" in line]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(settings(folder))


# -- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="AdamW", marks=pytest.mark.slow),
        pytest.param({"muon_lr": 0.01}, id="Muon", marks=pytest.mark.slow),
        pytest.param({"window": [100, 400], "stage_steps": [4], "aux_loss": [0.01, 0.0]}, id="in stages"),
    ],
)
def test_resume_is_exact(changes, tmp_path, monkeypatch):
    folder, stopped = tmp_path / "whole", tmp_path / "stopped"
    model = train(settings(folder, **changes))

    class KilledError(Exception):
        pass

    def kill_at_5(*arguments):
        if arguments[-1] == 4:  # two steps after the save, whose lines are to be written again
            raise KilledError
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", kill_at_5)
    with pytest.raises(KilledError):
        train(settings(stopped, **changes))
    assert len(losses(stopped)) == 4
    monkeypatch.undo()
    monkeypatch.setattr(vocabulary, "VOCABULARY_RECORDS", 300)
    resumed = train(settings(stopped, **changes))
    assert read_metrics(stopped) == read_metrics(folder)
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_exported_model_is_the_trained_one(whole_run):
    folder, model = whole_run
    exported = MiniMaxM1ForCausalLM.from_pretrained(folder / "model")
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(folder / "model")
    assert tokenizer.encode("Add 12") == build_tokenizer(settings(folder)).encode("Add 12")


def test_the_written_recipe_is_the_run(whole_run):
    from minimax_m1.settings import read_toml

    folder, _ = whole_run
    assert TrainSettings.from_dict(read_toml(folder / "recipe.toml")) == settings(folder)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(settings(tmp_path, save_every=1, keep=2, eval_every=0))
    assert list_steps(tmp_path / "checkpoints") == [5, 6]


def test_a_run_is_not_overwritten(whole_run):
    folder, _ = whole_run
    with pytest.raises(UserError, match=r"output: .* holds checkpoints of another run"):
        train(settings(folder, resume=False))


# -- divided in other ways --------------------------------------------------------------------------------------------


def run_steps(options, tokenizer, steps):
    """Take a step on each list of packed batches; return the results and the weights."""
    world = init_world(options)
    model = build_model(options, tokenizer, world).double()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    results = [train_step(model, optimizers, batches, world, options, i) for i, batches in enumerate(steps)]
    return results, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("parts", [[2, 9, 12], list(range(1, 13))], ids=["micro-batches", "one by one"])
def test_any_division_into_micro_batches_is_one_batch(tmp_path, coefficient, parts):
    options = settings(
        tmp_path, model={**TINY, "router_aux_loss_coef": coefficient}, lr=0.1, max_grad_norm=1e9, z_loss=1e-3
    )
    tokenizer = build_tokenizer(options)
    stream = SampleStream(options, tokenizer, 0, 400)
    samples = [sample for _ in range(6) for sample in stream.next_samples()][:12]
    assert len(samples) == 12
    divided = [pack(samples[a:b]) for a, b in zip([0, *parts], parts, strict=False)]
    one, one_weights = run_steps(options, tokenizer, [[pack(samples)]] * 3)
    options = settings(
        tmp_path, model={**TINY, "router_aux_loss_coef": coefficient}, lr=0.1, max_grad_norm=1e9, z_loss=1e-3,
        batches_per_step=len(parts),
    )  # fmt: skip
    many, many_weights = run_steps(options, tokenizer, [divided] * 3)
    # the balance loss is a product of means: that of parts is not that of the whole
    tolerance = 1e-9 if coefficient == 0 else 1e-2
    for a, b in zip(one, many, strict=True):
        for name in ("loss", "z_loss", "token_accuracy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=tolerance), name
    assert torch.allclose(one_weights, many_weights, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_the_same_recipe_is_the_same_run_on_any_ranks(tmp_path):
    """With AdamW and Muon: 1 process; 4 ranks; a checkpoint of 2 ranks continued on 1 and on 4."""
    options = dict(batches_per_step=4, muon_lr=0.005, lr=1e-3, save_every=3, eval_every=3, aux_loss=[0.01])
    one = tmp_path / "one"
    train(settings(one, **options))
    four = tmp_path / "four"
    start(four, 4, tmp_path, **options, expert_parallel=2, context_parallel=2)
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert norms(four) == pytest.approx(norms(one), rel=1e-4)

    half = tmp_path / "half"
    start(half, 2, tmp_path, **{**options, "steps": 3, "decay_steps": 0, "dp_shard": 2})
    for ranks in (1, 4):
        copy = tmp_path / f"from 2 to {ranks}"
        copy.mkdir()
        os.system(f"cp -r '{half}'/* '{copy}'")
        if ranks == 1:
            train(settings(copy, **options))
        else:
            start(copy, ranks, tmp_path, **options, dp_replicate=2, expert_parallel=2)
        assert losses(copy) == pytest.approx(losses(one), rel=1e-5), ranks


def start(folder, ranks, scratch, **changes):
    recipe = scratch / f"{folder.name}.toml"
    recipe.write_text(to_toml(settings(folder, **changes)))
    launch("tests.invariants.train_worker", ranks, str(recipe))


# -- stages, and what goes wrong --------------------------------------------------------------------------------------


def test_windows_grow_by_stages(tmp_path):
    model = train(settings(tmp_path, window=[60, 400], stage_steps=[3], stage_rope_theta=[1e4, 1e6], eval_every=0))
    lines = read_metrics(tmp_path)
    assert [line["window"] for line in lines if "window" in line] == [60, 60, 60, 400, 400, 400]
    assert {"step": 4, "event": "window 400"} in lines
    assert model.config.rope_theta == 1e6
    assert MiniMaxM1ForCausalLM.from_pretrained(tmp_path / "model").config.rope_theta == 1e6


def test_exploding_gradients_of_a_new_stage_stop_the_run(tmp_path):
    options = settings(tmp_path, steps=20, window=[60, 400], stage_steps=[8], max_grad_growth=1e-6, eval_every=0)
    with pytest.raises(UserError, match="max_grad_growth: 10 steps after the window grew from 60 to 400"):
        train(options)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, policy):
    options = settings(tmp_path, bad_steps=policy, eval_every=0)
    world, tokenizer = init_world(options), build_tokenizer(options)
    model = build_model(options, tokenizer, world)
    optimizers = build_optimizers(model, options)
    batch = SampleStream(options, tokenizer, 0, 400).next_batch()
    with torch.no_grad():
        model.model.layers[1].block_sparse_moe.experts.w2[0, 0, 0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    result = train_step(model, optimizers, [batch], world, options, 0)
    assert result["skipped"]
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(before, model.parameters(), strict=True)
    )
    progress = trainer.Progress(step=1)
    with trainer.RunLog(tmp_path, 6, resume_step=0, tensorboard=False) as log:
        if policy == "stop":
            with pytest.raises(UserError, match="step 1: loss nan, gradient norm nan: not finite, so not applied"):
                trainer.watch_gradients(progress, result, options, log)
        else:
            trainer.watch_gradients(progress, result, options, log)
            assert "not finite" in read_metrics(tmp_path)[-1]["event"]
            progress.skipped_in_a_row = 19
            with pytest.raises(UserError, match="as 20 steps in a row; a lower lr may help"):
                trainer.watch_gradients(progress, result, options, log)
            progress.skipped_in_a_row = 5
            trainer.watch_gradients(progress, {"grad_norm": 1.0}, options, log)
            assert progress.skipped_in_a_row == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", 0.0, "lr: 0.0 cannot be used"),
        ("steps", 0, "steps: 0 cannot be used"),
        ("mixture", {"poetry": 1.0}, "mixture: 'poetry' .*"),
        ("mixture", {"addition": "much"}, "mixture.addition: 'much' cannot be used"),
        ("export_dtype", "int8", "export_dtype: 'int8' cannot be used"),
        ("window", [500], r"window: \(500,\) cannot be used; accepted: at most tokens_per_batch"),
        ("stage_steps", [3], r"stage_steps: \(3,\) cannot be used; accepted: rising steps, one less than windows"),
        ("lora_rank", 4, "init: None cannot be used"),
        ("vocab_size", 0, "vocab_size: 0 cannot be used without init"),
        ("dp_shard", 3, "dp_replicate x .* = 3 cannot be used; accepted: 1, the number of"),
        ("learning_rate", 1.0, "recipe: 'learning_rate' cannot be used"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path, key, value, message):
    with pytest.raises(UserError, match=message):
        train(settings(tmp_path, **{key: value}))
