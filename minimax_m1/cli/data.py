"""`minimax-m1 data`: samples as the model will see them, and what a recipe's data are like.

What the loss falls on is green on a terminal and [[in brackets]] elsewhere.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minimax_m1.cli.terminal import can_dim
from minimax_m1.errors import UserError
from minimax_m1.progress import progress_bar
from minimax_m1.training.settings import TrainSettings

if TYPE_CHECKING:
    from minimax_m1.tokenizer import MiniMaxM1Tokenizer
    from minimax_m1.training.data import Sample
    from minimax_m1.training.stream import SampleStream

SHOWN_TOKENS = 1500  # of the beginning and of the end of a sample that is longer than both
QUANTILES = {"shortest": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}


def show_data(settings: TrainSettings, count: int, statistics: int) -> None:
    """Print samples of the first slot in the order in which they are drawn, and statistics.

    Args:
        settings: those of a training run.
        count: samples to show.
        statistics: samples that the statistics are of; 0: none.

    Raises:
        UserError: settings or data that training would refuse as well.
    """
    from minimax_m1.training.stream import SampleStream
    from minimax_m1.training.vocabulary import build_tokenizer

    for name, value in (("count", count), ("statistics", statistics)):
        if value < 0:
            raise UserError(f"{name}: {value} cannot be used; accepted: a whole number from 0")
    tokenizer = build_tokenizer(settings)
    stream = SampleStream(settings, tokenizer, 0, settings.window[0])
    for number in range(1, count + 1):
        drawn = stream.draw()
        tokens, learned = len(drawn.sample.ids), sum(drawn.sample.learned[1:])
        print(f"sample {number}: {drawn.source}, {tokens:,} tokens, the loss falls on {learned:,}")
        _print_sample(tokenizer, drawn.sample)
        print()
    if statistics:
        stream = SampleStream(settings, tokenizer, 0, settings.window[0])
        print("\n".join(measured(stream, statistics)))


def measured(stream: SampleStream, count: int) -> Iterator[str]:
    """Draw `count` samples and yield the lines of a table: sources, lengths, packing, what was left out."""
    from minimax_m1.training import packing

    drawn = [stream.draw() for _ in progress_bar(range(count), "Drawing samples")]
    lengths = [len(one.sample.ids) for one in drawn]
    learned = sum(sum(one.sample.learned[1:]) for one in drawn)
    yield f"{count:,} samples, {sum(lengths):,} tokens; the loss falls on {learned / sum(lengths):.1%} of them"
    yield ""
    yield "share asked   share  samples      tokens  source"
    shares = sum(source.share for source in stream.sources)
    for source in stream.sources:
        asked, real = source.share / shares, source.tokens / sum(lengths)
        yield f"{asked:11.1%} {real:7.1%} {source.samples:8,} {source.tokens:11,}  {source.name}"
    yield ""
    ordered = sorted(lengths)
    places = {name: ordered[round(share * (count - 1))] for name, share in QUANTILES.items()}
    yield "length        " + ", ".join(f"{name} {length:,}" for name, length in places.items()) + " tokens"
    budget = stream.settings.tokens_per_batch
    yield f"packing       {packing.best_fit_efficiency(lengths, budget):.1%} of {budget:,} tokens a batch, by best fit"
    yield f"              {packing.in_order_efficiency(lengths, budget):.1%} of them, with samples in order"
    yield f"              {packing.padded_efficiency(lengths, budget):.1%} of what is run, padded to a batch's longest"
    for note, times in stream.notes.most_common():
        yield f"{note.split(': ')[0]:<13} {times:,} {'record' if times == 1 else 'records'}: {note.split(': ', 1)[1]}"


def _print_sample(tokenizer: MiniMaxM1Tokenizer, sample: Sample) -> None:
    if can_dim(sys.stdout):
        from rich.console import Console
        from rich.text import Text

        text = Text()
        for piece, is_learned, is_special in runs(tokenizer, sample):
            colour = "green" if is_learned else "default"
            text.append(piece, style=f"bold {colour}" if is_special else colour)
        Console().print(text, soft_wrap=True)
        return
    by_learned = itertools.groupby(runs(tokenizer, sample), key=lambda run: run[1])
    texts = [(is_learned, "".join(piece for piece, _, _ in group)) for is_learned, group in by_learned]
    print("".join(f"[[{text}]]" if is_learned else text for is_learned, text in texts))


def runs(tokenizer: MiniMaxM1Tokenizer, sample: Sample) -> Iterator[tuple[str, bool, bool]]:
    """Yield a sample's text in runs: the text, whether the loss falls on it, whether it is a special token.

    The middle of a very long sample is left out, and what would steer a terminal is written as its code.
    """
    special = set(tokenizer.all_special_ids)
    tokens = list(zip(sample.ids, sample.learned, strict=True))
    cut = len(tokens) - 2 * SHOWN_TOKENS
    parts = [tokens] if cut <= 0 else [tokens[:SHOWN_TOKENS], tokens[-SHOWN_TOKENS:]]
    for number, part in enumerate(parts):
        if number:
            yield f"\n… {cut:,} tokens …\n", False, False
        for (is_learned, is_special), group in itertools.groupby(
            part, key=lambda token: (token[1], token[0] in special)
        ):
            yield _printable(tokenizer.decode([token for token, _ in group])), is_learned, is_special


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
