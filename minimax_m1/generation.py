"""Generation, naive and obviously right: the oracle of the engine, and enough for a chat and for evaluation.

One loop (`_steps`) serves three faces: `generate` (Transformers' arguments, padded tensors), `generate_batch` (lists of
prompts) and `stream_generate` (one prompt, token by token). Prompts are packed end to end, so padding is never
computed; a row that has ended leaves the batch. The token that ends a row (eos, a stop id, the last of a stop string)
is part of its output, as in Transformers.

Shapes: B rows, L prompt columns, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from minimax_m1.cache import HybridCache
from minimax_m1.continuation import Continuation, choose_tokens
from minimax_m1.errors import UserError
from minimax_m1.kernels.gpu import to_device
from minimax_m1.model import MiniMaxM1ForCausalLM, check_inputs
from minimax_m1.sampling import SamplingParams, forbidden_ids, fresh_seed

if TYPE_CHECKING:
    from minimax_m1.grammar import GrammarCompiler

PREFILL_CHUNK = 2048  # prompt tokens that run at once: enough to fill the cores, few enough for any memory
OFFICIAL_VOCAB_SIZE, OFFICIAL_EOS_TOKEN_ID = 200_064, 200_020  # M1's config.json says null, its tokenizer says 200020


class Streamer(Protocol):
    """Transformers' streamer protocol (transformers.TextStreamer and its like)."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [B, L] at first, then each step's tokens [B]; rows that have ended get the pad id."""

    def end(self) -> None:
        """Take note that all rows have ended."""


def generate(
    model: MiniMaxM1ForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    backend: str | None = None,
) -> Tensor:
    """Continue a padded batch of prompts; the arguments are Transformers'.

    Args:
        input_ids: [B, L] int64.
        attention_mask: [B, L], 1 for tokens, 0 for padding on either side; None: no padding.
        do_sample: False takes the most probable token, whatever `temperature` and its like say.
        eos_token_id: ids that end a row; None: the config's, else the tokenizer's.
        pad_token_id: fills ended rows; None: the config's, else the eos.
        stop_strings: texts that end a row, also across token boundaries; they need `tokenizer`.
        seed: row i draws from seed + i, so that equal rows differ; None: another draw every time.
        streamer: gets the prompt, then each step's tokens.
        prefill_chunk: most prompt tokens that run at once; bounds the memory of a long prompt.
        backend: kernels to run with, one of `kernels.BACKENDS`; None: the fastest.

    Returns:
        [B, L + new] int64: the prompt as given, the new tokens, pad ids behind rows that ended early.

    Raises:
        UserError: an argument out of its range, a mask with a gap, ids outside the vocabulary.
    """
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_tokens=min_new_tokens,
        temperature=temperature if do_sample else 0.0,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
        seed=seed,
    )
    mask = check_inputs(input_ids, attention_mask, model.config.vocab_size)
    prompts = [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    eos = resolve_eos(model, eos_token_id, tokenizer)
    pad = _resolve_pad(model, pad_token_id, eos)
    if streamer is not None:
        streamer.put(input_ids.cpu())

    columns = []
    for step in _steps(model, prompts, [params] * len(prompts), eos, tokenizer, prefill_chunk, backend):
        column = torch.full((len(prompts),), pad, dtype=input_ids.dtype)
        for row, token in step:
            column[row] = token
        columns.append(column)
        if streamer is not None:
            streamer.put(column)
    if streamer is not None:
        streamer.end()
    return torch.cat((input_ids, torch.stack(columns, dim=1).to(input_ids.device)), dim=1)


def generate_batch(
    model: MiniMaxM1ForCausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer: Any = None,
    max_batch_size: int = 128,
    prefill_chunk: int = PREFILL_CHUNK,
    backend: str | None = None,
) -> list[list[int]]:
    """Continue prompts of different lengths; return each one's new tokens, in the order given.

    Prompt i draws from `params.seed` + i. At most `max_batch_size` prompts run together.

    Raises:
        UserError: an empty prompt, ids outside the vocabulary, or stop strings without a tokenizer.
    """
    if max_batch_size < 1:
        raise UserError(f"max_batch_size: {max_batch_size} cannot be used; accepted: a whole number of at least 1")
    params = params or SamplingParams()
    eos = resolve_eos(model, eos_token_id, tokenizer)
    outputs: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), max_batch_size):
        part = [list(prompt) for prompt in prompts[start : start + max_batch_size]]
        for step in _steps(model, part, [params] * len(part), eos, tokenizer, prefill_chunk, backend, first_row=start):
            for row, token in step:
                outputs[start + row].append(token)
    return outputs


def stream_generate(
    model: MiniMaxM1ForCausalLM,
    prompt_ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer: Any = None,
    prefill_chunk: int = PREFILL_CHUNK,
    backend: str | None = None,
) -> Iterator[int]:
    """Continue one prompt, yielding each new token as soon as it is chosen.

    Raises:
        UserError: an empty prompt, ids outside the vocabulary, or stop strings without a tokenizer.
    """
    eos = resolve_eos(model, eos_token_id, tokenizer)
    rows, params = [list(prompt_ids)], params or SamplingParams()
    for step in _steps(model, rows, [params], eos, tokenizer, prefill_chunk, backend):
        yield step[0][1]


# -- the loop -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _steps(
    model: MiniMaxM1ForCausalLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    eos: frozenset[int],
    tokenizer: Any,
    prefill_chunk: int,
    backend: str | None,
    first_row: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """Yield for each step the (row, token) of every row that has not ended."""
    _check_request(model, prompts, params, prefill_chunk)
    vocab_size = model.config.vocab_size
    forbidden = forbidden_ids(model.model.embed_tokens.weight, _num_valid_tokens(tokenizer))
    grammars = _grammars(params, tokenizer, vocab_size)
    outputs = []
    for row, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        seed = fresh_seed() if p.seed is None else p.seed + first_row + row
        reader = tokenizer if _reads_text(p) else None
        matcher = None if grammars is None else grammars.matcher(p, eos)
        outputs.append(Continuation(p, seed, prompt, eos, reader, vocab_size, matcher=matcher))
    max_len = max(len(prompt) + p.max_new_tokens for prompt, p in zip(prompts, params, strict=True))
    cache = HybridCache(model.config, len(prompts), max_len, model.compute_dtype, model.device)

    rows = list(range(len(prompts)))
    hidden = _prefill(model, prompts, cache, prefill_chunk, backend)
    while True:
        logits = model.compute_logits(hidden, backend)
        choices = choose_tokens(logits, [outputs[row] for row in rows], forbidden, backend)
        for row, choice in zip(rows, choices, strict=True):
            outputs[row].append(*choice)
        yield [(row, choice.token) for row, choice in zip(rows, choices, strict=True)]
        rows = [row for row in rows if outputs[row].finish_reason is None]
        if not rows:
            return
        step = to_device(torch.tensor([outputs[row].output_ids[-1] for row in rows]), model.device)
        hidden, _ = model.forward_packed(step, cache.batch(rows, [1] * len(rows), backend), cache)


def _reads_text(params: SamplingParams) -> bool:
    """Whether the tokens of an output depend on its text."""
    has_grammar = params.structured is not None or bool(params.forced_tools)
    return bool(params.stop) or params.max_thinking_tokens is not None or has_grammar


def _grammars(params: list[SamplingParams], tokenizer: Any, vocab_size: int) -> GrammarCompiler | None:
    """Return a compiler of grammars if a row has one."""
    if tokenizer is None or not any(p.structured is not None or p.forced_tools for p in params):
        return None
    from minimax_m1.grammar import GrammarCompiler  # only here: most texts have no grammar

    return GrammarCompiler(tokenizer, vocab_size)


def _prefill(
    model: MiniMaxM1ForCausalLM, prompts: list[list[int]], cache: HybridCache, chunk: int, backend: str | None
) -> Tensor:
    """Run prompt i into slot i of the cache, at most `chunk` tokens at once; return the last tokens' hidden states."""
    last: list[Tensor | None] = [None] * len(prompts)
    for pieces in _plan_chunks([len(prompt) for prompt in prompts], chunk):
        rows, seqlens = [row for row, _, _ in pieces], [stop - start for _, start, stop in pieces]
        tokens = [token for row, start, stop in pieces for token in prompts[row][start:stop]]
        batch = cache.batch(rows, seqlens, backend, num_decodes=0)
        hidden, _ = model.forward_packed(to_device(torch.tensor(tokens), model.device), batch, cache)
        ends = batch.bounds[1:]
        for (row, _, stop), end in zip(pieces, ends, strict=True):
            if stop == len(prompts[row]):
                last[row] = hidden[end - 1].clone()  # a view would keep the whole chunk
    return torch.stack([h for h in last if h is not None])


