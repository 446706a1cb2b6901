"""Streams: shares, slots, windows, what is skipped, cut or refused, and resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimax_m1.errors import UserError
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.stream import SampleStream, mixture_texts
from minimax_m1.training.vocabulary import train_prefix_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> MiniMaxM1Tokenizer:
    """Bytes and special tokens only: a text of n ASCII characters has n tokens."""
    return train_prefix_tokenizer([], 261)


def settings(mixture: dict[Any, float], **changes: Any) -> TrainSettings:
    values = dict(tokens_per_batch=1000, window=[1000])
    return TrainSettings.from_dict({**values, **changes, "mixture": {str(k): v for k, v in mixture.items()}})


def write_texts(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def chat(*turns: str) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]})


def test_shares_are_shares_of_the_tokens(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    long = write_texts(tmp_path / "long.jsonl", *("x" * n for n in range(500, 900, 7)))
    short = write_texts(tmp_path / "short.jsonl", *("x" * n for n in range(5, 50, 7)))
    stream = SampleStream(settings({long: 0.5, short: 0.2, "addition": 0.3, "sorting": 0.0}), tokenizer, 0, 1000)
    for _ in range(60):
        stream.next_batch()
    total = sum(stream.counts.values())
    assert set(stream.counts) == {str(long), str(short), "addition"}
    for name, share in ((str(long), 0.5), (str(short), 0.2), ("addition", 0.3)):
        assert abs(stream.counts[name] - share * total) < 1000  # a sample, or what was forgiven of the first


def test_slots_seeds_and_families_differ(tokenizer: MiniMaxM1Tokenizer) -> None:
    options = settings({"addition": 1.0}, batches_per_step=2)
    first = SampleStream(options, tokenizer, 0, 1000).next_samples()
    assert first == SampleStream(options, tokenizer, 0, 1000).next_samples()
    assert first != SampleStream(options, tokenizer, 1, 1000).next_samples()
    assert first != SampleStream(settings({"addition": 1.0}, seed=1), tokenizer, 0, 1000).next_samples()


def test_problems_have_earlier_turns_and_system_prompts_now_and_then(tokenizer: MiniMaxM1Tokenizer) -> None:
    stream = SampleStream(settings({"addition": 1.0, "sorting": 1.0}), tokenizer, 0, 1000)
    samples = [stream.draw().sample for _ in range(300)]
    texts = [tokenizer.decode(sample.ids) for sample in samples]
    assert 0.01 < sum("You are a helpful assistant." in text for text in texts) / 300 < 0.12  # 5% asked
    assert 0.05 < sum(text.count("user name=user") > 1 for text in texts) / 300 < 0.22  # 12% asked
    for sample, text in zip(samples, texts, strict=True):
        learned = [token for token, is_learned in zip(sample.ids, sample.learned, strict=True) if is_learned]
        assert tokenizer.decode(learned) == text[text.rindex("<think>") :]


def test_a_batch_is_packed_samples(tokenizer: MiniMaxM1Tokenizer) -> None:
    options = settings({"addition": 1.0, "sorting": 1.0}, tokens_per_batch=2000)
    samples = SampleStream(options, tokenizer, 0, 1000).next_samples()
    batch = SampleStream(options, tokenizer, 0, 1000).next_batch()
    assert batch.layout.seqlens == [len(sample.ids) for sample in samples]
    assert batch.input_ids.tolist() == [token for sample in samples for token in sample.ids]


def test_best_fit_fills_what_order_leaves(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", *("x" * (n * 37 % 800 + 9) for n in range(200)))
    stream = SampleStream(settings({path: 1.0}), tokenizer, 0, 1000)
    filled = [sum(len(sample.ids) for sample in stream.next_samples()) for _ in range(40)]
    assert sum(filled) > 0.97 * 40 * 1000


# -- Long samples -------------------------------------------------------------------------------------------------


def test_a_long_text_becomes_several_samples(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    text = "".join(f"{n:04}" for n in range(100))
    stream = SampleStream(settings({write_texts(tmp_path / "a.jsonl", text): 1.0}), tokenizer, 0, 101)
    pieces = [stream.draw().sample for _ in range(4)]
    assert all(len(piece.ids) == 101 for piece in pieces)
    starts = [tokenizer.decode(piece.ids[:4]) for piece in pieces]
    assert sorted(starts) == ["0000", "0025", "0050", "0075"]
    assert stream.counts["cut: text longer than the window"] == 1


def test_slots_take_the_pieces_of_a_single_text_in_different_orders(
    tokenizer: MiniMaxM1Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{n:04}" for n in range(1000)))
    options = settings({path: 1.0}, batches_per_step=4)
    firsts = {str(SampleStream(options, tokenizer, slot, 100).next_samples()) for slot in range(4)}
    assert len(firsts) == 4


def test_a_long_chat_loses_its_end(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(chat("Hi", "A" * 100, "And?", "B" * 300))
    whole = SampleStream(settings({path: 1.0}), tokenizer, 0, 1000).next_samples()[0]
    stream = SampleStream(settings({path: 1.0}), tokenizer, 0, 250)
    assert stream.next_samples()[0].ids == whole.ids[:250]
    assert stream.counts["cut: chat longer than the window"] > 1
    # Ten tokens after the first answer nothing of the second question is learned.
    window = whole.learned.index(False, whole.learned.index(True)) + 10
    cut = SampleStream(settings({path: 1.0}), tokenizer, 0, window).next_samples()[0]
    assert len(cut.ids) == window - 10
    assert tokenizer.decode(cut.ids).endswith("AAA<end_of_sentence>") and cut.learned[-1]
    with pytest.raises(UserError, match=r"none of 1 records gives a sample \(1 skipped: nothing to learn within"):
        SampleStream(settings({path: 1.0}), tokenizer, 0, 40).next_samples()


def test_long_samples_may_be_skipped_or_stop_the_run(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", "x" * 50, "y" * 500)
    stream = SampleStream(settings({path: 1.0}, long_samples="skip"), tokenizer, 0, 100)
    assert {len(sample.ids) for sample in stream.next_samples()} == {51}
    assert stream.counts["skipped: longer than the window"] > 0
    stream = SampleStream(settings({path: 1.0}, long_samples="stop"), tokenizer, 0, 100)
    with pytest.raises(UserError, match=r"a\.jsonl:2: 501 tokens, above the window of 100"):
        stream.next_samples()


def test_a_window_may_grow_between_batches(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", *["x" * 800] * 3)
    stream = SampleStream(settings({path: 1.0}), tokenizer, 0, 100)
    assert max(len(sample.ids) for sample in stream.next_samples()) == 100
    stream.window = 900
    lengths = [len(sample.ids) for _ in range(20) for sample in stream.next_samples()]
    assert lengths[:10] == [100] * 10  # what was read before
    assert max(lengths) == 801


# -- Bad records --------------------------------------------------------------------------------------------------


def test_bad_records_stop_the_run_or_are_counted(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "brok\n{"text": ""}\n{"text": "\\ud800 half a pair"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:[234]: (broken JSON|text is empty|cannot be rendered)"):
        SampleStream(settings({path: 1.0}), tokenizer, 0, 1000).next_samples()
    stream = SampleStream(settings({path: 1.0}, bad_records="skip"), tokenizer, 0, 1000)
    texts = {tokenizer.decode(sample.ids) for sample in stream.next_samples()}
    assert texts == {"good<end_of_sentence>"}
    reasons = {name for name in stream.counts if name.startswith("skipped: ")}
    assert reasons == {"skipped: broken JSON", "skipped: text is empty", "skipped: cannot be rendered"}


def test_a_source_without_a_good_record_stops_the_run(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 5 + '{"text": ""}\n')
    options = settings({path: 1.0, "addition": 1.0}, bad_records="skip", batches_per_step=4)
    message = r"none of 6 records gives a sample \(5 skipped: broken JSON, 1 skipped: text is empty\)"
    with pytest.raises(UserError, match=message):
        SampleStream(options, tokenizer, 2, 1000).next_samples()
    with pytest.raises(UserError, match="only bad records"):
        list(mixture_texts(options, 10, seed=0))


def test_one_good_record_is_enough_for_every_slot(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 7 + '{"text": "good"}\n')
    options = settings({path: 1.0}, bad_records="skip", batches_per_step=8, tokens_per_batch=20, window=[20])
    for slot in range(8):
        assert len(SampleStream(options, tokenizer, slot, 20).next_samples()) == 4


def test_an_empty_file_stops_the_run_or_is_counted(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    write_texts(tmp_path / "b.jsonl", "good")
    with pytest.raises(UserError, match=r"a\.jsonl:1: empty file"):
        SampleStream(settings({tmp_path: 1.0}), tokenizer, 0, 1000)
    stream = SampleStream(settings({tmp_path: 1.0}, bad_records="skip"), tokenizer, 0, 1000)
    assert stream.counts["skipped: empty file"] == 1


def test_problems_that_never_fit_stop_the_run(tokenizer: MiniMaxM1Tokenizer) -> None:
    stream = SampleStream(settings({"sorting": 1.0}, long_samples="skip"), tokenizer, 0, 10)
    with pytest.raises(UserError, match="none of 300 records"):
        stream.next_samples()


# -- Resuming -----------------------------------------------------------------------------------------------------


def test_a_chat_stream_continues_to_the_bit(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    thinking = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    messages = [{"role": "user", "content": "2 + 2?"}, thinking] * 3
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + chat("Hi", "Hello") + "\n{")
    options = settings(
        {tmp_path / "a.jsonl": 1.0, "addition": 0.5}, bad_records="skip", tokens_per_batch=400, window=[300]
    )
    stream = SampleStream(options, tokenizer, 0, 300)
    for _ in range(6):
        state = json.loads(json.dumps(stream.state_dict()))
        batch = stream.next_batch()
        restored = SampleStream(options, tokenizer, 0, 300)
        restored.load_state_dict(state)
        assert torch.equal(restored.next_batch().input_ids, batch.input_ids)
        assert restored.counts == stream.counts


def test_a_changed_mixture_goes_on_where_it_can(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", *(f"text {i}" for i in range(1000)))
    before = SampleStream(settings({path: 1.0, "addition": 1.0}), tokenizer, 0, 1000)
    seen = {tuple(sample.ids) for _ in range(5) for sample in before.next_samples()}
    seen |= {tuple(drawn.sample.ids) for drawn in before._buffer}
    after = SampleStream(settings({path: 1.0, "sorting": 3.0}), tokenizer, 0, 1000)
    after.load_state_dict(before.state_dict())
    assert {drawn.source for drawn in after._buffer} == {str(path)}
    waiting = {tuple(drawn.sample.ids) for drawn in after._buffer}
    later = {tuple(sample.ids) for _ in range(5) for sample in after.next_samples()}
    assert waiting and waiting <= seen
    assert not (later - waiting) & seen  # no record twice
    assert after.counts["sorting"] == pytest.approx(3 * after.counts[str(path)], rel=0.2)


def test_what_cannot_be_continued_says_so(tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", "one", "two" * 100)
    stream = SampleStream(settings({path: 1.0}), tokenizer, 0, 1000)
    stream.next_samples()
    state = stream.state_dict()

    def resume(**changes: Any) -> None:
        SampleStream(settings({path: 1.0}, **changes), tokenizer, 0, 100).load_state_dict(state)

    with pytest.raises(UserError, match="batches_per_step: 2 cannot be used; accepted: 1,"):
        resume(batches_per_step=2)
    with pytest.raises(UserError, match="tokens_per_batch: 500 cannot be used; accepted: at least 1000,"):
        resume(tokens_per_batch=500, window=[500])
    write_texts(path, "one", "two", "three")
    with pytest.raises(UserError, match=r"a\.jsonl' has 3 records; accepted: 2, as in the run"):
        resume()


def test_texts_of_a_mixture(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", *("x" * n for n in range(100, 200)))
    (tmp_path / "b.jsonl").write_text(chat("Hi", "Hello"))
    options = settings({tmp_path / "a.jsonl": 2.0, tmp_path / "b.jsonl": 1.0, "addition": 1.0})
    texts = list(mixture_texts(options, 400, seed=0))
    assert len(texts) == 400 and texts == list(mixture_texts(options, 400, seed=0))
    documents = [text for text in texts if text.startswith("x")]
    chats = [text for text in texts if "Hello" in text]
    assert set(chats) == {"user name=user\nHi\nai name=assistant\nHello\n"}
    problems = [text for text in texts if text.startswith("user name=user\n") and "<think>" in text]
    characters = [sum(map(len, group)) for group in (documents, chats, problems)]
    assert len(documents) + len(chats) + len(problems) == 400
    assert characters[0] / sum(characters) == pytest.approx(0.5, abs=0.05)
    assert characters[1] / sum(characters) == pytest.approx(0.25, abs=0.05)
