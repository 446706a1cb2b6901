"""Packing and shuffling lose nothing, double nothing, and go on to the bit from wherever they are stopped."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.data import Sample
from minimax_m1.training.packing import best_fit, in_order
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.sources import permuted
from minimax_m1.training.stream import SampleStream
from minimax_m1.training.vocabulary import train_prefix_tokenizer

lengths = st.lists(st.integers(1, 60), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> MiniMaxM1Tokenizer:
    """Bytes and special tokens only: a text of n ASCII characters has n tokens."""
    return train_prefix_tokenizer([], 261)


@given(lengths, st.integers(0, 100))
def test_best_fit_is_within_the_room_and_at_least_as_full_as_next_fit(lengths: list[int], room: int) -> None:
    taken = best_fit(lengths, room)
    total = sum(lengths[i] for i in taken)
    assert taken == sorted(set(taken))
    assert total <= room
    left = [length for i, length in enumerate(lengths) if i not in taken]
    assert all(length > room - total for length in left)
    # Behind samples in order, where the next one does not fit, next fit would leave the room as it is.
    start = in_order(lengths, room)
    begun = sum(lengths[:start])
    assert begun + sum(lengths[start:][i] for i in best_fit(lengths[start:], room - begun)) >= begun


@given(lengths, st.integers(0, 100))
def test_best_fit_is_the_longest_fitting_one_repeatedly(lengths: list[int], room: int) -> None:
    waiting, expected = dict(enumerate(lengths)), []
    while fitting := [i for i, length in waiting.items() if length <= room]:
        index = max(fitting, key=lambda i: (waiting[i], -i))
        room -= waiting.pop(index)
        expected.append(index)
    assert best_fit(lengths, sum(lengths[i] for i in expected) + room) == sorted(expected)


@given(st.integers(1, 700), st.text(max_size=5))
def test_a_permutation_has_every_number_once(size: int, key: str) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_are_even() -> None:
    """Over many keys every number goes to every place about equally often; the bound is six standard deviations."""
    for size in (2, 5, 16):
        counts = Counter((i, permuted(i, size, str(key))) for key in range(1000) for i in range(size))
        expected = 1000 / size
        assert len(counts) == size * size
        assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())


def make_settings(folder: Path, texts: list[str], **changes: object) -> TrainSettings:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = dict(
        mixture={str(folder / "texts.jsonl"): 1.0}, tokens_per_batch=120, window=[60], batches_per_step=2, seed=3
    )
    return TrainSettings.from_dict({**values, **changes})


def fingerprint(samples: list[Sample]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(sample.ids) for sample in samples)


texts = st.lists(st.integers(1, 150), min_size=1, max_size=30).map(
    lambda sizes: [f"{number:03}" + "x" * size for number, size in enumerate(sizes)]
)
same_folder = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@same_folder
@given(texts=texts, num_slots=st.integers(1, 4))
def test_in_a_pass_every_slots_records_are_disjoint_and_together_all(
    texts: list[str], num_slots: int, tokenizer: MiniMaxM1Tokenizer, tmp_path: Path
) -> None:
    options = make_settings(tmp_path, texts, batches_per_step=num_slots, window=[60], tokens_per_batch=60)
    seen: list[str] = []
    for slot in range(num_slots):
        stream = SampleStream(options, tokenizer, slot, 60)
        learned: dict[int, list[int]] = {}  # by record: what is learned, whatever the order of its pieces
        while (drawn := stream.draw()).record * num_slots + slot < len(texts):
            ids = [
                token for token, is_learned in zip(drawn.sample.ids, drawn.sample.learned, strict=True) if is_learned
            ]
            learned.setdefault(drawn.record, []).extend(ids)
        seen += [tokenizer.decode(sorted(ids)) for ids in learned.values()]
    whole = [tokenizer.decode(sorted([*tokenizer.encode(text)[1:], tokenizer.eos_token_id])) for text in texts]
    assert sorted(seen) == sorted(whole)


@same_folder
@given(texts=texts, batches=st.integers(1, 8))
def test_batches_hold_what_was_drawn_within_the_budget(
    texts: list[str], batches: int, tokenizer: MiniMaxM1Tokenizer, tmp_path: Path
) -> None:
    options = make_settings(tmp_path, texts)
    stream, drawing = SampleStream(options, tokenizer, 1, 60), SampleStream(options, tokenizer, 1, 60)
    packed = []
    for _ in range(batches):
        samples = stream.next_samples()
        assert 0 < sum(len(sample.ids) for sample in samples) <= options.tokens_per_batch
        assert all(len(sample.ids) <= 60 for sample in samples)
        packed += samples
    waiting = [drawn.sample for drawn in stream._buffer]
    expected = [drawing.draw().sample for _ in range(len(packed) + len(waiting))]
    assert fingerprint(packed + waiting) == fingerprint(expected)
    order = iter([sample.ids for sample in expected])
    assert all(sample.ids in order for sample in waiting)  # the order of the rest is kept


@same_folder
@given(texts=texts, before=st.integers(0, 6), after=st.integers(1, 6), grown=st.booleans())
def test_a_restored_stream_continues_to_the_bit(
    texts: list[str], before: int, after: int, grown: bool, tokenizer: MiniMaxM1Tokenizer, tmp_path: Path
) -> None:
    mixture = {str(tmp_path / "texts.jsonl"): 2.0, "addition": 1.0}
    options = make_settings(tmp_path, texts, mixture=mixture, tokens_per_batch=700, window=[600])
    stream = SampleStream(options, tokenizer, 0, 60)
    stream.window = 300
    for number in range(before):
        stream.window = 600 if grown and number > 1 else 300
        stream.next_samples()
    state = json.loads(json.dumps(stream.state_dict()))
    restored = SampleStream(options, tokenizer, 0, 60)
    restored.load_state_dict(state)
    for _ in range(after):
        assert restored.next_samples() == stream.next_samples()
    assert restored.state_dict() == stream.state_dict()
    assert restored.counts == stream.counts
