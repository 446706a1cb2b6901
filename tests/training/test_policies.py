"""A checkpoint that cannot be written stops a run or leaves a line in its log, and costs nothing that was there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # processes that import torch

PROJECT = Path(__file__).parents[2]

# Files may not grow from the 4th of 6 steps on, as if the disk were full, until training is over. In a process of its
# own, as the limit holds for all it writes.
RUN = """
import json, re, sys
from pathlib import Path
import pytest
from minimax_m1.errors import UserError
from minimax_m1.training import trainer, vocabulary
from minimax_m1.training.checkpoint import list_steps
from minimax_m1.training.settings import TrainSettings
from tests.training.checkpoint_worker import limit_files

vocabulary.VOCABULARY_RECORDS = 100
trainer._write_report = lambda output: None
network = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
               head_dim=16, rotary_dim=8, attn_type_list=[1, 0], num_local_experts=4, max_position_embeddings=2048)
take_step, export = trainer.train_step, trainer.export

def step_on_a_full_disk(*arguments):
    if arguments[-1] == 3:
        while not list_steps(folder / "checkpoints"):  # the save of step 2 may still be under way
            pass
        limit_files(20_000)
    return take_step(*arguments)

def export_with_room(*arguments):
    limit_files(-1)
    return export(*arguments)

def lines():
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

failed = "output: cannot write .*step-00000{}: File too large; earlier checkpoints are kept"
for policy in ("stop", "skip"):
    folder = Path(sys.argv[1], policy)
    settings = TrainSettings.from_dict(dict(
        output=str(folder), steps=6, tokens_per_batch=300, window=[300], vocab_size=300, log_every=1, save_every=2,
        keep=3, eval_every=0, warmup_steps=2, decay_steps=2, model=network, mixture={"addition": 1.0},
        bad_saves=policy))
    trainer.train_step, trainer.export = step_on_a_full_disk, export_with_room
    if policy == "stop":
        with pytest.raises(UserError, match=failed.format("[46]")):
            trainer.train(settings)
        limit_files(-1)
        assert not (folder / "model").exists()
    else:
        trainer.train(settings)
        events = [line["event"] for line in lines() if "event" in line]
        assert len(events) == 2, events
        for event, step in zip(events, (4, 6)):
            assert re.fullmatch(failed.format(step), event), event
        assert [line["step"] for line in lines() if "loss" in line] == [1, 2, 3, 4, 5, 6]
        assert (folder / "model" / "model.safetensors").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]

    # With room again the run goes on from the save that succeeded, and ends as if nothing had happened.
    trainer.train_step, trainer.export = take_step, export
    before = {line["step"]: line["loss"] for line in lines() if "loss" in line}
    (folder / "model").exists() and (folder / "model").rename(folder / "model before")
    trainer.train(settings)
    again = {line["step"]: line["loss"] for line in lines() if "loss" in line}
    assert sorted(again) == [1, 2, 3, 4, 5, 6]
    assert all(again[step] == loss for step, loss in before.items()), (before, again)
    assert list_steps(folder / "checkpoints") == [2, 4, 6]
"""


def test_a_save_that_fails(tmp_path: Path) -> None:
    """Both policies: the run stops, and goes on without."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
