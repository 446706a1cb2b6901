"""The small vocabulary of m1-nano: only beginnings of words are merged, so that words are spelled letter by letter.

Shapes: V tokens of a vocabulary, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.tokenizer.vocabulary import SINGLE_DIGIT_SPLIT, TRAINED_ADDED_TOKENS, build_backend, pre_tokenizer
from minimax_m1.training.checkpoint import list_steps
from minimax_m1.training.settings import TrainSettings
from minimax_m1.training.stream import mixture_texts

# Pieces of the chat template that no space precedes, in byte characters (Ċ is a line feed).
FRAME_PIECES = ("=user", "=assistant", "user", "ai", "think", "</", ">Ċ")
VOCABULARY_RECORDS = 20_000  # records of the mixture that a vocabulary is built from,
VOCABULARY_CHARACTERS = 1 << 24  # and no more than these: one record may be a book


def build_tokenizer(settings: TrainSettings) -> MiniMaxM1Tokenizer:
    """Return the vocabulary of the run in output that goes on, so that its mixture may change, or build it.

    It is init's, extended where vocab_size says so, or one built from the mixture; the same settings always give the
    same one.

    Raises:
        UserError: there is neither init nor a vocab_size.
    """
    folder = settings.output / "tokenizer"
    if settings.resume and folder.is_dir() and list_steps(settings.output / "checkpoints"):
        return MiniMaxM1Tokenizer.from_pretrained(folder)
    if settings.init is None and not settings.vocab_size:
        raise UserError("vocab_size: 0 cannot be used without init; accepted: the size of the vocabulary to build")
    base = None if settings.init is None else MiniMaxM1Tokenizer.from_pretrained(settings.init)
    if base is not None and not settings.vocab_size:
        return base
    texts = mixture_texts(settings, VOCABULARY_RECORDS, settings.seed)
    return train_prefix_tokenizer(_up_to(texts, VOCABULARY_CHARACTERS), settings.vocab_size, base)


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield the first of the texts, until together they have so many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def train_prefix_tokenizer(
    texts: Iterable[str], vocab_size: int, base: MiniMaxM1Tokenizer | None = None
) -> MiniMaxM1Tokenizer:
    """Build a byte-level BPE whose merges are the most frequent beginnings of the words of `texts`.

    Ordinary BPE would cut "strawberry" into pieces whose letters the model cannot see and would have to learn by
    heart. Here a merge only ever extends a piece that starts with a space, a sign or a capital (" h", " ho", " how"),
    so the inside of a word stays single letters, while the wording of the tasks is still one token a word. Merging a
    beginning saves one token at each occurrence, so the most frequent beginnings are the best choice of that kind.

    Args:
        base: a vocabulary to extend: its merges come first, and its added tokens last.

    Raises:
        UserError: vocab_size leaves no room for the bytes and the special tokens, or for what base has; or base cuts
            its texts in another way, so that new merges would not mean the same.
    """
    if base is not None and base.split_patterns != [SINGLE_DIGIT_SPLIT]:
        raise UserError("vocab_size: only a vocabulary that was built here can be extended; accepted: 0 with this init")
    known = [] if base is None else base.merges
    added = TRAINED_ADDED_TOKENS if base is None else tuple(base.added_tokens)
    least = 256 + len(known) + len(added)
    if vocab_size < least:
        raise UserError(f"vocab_size: {vocab_size} cannot be used; accepted: {least} or more")
    beginnings = _count_beginnings(texts)
    # Every letter after a space first, so that merges run from the left; pieces without a space before them last.
    first = [f"Ġ{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    last = list(dict.fromkeys(piece[:end] for piece in FRAME_PIECES for end in range(2, len(piece) + 1)))
    taken = {left + right for left, right in known}
    first, last = ([text for text in texts if text not in taken] for texts in (first, last))
    taken |= {*first, *last}
    frequent = [text for text, _ in beginnings.most_common() if text not in taken]
    room = vocab_size - least
    kept = (first + frequent[: max(0, room - len(first) - len(last))] + last)[:room]
    backend = build_backend([*known, *((text[:-1], text[-1]) for text in kept)], SINGLE_DIGIT_SPLIT)
    size = backend.get_vocab_size()
    settings = {"thinking_close": "\n</think>\n"} if base is None else base.settings
    return MiniMaxM1Tokenizer(backend, {token: size + offset for offset, token in enumerate(added)}, settings)


@torch.no_grad()
def extend_embeddings(
    model: MiniMaxM1ForCausalLM, old: MiniMaxM1Tokenizer, new: MiniMaxM1Tokenizer
) -> MiniMaxM1ForCausalLM:
    """Return the model with rows for the tokens of `new`; the same model where the vocabularies are the same.

    Known tokens keep their rows. A new one begins in the embedding as the mean of the pieces it used to be, and in the
    head as the first of them: that is what the model predicts where the new token now stands.
    """
    vocab = new.get_vocab()
    if vocab == old.get_vocab():
        return model
    ids = {"bos_token_id": new.bos_token_id, "eos_token_id": new.eos_token_id, "pad_token_id": new.pad_token_id}
    grown = MiniMaxM1ForCausalLM(model.config.replace(vocab_size=len(new), **ids))
    known = old.get_vocab()
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    state = dict(model.state_dict())
    state["model.embed_tokens.weight"] = embedding.new_empty(len(new), embedding.shape[1])
    state["lm_head.weight"] = head.new_empty(len(new), head.shape[1])
    for token, row in vocab.items():
        pieces = [known[token]] if token in known else old.pieces(token)
        state["model.embed_tokens.weight"][row] = embedding[pieces].mean(0)
        state["lm_head.weight"][row] = head[pieces[0]]
    grown.load_state_dict(state)
    return grown


def _count_beginnings(texts: Iterable[str]) -> Counter[str]:
    """Count the beginnings of two or more characters; a longer one never counts more than a shorter one."""
    split = pre_tokenizer(SINGLE_DIGIT_SPLIT)
    words: Counter[str] = Counter()
    for text, times in Counter(texts).items():  # records of a small file come again and again
        for piece, _ in split.pre_tokenize_str(text):
            words[piece] += times
    beginnings: Counter[str] = Counter()
    for piece, count in words.items():
        if piece[0] not in "ĠABCDEFGHIJKLMNOPQRSTUVWXYZ":
            continue
        for end in range(2, len(piece) + 1):
            beginnings[piece[:end]] += count
    return Counter({text: beginnings[text] for text in sorted(beginnings, key=lambda t: (-beginnings[t], len(t), t))})
