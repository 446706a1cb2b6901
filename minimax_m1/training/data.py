"""Training samples: records and problems as ids, which of them are learned, and samples packed end to end.

Shapes: a packed batch has T tokens of N samples; `targets` is what each token should be followed by, -100 where that is
not learned (prompts, results of tools, the last token of a sample).
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from minimax_m1.batch import ForwardBatch
from minimax_m1.errors import UserError
from minimax_m1.kernels.gpu import to_device
from minimax_m1.tasks import Problem
from minimax_m1.tokenizer import MiniMaxM1Tokenizer
from minimax_m1.training.sources import Record

IGNORED = -100
ASSISTANT_HEADER = "ai name=assistant\n"  # how the template begins an assistant's turn, after <beginning_of_sentence>


@dataclass(frozen=True)
class Sample:
    """One sequence of ids, and for each whether the model is to learn to write it there."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class PackedBatch:
    """Samples end to end; neither attention nor lightning states cross from one to the next."""

    input_ids: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    layout: ForwardBatch

    @cached_property
    def learned(self) -> Tensor:
        """[n] int64: the rows that the loss falls on. The first time, a GPU is waited for: `to` asks on the host."""
        return (self.targets != IGNORED).nonzero()[:, 0]

    @property
    def num_targets(self) -> int:
        """Tokens that the loss falls on."""
        return len(self.learned)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on a device, with `learned`; the host does not wait."""
        ids, targets, learned = (to_device(x, device) for x in (self.input_ids, self.targets, self.learned))
        cu_seqlens, positions = (to_device(x, device) for x in (self.layout.cu_seqlens, self.layout.positions))
        moved = PackedBatch(ids, targets, replace(self.layout, cu_seqlens=cu_seqlens, positions=positions))
        vars(moved)["learned"] = learned  # where cached_property keeps it
        return moved


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu", backend: str | None = None) -> PackedBatch:
    """Lay samples end to end."""
    layout = ForwardBatch.packed([len(sample.ids) for sample in samples], backend=backend)
    ids = torch.frombuffer(array("q", chain.from_iterable(sample.ids for sample in samples)), dtype=torch.int64)
    flags = bytearray(chain.from_iterable(sample.learned for sample in samples))
    is_learned = torch.frombuffer(flags, dtype=torch.bool)
    is_learned[layout.bounds[:-1]] = False  # nothing comes before the first of a sample
    targets = torch.full_like(ids, IGNORED)
    targets[:-1] = ids[1:].where(is_learned[1:], IGNORED)
    return PackedBatch(ids, targets, layout).to(device)


# -- Problems -----------------------------------------------------------------------------------------------------


def prompt_ids(
    tokenizer: MiniMaxM1Tokenizer, prompt: str, history: tuple[Problem, ...] = (), system: str = ""
) -> list[int]:
    """Return the ids of a conversation up to where the assistant begins to answer `prompt`."""
    messages = [{"role": "system", "content": system}] if system else []
    for earlier in history:
        messages.append({"role": "user", "content": earlier.prompt})
        messages.append({"role": "assistant", "content": earlier.answer})
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages)


def make_sample(
    tokenizer: MiniMaxM1Tokenizer, problem: Problem, history: tuple[Problem, ...] = (), system: str = ""
) -> Sample:
    """Render a problem, with its response and the end-of-sentence token, behind its prompt; the response is learned."""
    prompt = prompt_ids(tokenizer, problem.prompt, history, system)
    response = [*tokenizer.encode(problem.response), tokenizer.eos_token_id]
    return Sample(prompt + response, [False] * len(prompt) + [True] * len(response))


# -- Records ------------------------------------------------------------------------------------------------------


def record_samples(tokenizer: MiniMaxM1Tokenizer, record: Record) -> list[Sample]:
    """Render a record: a document as one sample, a conversation as one or more."""
    if record.messages:
        return chat_samples(tokenizer, record.messages, record.tools)
    ids = tokenizer.encode(record.text, allow_special=False) + [tokenizer.eos_token_id] * record.is_end
    return [Sample(ids, [False] + [True] * (len(ids) - 1))]


def chat_samples(
    tokenizer: MiniMaxM1Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[Sample]:
    """Render a conversation so that each of the assistant's turns is learned once, behind what it would see in use.

    M1's template leaves out the thinking of turns before the last user message. So the turns after an earlier user
    message, if they think, are learned from a sample of their own that ends with them; all others, from the whole
    conversation.

    Raises:
        UserError: the tokenizer's own chat template hides where the assistant's turns are.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    messages = messages[: last + 1]
    starts = [i for i, message in enumerate(messages) if message["role"] == "user" and i > 0]
    samples: list[Sample] = []
    whole: list[Mapping[str, Any]] = []  # the messages so far as they are seen later, without earlier thinking
    learned: list[bool] = []  # of the assistant's turns in it: whether they are learned there
    for start, end in itertools.pairwise([0, *starts, len(messages)]):
        exchange = messages[start:end]
        turns = [message for message in exchange if message["role"] == "assistant"]
        if end < len(messages) and any(_thinks(turn) for turn in turns):
            samples.append(
                _rendered(tokenizer, [*whole, *exchange], tools, [False] * len(learned) + [True] * len(turns))
            )
            exchange = [_without_thinking(message) for message in exchange]
            learned += [False] * len(turns)
        else:
            learned += [True] * len(turns)
        whole += exchange
    return [*samples, _rendered(tokenizer, whole, tools, learned)]


