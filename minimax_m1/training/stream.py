"""SampleStream: the endless sequence of packed batches of one slot of an optimizer step, which continues to the bit.

Shapes: slot g of G = `batches_per_step` reads the records g, g + G, g + 2G, … of every source's order.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minimax_m1.errors import UserError
from minimax_m1.tasks import NANO_TASKS, Problem
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.tokenizer.chat_template import CHAT_TEMPLATE, render
from minimax_m1.tokenizer.vocabulary import TRAINED_ADDED_TOKENS
from minimax_m1.training.data import PackedBatch, Sample, cut_document, make_sample, pack, record_samples
from minimax_m1.training.packing import needed, next_batch
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.sources import FileRecords, Record, RecordError, open_records, permuted

SYSTEM_SHARE, HISTORY_SHARE = 0.05, 0.12  # problems with a system prompt; with earlier turns of the conversation
SYSTEM_PROMPT = "You are a helpful assistant."
MAX_UNUSABLE = 300  # problems in a row that give no sample


@dataclass
class Source:
    """One name of a mixture, and how far a slot has come in it."""

    name: str
    share: float  # of the tokens, as a weight
    records: FileRecords | None  # None: a family of problems
    next_record: int = 0  # in the slot's own count
    next_piece: int = 0  # of that record
    window: int = 0  # that the record was cut to, once its first piece is drawn
    pieces: list[Sample] | None = None  # of that record; None: not read
    tokens: int = 0  # drawn so far
    samples: int = 0
    credit: int = 0  # tokens that do not count, see SampleStream
    unusable: int = 0  # records in a row that gave no sample

    @property
    def num_records(self) -> int | None:
        """How many records it has; None: endlessly many."""
        return None if self.records is None else len(self.records)

    @property
    def due(self) -> float:
        """How much of its share a source has had; the lowest is next."""
        return (self.tokens - self.credit) / self.share


@dataclass(frozen=True)
class Drawn:
    """A sample that waits, and where it came from."""

    sample: Sample
    source: str
    record: int
    piece: int
    window: int

    def identity(self) -> list[Any]:
        """Return what it takes to read the sample again."""
        return [self.source, self.record, self.piece, self.window]


class SampleStream:
    """One slot's endless stream of packed batches; where it stands is a small dictionary.

    The next sample comes from the source that has had the fewest tokens for its share, so that the shares hold exactly,
    within a sample. All slots begin with one sample of each source; a random part of it is forgiven in each slot, or
    else all slots would turn to the same source in the same step for ever.

    Batches take samples as `packing.next_batch` says: nothing is lost and nothing waits for ever.
    """

    def __init__(self, settings: TrainSettings, tokenizer: MiniMaxM1Tokenizer, slot: int, window: int) -> None:
        """Open the mixture's files.

        Args:
            settings: mixture, seed, batches_per_step, tokens_per_batch, long_samples and bad_records count here.
            slot: 0 … batches_per_step - 1.
            window: most tokens of one sample; it may be set anew at any time and holds for records read from then on.

        Raises:
            UserError: a name that is neither a family nor files, or files that cannot be used.
        """
        assert 0 <= slot < settings.batches_per_step
        self.settings, self.tokenizer, self.slot, self.window = settings, tokenizer, slot, window
        self.sources = open_mixture(settings)
        self.notes: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # where the first record with a note is
        for source in self.sources:
            if slot == 0 and source.records is not None and source.records.empty_files:
                self.notes["skipped: empty file"] += len(source.records.empty_files)
                self.examples.setdefault("skipped: empty file", source.records.empty_files[0])
        self._buffer: list[Drawn] = []

    @property
    def counts(self) -> dict[str, int]:
        """Tokens drawn by source, and the records "skipped: reason" and "cut: reason"."""
        return {**{source.name: source.tokens for source in self.sources}, **self.notes}

    def next_batch(self, device: torch.device | str = "cpu", backend: str | None = None) -> PackedBatch:
        """Take the next samples of together at most `tokens_per_batch` tokens.

        Raises:
            UserError: a record that cannot be used where the settings say stop, or a source without any that can.
        """
        return pack(self.next_samples(), device, backend)

    def next_samples(self) -> list[Sample]:
        """Take the samples of the next batch."""
        budget = self.settings.tokens_per_batch
        lengths = [len(drawn.sample.ids) for drawn in self._buffer]
        while missing := max(0, needed(lengths, budget) - len(lengths)):
            self._buffer += [self.draw() for _ in range(missing)]
            lengths += [len(drawn.sample.ids) for drawn in self._buffer[-missing:]]
        taken = next_batch(lengths, budget)
        samples = [self._buffer[i].sample for i in taken]
        left = set(range(len(lengths))) - set(taken)
        self._buffer = [self._buffer[i] for i in sorted(left)]
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON can write it; samples that wait are named, not held."""
        sources = {
            source.name: {
                "records": source.num_records,
                "share": source.share,
                **{name: getattr(source, name) for name in POSITION},
            }
            for source in self.sources
        }
        return {
            "batches_per_step": self.settings.batches_per_step,
            "window": self.window,
            "sources": sources,
            "buffer": [drawn.identity() for drawn in self._buffer],
            "notes": dict(self.notes),
            "examples": dict(self.examples),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        If the mixture is another now, what is still in it goes on from its place, and shares count from here.

        Raises:
            UserError: files with another number of records, another batches_per_step, or a tokens_per_batch below the
                window that samples were cut to.
        """
        self._check_resumable(state)
        self.window, self.notes = state["window"], Counter(state["notes"])
        self.examples = dict(state.get("examples", {}))
        saved_sources = state["sources"]
        for source in self.sources:
            for name in POSITION:
                if source.name in saved_sources:
                    setattr(source, name, saved_sources[source.name][name])
            source.pieces = None
        if {name: saved["share"] for name, saved in saved_sources.items()} != {s.name: s.share for s in self.sources}:
            for source in self.sources:
                source.tokens = source.samples = source.credit = 0
        known = {source.name: source for source in self.sources}
        read: dict[tuple[str, int, int], list[Sample]] = {}
        self._buffer = []
        for name, record, piece, window in state["buffer"]:
            if name in known:
                if (name, record, window) not in read:
                    read[name, record, window] = self._read_again(known[name], record, piece, window)
                self._buffer.append(Drawn(read[name, record, window][piece], name, record, piece, window))

    def _check_resumable(self, state: Mapping[str, Any]) -> None:
        settings = self.settings
        if state["batches_per_step"] != settings.batches_per_step:
            raise UserError(
                f"batches_per_step: {settings.batches_per_step} cannot be used; accepted: {state['batches_per_step']}, "
                "as in the run that is resumed"
            )
        windows = [drawn[-1] for drawn in state["buffer"]] + [saved["window"] for saved in state["sources"].values()]
        if max(windows) > settings.tokens_per_batch:
            raise UserError(
                f"tokens_per_batch: {settings.tokens_per_batch} cannot be used; accepted: at least {max(windows)}, the "
                "window of the run that is resumed"
            )
        for source in self.sources:
            saved = state["sources"].get(source.name, {"records": source.num_records})["records"]
            if saved != source.num_records:
                raise UserError(
                    f"mixture: {source.name!r} has {source.num_records} records; accepted: {saved}, as in the run that "
                    "is resumed"
                )

    def _read_again(self, source: Source, record: int, piece: int, window: int) -> list[Sample]:
        """Return the pieces of a record of which `piece` is still wanted."""
        pieces, _ = self._read(source, record, window)
        if piece >= len(pieces):
            raise UserError(f"mixture: {source.name!r} has changed since the checkpoint was written")
        return pieces

    def draw(self) -> Drawn:
        """Take the next sample in drawn order, unpacked, before those that wait."""
        turned = self.slot % len(self.sources)  # at the beginning, when none has had any
        source = min(self.sources[turned:] + self.sources[:turned], key=lambda source: source.due)
        while source.pieces is None:
            self._open_next(source)
        piece = source.next_piece
        drawn = Drawn(source.pieces[piece], source.name, source.next_record, piece, source.window)
        source.next_piece += 1
        if source.next_piece == len(source.pieces):
            source.next_record, source.next_piece, source.pieces = source.next_record + 1, 0, None
        num_tokens = len(drawn.sample.ids)
        if source.samples == 0:
            source.credit = int(num_tokens * random.Random(f"{self.settings.seed}:{self.slot}:{source.name}").random())
        source.tokens += num_tokens
        source.samples += 1
        return drawn

    def _open_next(self, source: Source) -> None:
        """Read the source's next record, or pass over it if it gives no sample."""
        if source.next_piece:  # resumed inside a record, which has been counted
            source.pieces = self._read_again(source, source.next_record, source.next_piece, source.window)
            return
        source.window = self.window
        pieces, notes = self._read(source, source.next_record, source.window)
        if notes:
            self.notes.update(notes)
        if pieces:
            source.pieces, source.unusable = pieces, 0
            return
        source.next_record += 1
        source.unusable += 1
        num_records = source.num_records or MAX_UNUSABLE
        if source.unusable < num_records:
            return
        # A slot does not see every record in one pass: before giving up, all are tried.
        source.unusable = 0
        reasons: Counter[str] = Counter()
        for index in range(num_records):
            pieces, notes = self._read(source, index, self.window, every=True)
            if pieces:
                return
            reasons.update(notes)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise UserError(
            f"mixture: {source.name!r} cannot be used: none of {num_records} records gives a sample ({why})"
        )

    def _read(self, source: Source, number: int, window: int, every: bool = False) -> tuple[list[Sample], list[str]]:
        """Return the pieces of the slot's record `number`, in a shuffled order, and what had to be skipped or cut.

        Args:
            every: count `number` over the records of all slots.
        """
        settings = self.settings
        index = number if every else self.slot + number * settings.batches_per_step
        is_text, place = False, f"{source.name}, problem {number} of slot {self.slot}"
        if source.records is None:
            samples = [self._problem_sample(source.name, number)]
        else:
            try:
                record = source.records.read(index, settings.seed)
                is_text, place = not record.messages, record.place
                samples = _samples_of(self.tokenizer, record)
            except RecordError as error:
                if settings.bad_records == "stop":
                    raise
                self.examples.setdefault(f"skipped: {error.reason}", error.place)
                return [], [f"skipped: {error.reason}"]
        pieces, notes = [], []
        for sample in samples:
            fitting, note = fit_window(sample, is_text, place, window, settings.long_samples)
            pieces += fitting
            if note:
                notes.append(note)
                self.examples.setdefault(note, place)
        if len(pieces) <= 1:
            return pieces, notes
        # The pieces of a long text would follow each other, and with few texts all slots would learn the same ones.
        key = f"{settings.seed}:{source.name}:{index}"
        return [pieces[permuted(i, len(pieces), key)] for i in range(len(pieces))], notes

    def _problem_sample(self, family: str, number: int) -> Sample:
        """Return a problem that depends on the seed, the slot and its number alone."""
        rng = random.Random(f"{self.settings.seed}:{self.slot}:{family}:{number}")
        families = [source for source in self.sources if source.records is None]
        earlier: tuple[Problem, ...] = ()
        if rng.random() < HISTORY_SHARE:
            names = rng.choices([s.name for s in families], [s.share for s in families], k=rng.randint(1, 2))
            earlier = tuple(NANO_TASKS[name].sample(rng, "train") for name in names)
        system = SYSTEM_PROMPT if rng.random() < SYSTEM_SHARE else ""
        return make_sample(self.tokenizer, NANO_TASKS[family].sample(rng, "train"), earlier, system)


# What of a source a checkpoint holds.
POSITION = ("next_record", "next_piece", "window", "tokens", "samples", "credit", "unusable")


def open_mixture(settings: TrainSettings) -> list[Source]:
    """Open every name of the mixture that has a share, families and files.

    Raises:
        UserError: a name that is neither, or files that cannot be used; an empty one too, where bad_records says stop.
    """
    sources = []
    for name, share in settings.mixture.items():
        if share == 0:
            continue
        records = None if name in NANO_TASKS else open_records(name)
        if records is not None and records.empty_files and settings.bad_records == "stop":
            raise UserError(f'{records.empty_files[0]}:1: empty file; bad_records = "skip" passes over it')
        sources.append(Source(name, share, records))
    return sources


def fit_window(sample: Sample, is_text: bool, place: str, window: int, policy: str) -> tuple[list[Sample], str | None]:
    """Return what of a sample fits into the window, and a note if something does not.

    Raises:
        UserError: it is too long, and `policy` is to stop.
    """
    if len(sample.ids) <= window:
        return [sample], None
    if policy == "stop":
        raise UserError(f'{place}: {len(sample.ids)} tokens, above the window of {window}; long_samples = "stop"')
    if policy == "skip":
        return [], "skipped: longer than the window"
    if is_text:
        return cut_document(sample, window), "cut: text longer than the window"
    if not any(sample.learned[1:window]):
        return [], "skipped: nothing to learn within the window"
    end = max(i for i in range(window) if sample.learned[i]) + 1
    return [Sample(sample.ids[:end], sample.learned[:end])], "cut: chat longer than the window"


def _samples_of(tokenizer: MiniMaxM1Tokenizer, record: Record) -> list[Sample]:
    try:
        return record_samples(tokenizer, record)
    except UserError as error:
        raise RecordError(record.place, "cannot be rendered", str(error)) from None


def mixture_texts(settings: TrainSettings, count: int, seed: int) -> Iterator[str]:
    """Yield `count` texts of a mixture as they stand in a document or, without special tokens, in a chat.

    They are drawn by their shares of the characters; bad records are passed over or refused as in training.

    Raises:
        UserError: a name or a record that cannot be used.
    """
    sources = open_mixture(settings)
    for _ in range(count):
        source = min(sources, key=lambda source: source.due)
        text = None
        while text is None:
            text = _text_of(source, settings, seed)
        source.tokens += len(text)
        yield text


def _text_of(source: Source, settings: TrainSettings, seed: int) -> str | None:
    """Return the text of a source's next record; None if it is passed over."""
    source.next_record += 1
    if source.records is None:
        rng = random.Random(f"vocabulary:{seed}:{source.name}:{source.next_record}")
        problem = NANO_TASKS[source.name].sample(rng, "train")
        return f"user name=user\n{problem.prompt}\nai name=assistant\n{problem.response}"
    try:
        record = source.records.read(source.next_record - 1, seed)
    except RecordError as error:
        source.unusable += 1
        if settings.bad_records == "stop":
            raise
        if source.unusable == len(source.records):
            raise UserError(f"mixture: {source.name!r} cannot be used: only bad records (the last: {error})") from None
        return None
    source.unusable = 0
    if not record.messages:
        return record.text
    text = render(CHAT_TEMPLATE, {"messages": record.messages, "tools": record.tools})
    return re.sub("|".join(map(re.escape, TRAINED_ADDED_TOKENS)), "", text)