def _plan_chunks(lengths: list[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut prompts laid end to end every `chunk` tokens; yield each chunk's (row, start, stop)."""
    pieces: list[tuple[int, int, int]] = []
    room = chunk
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            pieces.append((row, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], chunk
    if pieces:
        yield pieces


# -- what the caller left open --------------------------------------------------------------------------------------


def resolve_eos(
    model: MiniMaxM1ForCausalLM, eos_token_id: int | Sequence[int] | None = None, tokenizer: Any = None
) -> frozenset[int]:
    """Return the ids that end a text: the argument, else the config's, else the tokenizer's, else M1's own."""
    candidates = [eos_token_id, model.config.eos_token_id, getattr(tokenizer, "eos_token_id", None)]
    if model.config.vocab_size == OFFICIAL_VOCAB_SIZE:
        candidates.append(OFFICIAL_EOS_TOKEN_ID)
    found = next((ids for ids in candidates if ids is not None), ())
    return frozenset([found] if isinstance(found, int) else found)


def _resolve_pad(model: MiniMaxM1ForCausalLM, pad_token_id: int | None, eos: frozenset[int]) -> int:
    candidates = [pad_token_id, model.config.pad_token_id, min(eos, default=0)]
    return next(pad for pad in candidates if pad is not None)


def _num_valid_tokens(tokenizer: Any) -> int | None:
    return None if tokenizer is None else len(tokenizer)


def _check_request(
    model: MiniMaxM1ForCausalLM,
    prompts: list[list[int]],
    params: list[SamplingParams],
    prefill_chunk: int,
) -> None:
    vocab_size = model.config.vocab_size
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk: {prefill_chunk} cannot be used; accepted: a whole number of at least 1")
    if any(p.n > 1 for p in params):
        raise UserError("n: cannot be used here; accepted: 1 (give the prompt several times, or use the engine)")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt: prompt {row} is empty; accepted: at least one token")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise UserError(f"prompt: id {wrong[0]} of prompt {row} is out of range; accepted: 0 to {vocab_size - 1}")
