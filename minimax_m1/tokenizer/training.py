"""Training a small byte-level BPE tokenizer with M1's special tokens, template and text conventions."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, trainers

from minimax_m1.errors import UserError
from minimax_m1.tokenizer.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.tokenizer.vocabulary import (
    SINGLE_DIGIT_SPLIT,
    TRAINED_ADDED_TOKENS,
    build_backend,
    byte_characters,
    pre_tokenizer,
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> MiniMaxM1Tokenizer:
    """Train a byte-level BPE on `texts`; the same texts in the same order always give the same tokenizer.

    Ids 0-255 are the bytes, then come the merges, then the five special tokens (`TRAINED_ADDED_TOKENS`). Every digit
    is a token of its own; `<think>` and `</think>` are ordinary text, as in M1.

    Args:
        texts: training texts, read once.
        vocab_size: the number of ids wanted, special tokens included. `len()` of the result is smaller when the texts
            do not have that many different pairs.

    Raises:
        UserError: vocab_size leaves no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(TRAINED_ADDED_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"vocab_size = {vocab_size}: accepted is {smallest} or more (256 bytes and the special tokens)")
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizer(SINGLE_DIGIT_SPLIT)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TRAINED_ADDED_TOKENS),
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    # Only the merges are kept: the trainer numbers the bytes in another order.
    merges = [(left, right) for left, right in json.loads(trainee.to_str())["model"]["merges"]]
    backend = build_backend(merges, SINGLE_DIGIT_SPLIT)
    first_added_id = backend.get_vocab_size()
    added_tokens = {token: first_added_id + offset for offset, token in enumerate(TRAINED_ADDED_TOKENS)}
    settings = {"thinking_close": "\n</think>\n"}  # as the chat template lays out what a model is trained on
    return MiniMaxM1Tokenizer(backend, added_tokens, settings)
