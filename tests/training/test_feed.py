"""What is drawn ahead is what would have been drawn, and a run resumes behind what it was given."""

import json
from pathlib import Path

import torch

from minimax_m1 import MiniMaxM1Tokenizer, shipped
from minimax_m1.training.feed import Feed
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.stream import SampleStream

CPU = torch.device("cpu")


def make_feed(tmp_path: Path, is_ahead: bool) -> Feed:
    settings = TrainSettings(
        steps=5,
        tokens_per_batch=600,
        batches_per_step=2,
        window=(100, 300),
        stage_steps=(2,),
        mixture={"addition": 1.0, str(write_long_texts(tmp_path)): 1.0},
    )
    tokenizer = MiniMaxM1Tokenizer.from_pretrained(shipped.path())
    streams = {slot: SampleStream(settings, tokenizer, slot, settings.window[0]) for slot in range(2)}
    return Feed(streams, settings, is_ahead)


def write_long_texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i} " * 100}) + "\n" for i in range(40)))
    return path


def ids_of(batches) -> list[list[int]]:
    return [batch.input_ids.tolist() for batch in batches]


def test_ahead_gives_the_same_batches_states_and_notes(tmp_path):
    plain, ahead = make_feed(tmp_path, False), make_feed(tmp_path, True)
    for step in range(5):
        assert ids_of(plain.next_batches(step, CPU)) == ids_of(ahead.next_batches(step, CPU))
        assert plain.state() == ahead.state()
        assert plain.notes() == ahead.notes()
    assert any(times for _, times, _ in ahead.notes())
    ahead.close()


def test_a_run_resumes_behind_what_it_was_given(tmp_path):
    whole, stopped, resumed = (make_feed(tmp_path, is_ahead) for is_ahead in (False, True, True))
    batches = [ids_of(whole.next_batches(step, CPU)) for step in range(5)]
    for step in range(2):  # the third step, of the second stage, is drawn by now
        stopped.next_batches(step, CPU)
    resumed.load(json.loads(json.dumps(stopped.state())))
    assert [ids_of(resumed.next_batches(step, CPU)) for step in range(2, 5)] == batches[2:]
    for feed in (stopped, resumed):
        feed.close()
