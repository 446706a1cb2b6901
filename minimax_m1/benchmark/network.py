"""The network beside Transformers' port of it: same weights, same function, in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from minimax_m1.accounting import prefill_flops
from minimax_m1.benchmark.measure import Figure, Machine, median_seconds, peak_memory
from minimax_m1.cache import HybridCache
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.generation import PREFILL_CHUNK
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.quantization import quantized_matrices

CASES = ("prefill-8k", "prefill-32k", "decode-1", "decode-8", "decode-context", "bfloat16", "memory-128k")


def run(
    size: str, model: MiniMaxM1ForCausalLM, twin: Any, machine: Machine, cases: Collection[str], *, quick: bool
) -> Iterator[Figure]:
    """Yield the figures of one preset; `twin` None: without a peer."""
    rounds = 1 if quick else 3
    for case, length in (("prefill-8k", 8192), ("prefill-32k", 32_768)):
        if case in cases:
            length = length // 16 if quick else length
            yield _prefill(f"{size} {case}", model, twin, length, machine, rounds if length < 30_000 else 1)
    for case, batch_size in (("decode-1", 1), ("decode-8", 8)):
        if case in cases:
            yield _decode(f"{size} {case}", model, twin, batch_size, rounds, machine)
    if "decode-context" in cases:
        far = 2048 if quick else 32_768
        near, long = (DecodeOurs(model, 1, n).run(24) for n in (1024, far))
        yield Figure(f"{size} decode, 1k / {far // 1024}k context", "cost x", near / long)
    if "bfloat16" in cases:
        yield from _bfloat16(size, model, rounds)
    if "memory-128k" in cases and size == "small":
        length = 8192 if quick else 131_072
        yield Figure(f"{size} prefill {length // 1024}k peak memory", "GB", _peak_memory(size, length) / 1e9)


# -- the cases ------------------------------------------------------------------------------------------------------


def _prefill(name: str, model: MiniMaxM1ForCausalLM, twin: Any, length: int, machine: Machine, rounds: int) -> Figure:
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    seconds = [median_seconds(rounds, [lambda: prefill_ours(model, ids[0]), lambda: _prefill_peer(twin, ids)], twin)][0]
    ceiling = length * machine.gemm_flops / prefill_flops(model.config, length)
    return Figure(name, "tok/s", length / seconds[0], twin and length / seconds[1], ceiling)


@torch.inference_mode()
def prefill_ours(model: MiniMaxM1ForCausalLM, ids: Tensor) -> Tensor:
    """Prefill one prompt in chunks, as `generate` does; return the last token's logits [1, vocab]."""
    cache = HybridCache(model.config, 1, len(ids), model.compute_dtype)
    hidden = torch.empty(0)
    for chunk in ids.split(PREFILL_CHUNK):
        hidden, _ = model.forward_packed(chunk, cache.batch([0], [len(chunk)]), cache)
    return model.compute_logits(hidden[-1:])


@torch.inference_mode()
def _prefill_peer(twin: Any, ids: Tensor) -> Tensor:
    return twin(ids, use_cache=True, logits_to_keep=1).logits[0]


class DecodeOurs:
    """Greedy decoding of a batch behind `context` tokens; `run` continues where it stopped."""

    @torch.inference_mode()
    def __init__(self, model: MiniMaxM1ForCausalLM, batch_size: int, context: int) -> None:
        self.model, self.slots = model, list(range(batch_size))
        self.cache = HybridCache(model.config, batch_size, context + 1024, model.compute_dtype)
        for slot in self.slots:
            for chunk in torch.randint(0, model.config.vocab_size, (context,)).split(PREFILL_CHUNK):
                model.forward_packed(chunk, self.cache.batch([slot], [len(chunk)]), self.cache)
        self.ids = torch.randint(0, model.config.vocab_size, (batch_size,))
        self.run(4)

    @torch.inference_mode()
    def run(self, steps: int) -> float:
        """Decode; return tokens per second of the whole batch."""
        start = time.perf_counter()
        for _ in range(steps):
            batch = self.cache.batch(self.slots, [1] * len(self.slots))
            hidden, _ = self.model.forward_packed(self.ids, batch, self.cache)
            self.ids = self.model.compute_logits(hidden).argmax(-1)
        return steps * len(self.slots) / (time.perf_counter() - start)