def _thinks(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    inline = isinstance(content, str) and content.startswith("<think>") and "</think>" in content
    return inline or bool(message.get("reasoning_content") or message.get("reasoning"))


def _without_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message as later turns see it; the template does the rest, but thinking inside the content is ours."""
    if message["role"] != "assistant" or not _thinks(message) or not isinstance(message.get("content"), str):
        return message
    content = message["content"]
    if content.startswith("<think>"):
        content = content.split("</think>", 1)[1].lstrip("\n")
    return {**message, "content": content}


def _rendered(
    tokenizer: MiniMaxM1Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    learned_turns: Sequence[bool],
) -> Sample:
    """Render messages up to the end of the last learned turn.

    Only the template writes special tokens, so each turn is what lies between a beginning and an end of sentence, and
    the assistant's are those that begin with its header. The header is encoded apart from what follows, because a
    model in use goes on from the header's ids.
    """
    ids = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=False)
    header = tokenizer.encode(ASSISTANT_HEADER)
    begins = [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id]
    turns = iter(learned_turns)
    sample = Sample(ids[: begins[0]], [False] * begins[0]) if begins else Sample([], [])
    num_turns, end_of_last = 0, 0
    for begin, following in itertools.pairwise([*begins, len(ids)]):
        part = ids[begin:following]
        if not tokenizer.decode(part[1 : len(header) + 1]).startswith(ASSISTANT_HEADER):
            sample.ids.extend(part)
            sample.learned.extend([False] * len(part))
            continue
        num_turns += 1
        size = part.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in part else len(part)
        body = part[1 + len(header) : size]
        if part[1 : len(header) + 1] != header:
            text = tokenizer.decode(part[1:size]).removeprefix(ASSISTANT_HEADER)
            body = tokenizer.encode(text, allow_special=False)
        is_learned = next(turns, False)
        spoken = [*body, *part[size : size + 1]]
        sample.ids.extend([*part[:1], *header, *spoken, *part[size + 1 :]])
        sample.learned.extend([False] * (1 + len(header)) + [is_learned] * len(spoken))
        end_of_last = len(sample.learned) if is_learned else end_of_last
        sample.learned.extend([False] * len(part[size + 1 :]))
    if num_turns != len(learned_turns):
        raise UserError(
            f"chat_template: shows {num_turns} of {len(learned_turns)} turns of the assistant; accepted: a template "
            f"that begins each with {tokenizer.bos_token}{ASSISTANT_HEADER!r}"
        )
    return Sample(sample.ids[:end_of_last], sample.learned[:end_of_last])


def cut_document(sample: Sample, window: int) -> list[Sample]:
    """Cut a sample into consecutive ones of at most `window` tokens.

    The last token of one is the first of the next, where it is not learned: so every token but the first is learned
    once.
    """
    starts = range(0, max(1, len(sample.ids) - 1), window - 1)
    pieces = [(sample.ids[i : i + window], sample.learned[i : i + window]) for i in starts]
    return [Sample(ids, [False, *learned[1:]]) for ids, learned in pieces]
