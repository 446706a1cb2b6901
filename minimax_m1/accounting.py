"""What a config costs: parameters, bytes and floating-point operations, in closed form and without torch.

Convention: one multiply-accumulate is 2 FLOPs; only matrix products are counted (norms, activations, rotary angles,
softmax and the embedding look-up are not), and a lightning layer is counted as the recurrence, not as any kernel's
blocks. A context length includes the token itself.

Sources: MiniMax-M1 report (arXiv 2506.13585), MiniMax-01 report (arXiv 2501.08313), Kaplan et al. 2020
(arXiv 2001.08361) for backward = 2 x forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from minimax_m1.config import QUANTIZATIONS, MiniMaxM1Config, QuantizationConfig
from minimax_m1.errors import UserError

DTYPE_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}


def parameter_counts(config: MiniMaxM1Config) -> dict[str, int]:
    """Return the number of parameters by part of the network; the values sum to `parameters(config)`.

    Keys: embedding, lightning_attention, softmax_attention, router, experts, shared_expert, norms, head (0 when it is
    tied to the embedding).
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    num_lightning, num_softmax = len(config.lightning_layers), len(config.softmax_layers)
    return {
        "embedding": config.vocab_size * hidden,
        "lightning_attention": num_lightning * _lightning_projections(config),
        "softmax_attention": num_softmax * _softmax_projections(config),
        "router": layers * (_router(config) + (1 if config.dynamic_gate else 0)),
        "experts": layers * config.num_local_experts * _expert(config),
        "shared_expert": layers * _shared_expert(config),
        "norms": (2 * layers + 1) * hidden + num_lightning * _heads_width(config),
        "head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
    }


def parameters(config: MiniMaxM1Config) -> int:
    """Return the number of parameters of the whole network.

    MiniMax-M1: 456,089,655,296. (Half the 912,210,767,872 bytes of its checkpoint is 15,728,640 more, because the
    router's weights are stored in float32.)
    """
    return sum(parameter_counts(config).values())


def active_parameters(config: MiniMaxM1Config) -> int:
    """Return the parameters that one token uses in the layers (MiniMax-M1: 45.94e9, published as 45.9 billion).

    Counts `num_experts_per_tok` experts a layer; the embedding and the head are left out, which is the count that
    gives the published figure.
    """
    counts = parameter_counts(config)
    idle_experts = config.num_hidden_layers * (config.num_local_experts - config.num_experts_per_tok)
    return parameters(config) - counts["embedding"] - counts["head"] - idle_experts * _expert(config)


# -- bytes --------------------------------------------------------------------------------------------------------


def weight_bytes(config: MiniMaxM1Config, dtype: str = "bfloat16") -> int:
    """Return the bytes of all parameters in `dtype`, the router at least in float32 (MiniMax-M1: 912,210,767,872).

    A quantization such as int8 or int4-g64 (`config.QUANTIZATIONS`) counts its scales, and what it leaves as it is in
    bfloat16.

    Raises:
        UserError: `dtype` is neither one of `DTYPE_BITS` nor a quantization.
    """
    if dtype in QUANTIZATIONS:
        quantization = QuantizationConfig.parse(dtype)
        matrices = _quantized_matrices(config, quantization)
        floats = sum(count * size_out * size_in for count, size_out, size_in in matrices) * 2
        small = sum(count * _quantized_bytes(size_out, size_in, quantization) for count, size_out, size_in in matrices)
        return weight_bytes(config) - floats + small
    router = parameter_counts(config)["router"]
    return ((parameters(config) - router) * _bits(dtype) + router * max(_bits(dtype), 32)) // 8


def kv_bytes_per_token(config: MiniMaxM1Config, dtype: str = "bfloat16") -> int:
    """Return the bytes of keys and values that one token of context adds, over all softmax layers.

    Raises:
        UserError: `dtype` is not one of `DTYPE_BITS`.
    """
    assert config.head_dim is not None
    return 2 * len(config.softmax_layers) * config.num_key_value_heads * config.head_dim * _bits(dtype) // 8


def kv_bytes(config: MiniMaxM1Config, context_len: int, dtype: str = "bfloat16") -> int:
    """Return the bytes of keys and values of one sequence; a sliding window bounds the tokens that are needed."""
    return _visible(config, context_len) * kv_bytes_per_token(config, dtype)


def lightning_state_bytes(config: MiniMaxM1Config) -> int:
    """Return the bytes of one sequence's lightning states (float32), the same at every context length."""
    assert config.head_dim is not None
    return len(config.lightning_layers) * config.num_attention_heads * config.head_dim**2 * 4