class DecodePeer:
    """The same with Transformers. Positions are given, because the port counts them from a layer without keys."""

    @torch.inference_mode()
    def __init__(self, twin: Any, batch_size: int, context: int) -> None:
        ids = torch.randint(0, twin.config.vocab_size, (batch_size, context))
        output = twin(ids, use_cache=True, logits_to_keep=1)
        self.twin, self.past, self.length = twin, output.past_key_values, context
        self.ids = output.logits[:, -1].argmax(-1, keepdim=True)
        self.run(4)

    @torch.inference_mode()
    def run(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            positions = torch.full_like(self.ids, self.length)
            output = self.twin(self.ids, past_key_values=self.past, position_ids=positions, use_cache=True)
            self.past, self.length = output.past_key_values, self.length + 1
            self.ids = output.logits[:, -1].argmax(-1, keepdim=True)
        return steps * len(self.ids) / (time.perf_counter() - start)


def _decode(
    name: str, model: MiniMaxM1ForCausalLM, twin: Any, batch_size: int, rounds: int, machine: Machine
) -> Figure:
    ours = DecodeOurs(model, batch_size, 512)
    theirs = DecodePeer(twin, batch_size, 512) if twin is not None else None
    speeds = [(ours.run(24), theirs.run(12) if theirs else None) for _ in range(rounds + 2)]
    peer = statistics.median(s for _, s in speeds if s is not None) if theirs else None
    ceiling = batch_size * machine.read_bytes / bytes_per_step(model, batch_size)
    return Figure(name, "tok/s", statistics.median(s for s, _ in speeds), peer, ceiling)


def bytes_per_step(model: MiniMaxM1ForCausalLM, batch_size: int) -> float:
    """Return the bytes of weights that a decode step must read, experts as many as random routing would touch."""
    config = model.config
    touched = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** batch_size
    sizes = {name: p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name}
    sizes |= {name: w.tiles.nbytes + w.scales.nbytes for name, w in quantized_matrices(model).items()}
    return sum(size * (touched if ".experts." in name else 1) for name, size in sizes.items())


def _bfloat16(size: str, model: MiniMaxM1ForCausalLM, rounds: int) -> Iterator[Figure]:
    """Yield how fast the same model is with bfloat16 weights; the peer is itself in float32."""
    narrow = MiniMaxM1ForCausalLM(model.config).to(torch.bfloat16).eval()
    narrow.load_state_dict(model.state_dict())
    ids = torch.randint(0, model.config.vocab_size, (4096,))
    seconds = median_seconds(rounds, [lambda: prefill_ours(narrow, ids), lambda: prefill_ours(model, ids)], True)
    yield Figure(f"{size} bfloat16 prefill-4k", "tok/s", len(ids) / seconds[0], len(ids) / seconds[1])
    for batch_size in (1, 8):
        decoders = DecodeOurs(narrow, batch_size, 512), DecodeOurs(model, batch_size, 512)
        speeds = [[decoder.run(24) for decoder in decoders] for _ in range(rounds + 2)]
        ours, peer = (statistics.median(s) for s in zip(*speeds, strict=True))
        yield Figure(f"{size} bfloat16 decode-{batch_size}", "tok/s", ours, peer)


def _peak_memory(size: str, length: int) -> int:
    """Return the peak resident bytes of a process that prefills `length` tokens."""
    code = f"from minimax_m1.benchmark.network import prefill_alone; prefill_alone({size!r}, {length})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@torch.inference_mode()
def prefill_alone(size: str, length: int) -> None:
    """Prefill `length` random tokens with a random model of preset `size`; print the process's peak memory in bytes."""
    with torch.device("meta"):
        model = MiniMaxM1ForCausalLM(MiniMaxM1Config.preset(size))
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    assert prefill_ours(model, torch.randint(0, model.config.vocab_size, (length,))).isfinite().all()
    print(peak_memory())


# -- the peer ---------------------------------------------------------------------------------------------------------


def transformers_twin(model: MiniMaxM1ForCausalLM) -> Any:
    """Return Transformers' MiniMaxForCausalLM with the weights of `model` (copied), in eval mode.

    They agree only where rotary_dim is the head's size, the residual is the normed one and there is no shared expert.
    """
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    c = model.config
    assert c.rotary_dim == c.head_dim and c.postnorm and c.shared_intermediate_size == 0 and c.attn_type_list
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
    same += ["num_key_value_heads", "num_experts_per_tok", "num_local_experts", "rms_norm_eps", "router_aux_loss_coef"]
    config = MiniMaxConfig(
        **{name: getattr(c, name) for name in same},
        max_position_embeddings=c.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        layer_types=["full_attention" if kind else "linear_attention" for kind in c.attn_type_list],
        full_attn_alpha_factor=c.layernorm_full_attention_alpha,
        full_attn_beta_factor=c.layernorm_full_attention_beta,
        linear_attn_alpha_factor=c.layernorm_linear_attention_alpha,
        linear_attn_beta_factor=c.layernorm_linear_attention_beta,
        mlp_alpha_factor=c.layernorm_mlp_alpha,
        mlp_beta_factor=c.layernorm_mlp_beta,
        bos_token_id=None,
        eos_token_id=None,
    )
    twin = MiniMaxForCausalLM(config)
    renamed = {".mlp.": ".block_sparse_moe.", ".gate_up_proj": ".w13", ".down_proj": ".w2"}
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            for theirs, mine in renamed.items():
                name = name.replace(theirs, mine)
            parameter.copy_(ours[name])
    return twin.eval()


@torch.inference_mode()
def check_same(model: MiniMaxM1ForCausalLM, twin: Any) -> None:
    """Stop if the two do not compute the same: their speeds would mean nothing."""
    ids = torch.randint(0, model.config.vocab_size, (1, 300))
    ours, theirs = model(ids).logits, twin(ids).logits
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < 1e-3, f"our logits and Transformers' differ by {error:.1e}"