# -- the cache of an engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """How a byte budget is divided: slots of lightning states, pages of keys and values, states of cached prefixes.

    The tables that say whose page is which (4 bytes a page) are not counted.
    """

    cache_bytes: int  # the budget
    slot_bytes: int  # one sequence's lightning states, float32 at least
    num_slots: int  # sequences that run together
    page_bytes: int  # keys and values of page_size tokens, over all softmax layers
    num_pages: int
    checkpoint_bytes: int  # for states of cached prefixes, which have slot_bytes each
    max_model_len: int  # the longest sequence that fits, alone

    @property
    def used_bytes(self) -> int:
        """What the plan takes when it is full, at most `cache_bytes`."""
        return self.num_slots * self.slot_bytes + self.num_pages * self.page_bytes + self.checkpoint_bytes


def plan_memory(
    config: MiniMaxM1Config,
    cache_bytes: int,
    *,
    page_size: int,
    max_batch_size: int,
    max_model_len: int | None = None,
    checkpoint_bytes: int | None = None,
    dtype: str = "float32",
) -> MemoryPlan:
    """Divide `cache_bytes` between slots, pages and checkpoints.

    Slots get at most half of what checkpoints leave (but one there is), and no more than leaves a page for each and
    pages for a sequence of `max_model_len`. Pages get the rest, up to twice what so many sequences can use: as much
    again for cached prefixes.

    Args:
        page_size: tokens of a page.
        max_batch_size: most slots.
        max_model_len: tokens that one sequence must be able to have; None: no more than the config's, or what fits.
        checkpoint_bytes: None: a quarter of the budget, or what a single sequence leaves; 0 if that holds no state.
        dtype: of keys and values, one of `DTYPE_BITS`.

    Raises:
        UserError: not even one sequence fits; the message names the least budget.
    """
    page_bytes = page_size * kv_bytes_per_token(config, dtype)
    slot_bytes = lightning_state_bytes(config) * max(_bits(dtype), 32) // 32
    least_pages = 1 if max_model_len is None else -(-max_model_len // page_size)
    least = slot_bytes + least_pages * page_bytes
    if checkpoint_bytes is None:
        checkpoint_bytes = min(cache_bytes // 4, cache_bytes - least)
        checkpoint_bytes = checkpoint_bytes if checkpoint_bytes >= slot_bytes else 0
    left = cache_bytes - checkpoint_bytes
    if left < least:
        holds = f"a sequence of {least_pages * page_size:,} tokens"
        beside = f" beside checkpoint_bytes {checkpoint_bytes:,}" if checkpoint_bytes else ""
        accepted = f"at least {least + checkpoint_bytes:,}, which hold {holds}{beside}"
        raise UserError(f"cache_bytes: {cache_bytes:,} cannot be used; accepted: {accepted}")
    num_slots = max_batch_size
    if slot_bytes:
        num_slots = min(num_slots, max(1, left // 2 // slot_bytes), (left - least_pages * page_bytes) // slot_bytes)
    if page_bytes:
        num_slots = min(num_slots, left // (slot_bytes + page_bytes))
    longest = config.max_position_embeddings if max_model_len is None else max_model_len
    num_pages = 2 * num_slots * -(-longest // page_size)
    if page_bytes:
        num_pages = min(num_pages, (left - num_slots * slot_bytes) // page_bytes)
    return MemoryPlan(
        cache_bytes=cache_bytes,
        slot_bytes=slot_bytes,
        num_slots=num_slots,
        page_bytes=page_bytes,
        num_pages=num_pages,
        checkpoint_bytes=checkpoint_bytes,
        max_model_len=min(longest, num_pages * page_size),
    )


# -- floating-point operations ------------------------------------------------------------------------------------


def flops_per_token(config: MiniMaxM1Config, context_len: int, *, with_head: bool = True) -> int:
    """Return the forward FLOPs of one token that sees `context_len` tokens (itself included).

    MiniMax-M1: 94.64e9 + 327,680 x context_len.

    Args:
        context_len: tokens seen by the softmax layers; 0 gives the constant part alone.
        with_head: count the LM head; a prefill needs it for the last token only.
    """
    head = 2 * config.vocab_size * config.hidden_size if with_head else 0
    return _layers_flops(config) + head + _context_flops(config) * _visible(config, context_len)


def prefill_flops(config: MiniMaxM1Config, num_tokens: int, *, past_len: int = 0, num_logits: int = 1) -> int:
    """Return the forward FLOPs of `num_tokens` tokens after `past_len` cached ones.

    Args:
        num_logits: tokens whose logits are computed: 1 for a prompt, `num_tokens` in training.
    """
    head = 2 * config.vocab_size * config.hidden_size * num_logits
    seen = _visible_sum(config, past_len + num_tokens) - _visible_sum(config, past_len)
    return num_tokens * _layers_flops(config) + head + _context_flops(config) * seen


def generation_flops(config: MiniMaxM1Config, num_tokens: int, *, prompt_len: int = 0) -> int:
    """Return the forward FLOPs of generating `num_tokens` tokens one by one after a prompt, the prompt not counted.

    The i-th generated token is taken to see `prompt_len + i` tokens.
    """
    return prefill_flops(config, num_tokens, past_len=prompt_len, num_logits=num_tokens)


def flops_by_part(config: MiniMaxM1Config, num_tokens: int) -> dict[str, int]:
    """Return the forward FLOPs of a sequence of `num_tokens` tokens with all its logits, by part of the network.

    Keys: lightning_projections, lightning_state, softmax_projections, softmax_scores (the only one that grows faster
    than the sequence), router, experts, shared_expert, head. They sum to
    `prefill_flops(config, num_tokens, num_logits=num_tokens)`.
    """
    macs = {**_layers_macs(config), "head": config.vocab_size * config.hidden_size}
    parts = {name: 2 * count * num_tokens for name, count in macs.items()}
    return {**parts, "softmax_scores": _context_flops(config) * _visible_sum(config, num_tokens)}


def training_flops(config: MiniMaxM1Config, seqlens: list[int], *, recompute: bool = False) -> int:
    """Return the FLOPs of one forward and backward pass over packed sequences of these lengths.

    The backward pass costs twice the forward; `recompute` (activation checkpointing) adds one more forward.
    """
    forward = sum(prefill_flops(config, n, num_logits=n) for n in seqlens)
    return forward * (4 if recompute else 3)


# -- DeepSeek-R1 beside it ----------------------------------------------------------------------------------------

# How DeepSeek-R1's multi-head latent attention may be counted: the name, and what one more visible token costs a head
# in a layer, in multiply-accumulates. All else is the same in the three.
DEEPSEEK_ATTENTION = {
    # as its engines decode: queries and outputs in the latent space of 512, keys with 64 rotated dimensions more
    "latent": (512 + 64) + 512,
    # as written down and trained: keys of 128 + 64, values of 128 (free of charge: they were decompressed once)
    "decompressed": (128 + 64) + 128,
    # as if it were plain attention with 128 heads of 128, in the way of the other figures of M1's report
    "plain": 128 + 128,
}


def deepseek_r1_flops(num_tokens: int, *, attention: str = "decompressed", past_len: int = 0) -> int:
    """Return the forward FLOPs with which DeepSeek-R1 generates `num_tokens` tokens one by one after `past_len`.

    The convention is this module's: head counted, embedding not, 2 FLOPs a multiply-accumulate.

    Args:
        attention: one of `DEEPSEEK_ATTENTION`.
    Source: config.json of DeepSeek-R1, DeepSeek-V3 report (arXiv 2412.19437), DeepSeek-V2 report (arXiv 2405.04434)
    section 2.1 for the absorbed products.
    """
    hidden, layers, dense_layers, heads, vocab = 7168, 61, 3, 128, 129_280
    query = hidden * 1536 + 1536 * heads * (128 + 64)  # through its latent space
    key_value = hidden * (512 + 64) + 512 * heads * (128 + 128)  # the same count, absorbed or not
    mla = query + key_value + heads * 128 * hidden
    dense = 3 * hidden * 18_432
    sparse = 3 * hidden * 2048 * (8 + 1) + hidden * 256  # 8 of 256 experts, a shared one, the router
    constant = layers * mla + dense_layers * dense + (layers - dense_layers) * sparse + vocab * hidden
    seen = num_tokens * past_len + num_tokens * (num_tokens + 1) // 2
    return 2 * (num_tokens * constant + seen * layers * heads * DEEPSEEK_ATTENTION[attention])


def share_of_deepseek_r1(config: MiniMaxM1Config, num_tokens: int, *, attention: str, cumulative: bool) -> float:
    """Return the FLOPs of `config` over those of DeepSeek-R1 at `num_tokens` generated tokens.

    Args:
        attention: how DeepSeek-R1's is counted, one of `DEEPSEEK_ATTENTION`.
        cumulative: of all the tokens generated so far; otherwise of the last one alone.
    """
    past_len = 0 if cumulative else num_tokens - 1
    count = num_tokens - past_len
    ours = generation_flops(config, count, prompt_len=past_len)
    return ours / deepseek_r1_flops(count, attention=attention, past_len=past_len)


# -- quantized matrices -------------------------------------------------------------------------------------------


def _quantized_matrices(config: MiniMaxM1Config, quantization: QuantizationConfig) -> list[tuple[int, int, int]]:
    """Return (how many, outputs, inputs) of the matrices that are quantized."""
    assert config.head_dim is not None
    layers, hidden, width = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    num_experts = layers * config.num_local_experts
    matrices = [(2 * num_experts, width, hidden), (num_experts, hidden, width)]
    if quantization.modules == "experts":
        return matrices
    num_lightning, num_softmax = len(config.lightning_layers), len(config.softmax_layers)
    heads, kv, shared = (
        _heads_width(config),
        config.num_key_value_heads * config.head_dim,
        config.shared_intermediate_size,
    )
    attention = [(4 * num_lightning + num_softmax, heads, hidden), (2 * num_softmax, kv, hidden)]
    matrices += [*attention, (layers, hidden, heads)]
    return matrices + ([(2 * layers, shared, hidden), (layers, hidden, shared)] if shared > 0 else [])


def _quantized_bytes(size_out: int, size_in: int, quantization: QuantizationConfig) -> int:
    """Values and scales: float32 for each output, or bfloat16 for each group of inputs."""
    if quantization.group_size is None:
        return size_out * (size_in + 4)
    return size_out * (-(-size_in // 2) + 2 * -(-size_in // quantization.group_size))


# -- one layer ----------------------------------------------------------------------------------------------------


def _heads_width(config: MiniMaxM1Config) -> int:
    assert config.head_dim is not None
    return config.num_attention_heads * config.head_dim


def _lightning_projections(config: MiniMaxM1Config) -> int:
    return 5 * config.hidden_size * _heads_width(config)  # q, k, v, output gate, out


def _softmax_projections(config: MiniMaxM1Config) -> int:
    assert config.head_dim is not None
    kv_width = config.num_key_value_heads * config.head_dim
    return 2 * config.hidden_size * (_heads_width(config) + kv_width)  # q and o, k and v


def _router(config: MiniMaxM1Config) -> int:
    return config.hidden_size * config.num_local_experts


def _expert(config: MiniMaxM1Config) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def _shared_expert(config: MiniMaxM1Config) -> int:
    """The shared MLP and its coefficient."""
    width = config.shared_intermediate_size
    return 3 * config.hidden_size * width + config.hidden_size if width > 0 else 0


def _layers_flops(config: MiniMaxM1Config) -> int:
    """Forward FLOPs of one token in all layers, without those that grow with the context."""
    return 2 * sum(_layers_macs(config).values())


def _layers_macs(config: MiniMaxM1Config) -> dict[str, int]:
    """Multiply-accumulates of one token in all layers by part, without those that grow with the context."""
    assert config.head_dim is not None
    layers, num_lightning = config.num_hidden_layers, len(config.lightning_layers)
    return {
        "lightning_projections": num_lightning * _lightning_projections(config),
        "lightning_state": num_lightning * 2 * config.num_attention_heads * config.head_dim**2,  # k^T v in, q out
        "softmax_projections": len(config.softmax_layers) * _softmax_projections(config),
        "router": layers * _router(config),
        "experts": layers * config.num_experts_per_tok * _expert(config),
        "shared_expert": layers * _shared_expert(config),
    }


def _context_flops(config: MiniMaxM1Config) -> int:
    """Forward FLOPs that one more visible token costs: q k^T and p v in every softmax layer."""
    return len(config.softmax_layers) * 4 * _heads_width(config)


def _visible(config: MiniMaxM1Config, context_len: int) -> int:
    return context_len if config.sliding_window is None else min(context_len, config.sliding_window)


def _visible_sum(config: MiniMaxM1Config, num_tokens: int) -> int:
    """Visible tokens summed over the first `num_tokens` tokens of a sequence."""
    growing = _visible(config, num_tokens)
    return growing * (growing + 1) // 2 + (num_tokens - growing) * growing


def _bits(dtype: str) -> int:
    if dtype not in DTYPE_BITS:
        raise UserError(f"dtype: {dtype!r} is not known; choose one of {', '.join(DTYPE_BITS)}")
    return DTYPE_BITS[dtype]
