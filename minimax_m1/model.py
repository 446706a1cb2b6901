"""The MiniMax-M1 network: one forward pass on packed tokens, for training and inference alike.

Shapes: T tokens of all sequences end to end (a `ForwardBatch` says which rows are whose), hidden = hidden_size, H query
heads, G key/value heads, D head_dim, E experts, I an expert's width. Module names are the checkpoint's tensor names.
float32 whatever the model's dtype: LM head, router, lightning state, softmax, RMSNorm statistics, rotary angles.
Source: MiniMax-M1's modelling code and report (arXiv 2506.13585), MiniMax-01's report (arXiv 2501.08313).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from minimax_m1.batch import ForwardBatch
from minimax_m1.cache import HybridCache
from minimax_m1.config import SOFTMAX, MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.kernels import blocks
from minimax_m1.kernels.attention import softmax_attention, softmax_attention_cached
from minimax_m1.kernels.context import lightning_attention_divided, softmax_attention_divided
from minimax_m1.kernels.cross_entropy import linear_cross_entropy, linear_logprobs, rounded
from minimax_m1.kernels.exchange import expert_mlp_exchanged
from minimax_m1.kernels.experts import count_choices, expert_mlp, route
from minimax_m1.kernels.lightning import (
    lightning_attention,
    lightning_decode,
    lightning_prefill,
    lightning_slopes,
)
from minimax_m1.kernels.linear import add_rms_norm, add_scaled, float32_linear, linear, rms_norm, silu
from minimax_m1.kernels.rotary import rotate, rotate_append


class Routing(NamedTuple):
    """What the router of one layer decided for T tokens."""

    probs: Tensor  # [T, E] float32: over all experts
    expert_ids: Tensor  # [T, K] int64: the chosen, most probable first
    expert_weights: Tensor  # [T, K] float32: of the chosen, summing to 1


class Rotary(NamedTuple):
    """Cosine and sine of the angles of T tokens, each [T, 1, rotary_dim / 2] float32."""

    cos: Tensor
    sin: Tensor


@dataclass
class CausalLMOutput:
    """What the public forward returns; fields that were not asked for are None."""

    logits: Tensor  # [B, L or logits_to_keep, vocab] float32; 0 at padding
    loss: Tensor | None = None  # scalar float32: cross-entropy + router_aux_loss_coef · aux_loss
    aux_loss: Tensor | None = None  # scalar float32: load balancing, in training or with labels


class MiniMaxM1ForCausalLM(nn.Module):
    """MiniMax-M1 with its language-model head."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.config = config
        self.model = MiniMaxM1Model(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    # -- the one forward pass -------------------------------------------------------------------------------------

    def forward_packed(
        self, input_ids: Tensor, batch: ForwardBatch, cache: HybridCache | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Run the network on packed tokens.

        Args:
            input_ids: [T] int64.
            batch: whose rows are whose; made by `cache.batch` where there is a cache.
            cache: read, and extended by this batch's tokens; None: every sequence starts here. Not differentiable.

        Returns:
            hidden [T, hidden] after the final norm, and each layer's routing.
        """
        with torch.cuda.device_of(input_ids):  # Triton launches on the current GPU; on a CPU this does nothing
            return self.model(input_ids, batch, cache)

    def compute_logits(self, hidden: Tensor, backend: str | None = None, num_decodes: int | None = None) -> Tensor:
        """Return the logits [n, vocab] of hidden [n, hidden], computed in float32 (float64 for a float64 model).

        `num_decodes` as in `kernels.linear.linear`: the first so many rows go through the row kernels.
        """
        with torch.cuda.device_of(hidden):
            return self.lm_head.logits(hidden, backend, num_decodes)

    # -- the public wrapper: the only place with a batch dimension and padding ----------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        backend: str | None = None,
    ) -> CausalLMOutput:
        """Run a padded batch; every row gets exactly its own result, whatever the padding and its side.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L], 1 for tokens, 0 for padding, tokens of a row without a gap; None: no padding.
            labels: [B, L] int64, usually `input_ids`, shifted here; -100 and padding are ignored. Adds `loss`.
            logits_to_keep: only the last so many columns of logits; 0: all.
            backend: kernels to run with, one of `kernels.BACKENDS`; None: the fastest.

        Raises:
            UserError: shapes that do not fit, ids out of the vocabulary, a mask with a gap inside a row.
        """
        mask = check_inputs(input_ids, attention_mask, self.config.vocab_size)
        batch = ForwardBatch.packed(mask.sum(1).tolist(), device=input_ids.device, backend=backend)
        hidden, routings = self.forward_packed(input_ids[mask], batch)

        rows, columns = mask.nonzero(as_tuple=True)
        kept = columns >= input_ids.shape[1] - logits_to_keep if logits_to_keep else torch.ones_like(columns).bool()
        width = min(logits_to_keep, input_ids.shape[1]) if logits_to_keep else input_ids.shape[1]
        token_logits = self.compute_logits(hidden[kept], backend)
        logits = token_logits.new_zeros(input_ids.shape[0], width, self.config.vocab_size)
        logits[rows[kept], columns[kept] - (input_ids.shape[1] - width)] = token_logits
        output = CausalLMOutput(logits)
        if labels is not None or self.training:
            output.aux_loss = load_balancing_loss(routings)
        if labels is not None:
            assert output.aux_loss is not None
            if logits_to_keep:
                raise UserError(f"logits_to_keep: {logits_to_keep} with labels; the loss needs every logit: use 0")
            targets = labels[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
            cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
            output.loss = cross_entropy + self.config.router_aux_loss_coef * output.aux_loss
        return output

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return prompt + new tokens; see `minimax_m1.generation.generate` for the options."""
        from minimax_m1.generation import generate

        return generate(self, input_ids, attention_mask, **options)

    # -- weights ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
        quantization: str | None = None,
    ) -> MiniMaxM1ForCausalLM:
        """Load a checkpoint folder; see `minimax_m1.weights.load_model`."""
        from minimax_m1.weights import load_model

        return load_model(folder, dtype=dtype, device=device, progress=progress, quantization=quantization)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write config.json and safetensors; see `minimax_m1.weights.save_model`."""
        from minimax_m1.weights import save_model

        save_model(self, folder, **options)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise for training: matrices normal with `initializer_range`, norms 1, gate temperatures 0.

        The same seed gives the same weights on any device, and on any number of ranks.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, DynamicGate):
                module.temperature.fill_(0.0)
            for name, weight in module.named_parameters(recurse=False):
                if name in ("weight", "w13", "w2") and weight.dim() >= 2:
                    noise = torch.empty(weight.shape, dtype=torch.float32)
                    noise.normal_(0.0, self.config.initializer_range, generator=generator)
                    weight.copy_(noise if type(weight.data) is Tensor else _divided_like(weight, noise))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.lm_head.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations, keys and values: that of the parameters, but at least float32 on a CPU."""
        return compute_dtype(self.lm_head.weight)


class MiniMaxM1Model(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False  # training: keep only each layer's input, recompute the rest

    def forward(
        self, input_ids: Tensor, batch: ForwardBatch, cache: HybridCache | None
    ) -> tuple[Tensor, list[Routing]]:
        x = self.embed_tokens(input_ids)
        x = x.to(compute_dtype(x))
        rotary = rotary_angles(batch.positions, self.config)
        routings = []
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(layer, x, batch, rotary, cache, use_reentrant=False)
            else:
                x, routing = layer(x, batch, rotary, cache)
            routings.append(routing)
        if cache is not None:
            cache.commit(batch)
        return self.norm(x, batch.backend), routings


class DecoderLayer(nn.Module):
    """Attention of one of the two kinds, then the experts; residuals scaled by alpha, branches by beta."""

    def __init__(self, config: MiniMaxM1Config, index: int) -> None:
        super().__init__()
        assert config.attn_type_list is not None
        attention = SoftmaxAttention if config.attn_type_list[index] == SOFTMAX else LightningAttention
        self.self_attn = attention(config, index)
        self.block_sparse_moe = MoE(config)
        self.shared_mlp, self.coefficient = None, None
        if config.shared_intermediate_size > 0:
            self.shared_mlp = SharedMLP(config)
            self.coefficient = Float32Linear(config.hidden_size, 1)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.postnorm = config.postnorm
        self.attn_alpha, self.attn_beta = config.attention_scales(index)
        self.mlp_alpha, self.mlp_beta = config.layernorm_mlp_alpha, config.layernorm_mlp_beta

    def forward(
        self, x: Tensor, batch: ForwardBatch, rotary: Rotary, cache: HybridCache | None
    ) -> tuple[Tensor, Routing]:  # x [T, hidden]
        u = self.input_layernorm(x, batch.backend)
        a = self.self_attn(u, batch, rotary, cache)
        if self.postnorm:
            h = v = self.post_attention_layernorm.of_sum(u, self.attn_alpha, a, self.attn_beta, batch.backend)
        else:
            h = add_scaled(x, self.attn_alpha, a, self.attn_beta)
            v = self.post_attention_layernorm(h, batch.backend)
        y, routing = self.block_sparse_moe(v, batch)
        if self.shared_mlp is not None and self.coefficient is not None:
            c = torch.sigmoid(self.coefficient(v, batch)).to(y.dtype)
            y = (1 - c) * y + c * self.shared_mlp(v, batch)
        return add_scaled(h, self.mlp_alpha, y, self.mlp_beta), routing


class LightningAttention(nn.Module):
    """Linear attention with decay: state of constant size, no positions, no softmax."""

    def __init__(self, config: MiniMaxM1Config, index: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.index, self.num_heads, self.head_dim = index, config.num_attention_heads, config.head_dim
        inner = self.num_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, 3 * inner)
        self.output_gate = Linear(config.hidden_size, inner)
        self.out_proj = Linear(inner, config.hidden_size)
        self.norm = RMSNorm(inner, 1e-6)  # M1's code fixes this one, whatever rms_norm_eps says
        self.num_layers = config.num_hidden_layers
        self._slope: Tensor | None = None

    def slope(self, device: torch.device) -> Tensor:
        """Return the decay slopes [H] float32; not a buffer, so that a model made on the meta device needs no care."""
        if self._slope is None or self._slope.device != device:
            with torch.inference_mode(False), torch.device(device):  # kept: it must serve training as well
                self._slope = lightning_slopes(self.num_heads, self.index, self.num_layers)
        return self._slope

    def forward(self, u: Tensor, batch: ForwardBatch, rotary: Rotary, cache: HybridCache | None) -> Tensor:
        if cache is not None and batch.only_decodes and is_plain(self.qkv_proj, self.output_gate, self.out_proj):
            weights = self.qkv_proj.weight, self.output_gate.weight, self.out_proj.weight, self.norm.weight
            if blocks.usable(u, weights, batch.backend):  # the same in one call
                assert batch.cached is not None
                state = self.slope(u.device), cache.states[self.index], batch.cached.slot_ids, batch.cu_seqlens
                return blocks.lightning_block(u, *weights, self.norm.eps, *state)
        qkv = silu(self.qkv_proj(u, batch), batch.backend).view(-1, self.num_heads, 3 * self.head_dim)
        q, k, v = qkv.chunk(3, dim=-1)
        o = self.attend(q, k, v, batch, cache)
        return self.out_proj(self.norm(o.flatten(1), batch.backend, gate=self.output_gate(u, batch)), batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: ForwardBatch, cache: HybridCache | None) -> Tensor:
        """Return o [T, H, D]: decoding sequences by the recurrence, all others in blocks."""
        slope = self.slope(q.device)
        if batch.context is not None:
            bounds, context = batch.cu_seqlens, batch.context
            return lightning_attention_divided(
                q, k, v, slope, cu_seqlens=bounds, context=context, backend=batch.backend
            )
        if cache is None:
            return lightning_attention(q, k, v, slope, cu_seqlens=batch.cu_seqlens, backend=batch.backend)[0]
        assert batch.cached is not None
        states, slots = cache.states[self.index], batch.cached.slot_ids
        m, rows = batch.cached.num_decodes, batch.cached.num_decode_rows
        if batch.cached.drafts is not None:
            batch.cached.drafts[self.index] = k[:rows], v[:rows]
        outputs = []
        if m:
            bounds = batch.cu_seqlens[: m + 1]
            o = lightning_decode(q[:rows], k[:rows], v[:rows], slope, states, slots[:m], bounds, batch.backend)
            outputs.append(o)
        if m < len(batch.seqlens):
            bounds = batch.cu_seqlens[m:] - rows
            o = lightning_prefill(q[rows:], k[rows:], v[rows:], slope, states, slots[m:], bounds, batch.backend)
            outputs.append(o)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class SoftmaxAttention(nn.Module):
    """Grouped-query attention with rotary embedding on the first rotary_dim dimensions of each head."""

    def __init__(self, config: MiniMaxM1Config, index: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.index, self.head_dim, self.window = index, config.head_dim, config.sliding_window
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, u: Tensor, batch: ForwardBatch, rotary: Rotary, cache: HybridCache | None) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(u, batch).unflatten(1, (-1, self.head_dim)) for proj in projections)
        if batch.context is not None:
            q, k = (rotate(x, *rotary, batch.backend) for x in (q, k))
            o = softmax_attention_divided(q, k, v, context=batch.context, window=self.window, backend=batch.backend)
        elif cache is None:
            q, k = (rotate(x, *rotary, batch.backend) for x in (q, k))
            o = softmax_attention(
                q,
                k,
                v,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=max(batch.seqlens, default=0),
                window=self.window,
                backend=batch.backend,
            )
        else:
            assert batch.cached is not None
            keys, values = cache.keys[self.index], cache.values[self.index]
            q = rotate_append(q, k, v, *rotary, keys, values, batch.cached.token_rows, batch.backend)
            o = softmax_attention_cached(
                q,
                keys,
                values,
                cu_seqlens=batch.cu_seqlens,
                kv_lens=batch.cached.kv_lens,
                slots=batch.cached.slot_ids,
                block_tables=cache.block_tables,
                num_decodes=batch.cached.num_decodes,
                num_decode_rows=batch.cached.num_decode_rows,
                window=self.window,
                backend=batch.backend,
            )
        return self.o_proj(o.flatten(1), batch)


class MoE(nn.Module):
    """Router and experts: every token through its top-k, none dropped."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        gate = DynamicGate if config.dynamic_gate else Gate
        self.gate = gate(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)

    def forward(self, v: Tensor, batch: ForwardBatch) -> tuple[Tensor, Routing]:  # v [T, hidden]
        is_fusable = type(self.gate) is Gate and is_plain(self.experts)
        if batch.only_decodes and batch.expert_threshold is None and is_fusable:
            matrices = self.gate.weight, self.experts.w13, self.experts.w2
            if blocks.usable(v, matrices, batch.backend):  # the same in one call
                y, *routing = blocks.moe_block(v, *matrices, self.top_k)
                return y, Routing(*routing)
        probs, expert_ids, weights = route(self.gate(v, batch), self.top_k, batch.backend)
        if batch.expert_threshold is not None:
            weights = drop_experts(weights, batch.expert_threshold)
        return self.experts(v, expert_ids, weights, batch), Routing(probs, expert_ids, weights)


class Experts(nn.Module):
    """The experts' matrices, stacked: w13 [E, 2 I, hidden], gate rows above up rows, and w2 [E, hidden, I].

    The checkpoint's names (E.w1 gate, E.w3 up, E.w2 down) are views of them, made and taken apart by the two hooks.
    """

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        num_experts, width, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.group: ProcessGroup | None = None  # expert parallelism: the ranks that have a share of the experts each
        self.register_state_dict_post_hook(_split_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)

    def forward(self, v: Tensor, expert_ids: Tensor, expert_weights: Tensor, batch: ForwardBatch) -> Tensor:
        w13, w2, rows = self.w13, self.w2, batch.num_decode_rows
        if self.group is not None:
            own: Any = (w13, w2)  # DTensors, divided by expert
            w13, w2 = (w.to_local() for w in own)
            return expert_mlp_exchanged(v, w13, w2, expert_ids, expert_weights, self.group, batch.backend)
        return expert_mlp(v, w13, w2, expert_ids, expert_weights, backend=batch.backend, num_decodes=rows)


class SharedMLP(nn.Module):
    """The expert that every token uses."""

    def __init__(self, config: MiniMaxM1Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.shared_intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.shared_intermediate_size)
        self.down_proj = Linear(config.shared_intermediate_size, config.hidden_size)

    def forward(self, v: Tensor, batch: ForwardBatch) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(v, batch)) * self.up_proj(v, batch), batch)


class Embedding(nn.Embedding):
    """Token embedding that is left uninitialised: weights are loaded, or made by `init_weights`."""

    weight: nn.Parameter

    def reset_parameters(self) -> None:
        pass


class Linear(nn.Linear):
    """A matrix without bias, [out, in], left uninitialised; results in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:  # type: ignore[override]
        return linear(x, self.weight, batch.backend, batch.num_decode_rows)


class Float32Linear(Linear):
    """A matrix whose product is taken, and returned, in float32 whatever the model's dtype."""

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:  # type: ignore[override]
        return float32_linear(x, self.weight, batch.backend, batch.num_decode_rows)


class LMHead(Float32Linear):
    """The language-model head; logits [T, vocab].

    `product_dtype` is float32; bfloat16 is for the experiment that shows why (`kernels.cross_entropy` says how).
    """

    product_dtype: torch.dtype = torch.float32

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:  # type: ignore[override]
        return self.logits(x, batch.backend, batch.num_decode_rows)

    def logits(self, hidden: Tensor, backend: str | None = None, num_decodes: int | None = None) -> Tensor:
        """Return `MiniMaxM1ForCausalLM.compute_logits` of these tokens."""
        x, weight = rounded(hidden, self.product_dtype), rounded(self.weight, self.product_dtype)
        return rounded(float32_linear(x, weight, backend, num_decodes), self.product_dtype)

    def token_losses(
        self, hidden: Tensor, targets: Tensor, z_loss: float = 0.0, backend: str | None = None
    ) -> tuple[Tensor, ...]:
        """Return `kernels.cross_entropy.linear_cross_entropy` of these tokens."""
        return linear_cross_entropy(
            hidden, self.weight, targets, z_loss, product_dtype=self.product_dtype, backend=backend
        )

    def token_logprobs(self, hidden: Tensor, targets: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """Return `kernels.cross_entropy.linear_logprobs` of these tokens."""
        return linear_logprobs(hidden, self.weight, targets, product_dtype=self.product_dtype, backend=backend)


class Gate(Float32Linear):
    """The router's matrix; logits [T, E]."""


class DynamicGate(Gate):
    """A router that learns how sharply to choose: logits / exp(temperature); at 0 it is the plain router."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.temperature = nn.Parameter(torch.empty(()))

    def forward(self, v: Tensor, batch: ForwardBatch) -> Tensor:  # type: ignore[override]
        logits = super().forward(v, batch)
        return logits / torch.exp(self.temperature.to(logits.dtype))


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) in float32, cast back, times weight; with a gate, times its sigmoid."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, backend: str | None = None, gate: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, backend, gate)

    def of_sum(self, residual: Tensor, alpha: float, branch: Tensor, beta: float, backend: str | None) -> Tensor:
        """Return the norm of alpha · residual + beta · branch."""
        return add_rms_norm(residual, alpha, branch, beta, self.weight, self.eps, backend)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that a network with weights like this computes in (why: docs/decisions.md)."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype


def is_plain(*modules: nn.Module) -> bool:
    """Say whether these modules are our own, so that their weights are all there is to them; LoRA's are not."""
    return all(type(module).__module__.startswith("minimax_m1.") for module in modules)


def _divided_like(weight: Any, whole: Tensor) -> Tensor:
    """Return this rank's part of a tensor, as a weight that is a DTensor is divided."""
    from torch.distributed.tensor import distribute_tensor  # takes a second, and only sharded training needs it

    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def drop_experts(weights: Tensor, threshold: Tensor) -> Tensor:
    """Keep each token's most probable experts until their weights reach its threshold; the others weigh 0.

    weights [T, K] float32, falling, summing to 1; threshold [T] in (0, 1]. What is kept sums to 1 again, as the experts
    were trained; at 1 every expert is kept and nothing changes.
    """
    before = weights.cumsum(-1) - weights
    is_kept = (before < threshold[:, None]) | (threshold[:, None] >= 1)
    is_kept[:, 0] = True  # also where a tiny threshold has become 0 in float32
    kept = weights * is_kept
    return torch.where(threshold[:, None] >= 1, weights, kept / kept.sum(-1, keepdim=True))


def rotary_angles(positions: Tensor, config: MiniMaxM1Config) -> Rotary:
    """Return the rotary angles of tokens at `positions` [T]: place / theta^(2 i / rotary_dim), in float32."""
    assert config.rotary_dim is not None
    exponent = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32) / config.rotary_dim
    angles = positions.float()[:, None, None] / config.rope_theta**exponent
    return Rotary(angles.cos(), angles.sin())


def load_balancing_loss(routings: list[Routing]) -> Tensor:
    """Return the auxiliary loss of all layers' routings, a float32 scalar; 1 · K at perfect balance.

    E · sum over experts of (mean fraction of tokens routed to it) · (its mean probability), over tokens of all layers.
    Source: Switch Transformer (arXiv 2101.03961) eq. 4, as in Mixtral's code.
    """
    probs = torch.cat([r.probs for r in routings])
    num_experts = probs.shape[-1]
    ids = torch.cat([r.expert_ids for r in routings])
    fraction = count_choices(ids, num_experts).to(probs.dtype) / ids.shape[0]
    return num_experts * (fraction * probs.mean(0)).sum()


def _split_experts(experts: Experts, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """state_dict hook: replace the stacked parameters by views under the checkpoint's names."""
    w13, w2 = state.pop(prefix + "w13"), state.pop(prefix + "w2")
    for e in range(w13.shape[0]):
        w1, w3 = w13[e].chunk(2)
        state[f"{prefix}{e}.w1.weight"], state[f"{prefix}{e}.w2.weight"] = w1, w2[e]
        state[f"{prefix}{e}.w3.weight"] = w3


def _stack_experts(experts: Experts, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """load_state_dict hook: stack what the checkpoint has; a missing expert is left to be reported."""
    names = [[f"{prefix}{e}.{w}.weight" for e in range(experts.w13.shape[0])] for w in ("w1", "w3", "w2")]
    if all(name in state for row in names for name in row):
        w1, w3, w2 = (torch.stack([state.pop(name) for name in row]) for row in names)
        state[prefix + "w13"], state[prefix + "w2"] = torch.cat((w1, w3), dim=1), w2


def check_inputs(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """Return the mask [B, L] bool of what are tokens; UserError for what cannot be run."""
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
        shape = f"{list(input_ids.shape)} {input_ids.dtype}"
        raise UserError(f"input_ids: {shape} cannot be used; accepted: [batch, tokens] int64, at least one token")
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            shapes = f"{list(attention_mask.shape)} beside input_ids {list(input_ids.shape)}"
            raise UserError(f"attention_mask: {shapes}; accepted: the same shape")
        mask = attention_mask.bool()
        edges = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
        if bool((edges != 1).any()):
            row = int((edges != 1).nonzero()[0])
            raise UserError(f"attention_mask: row {row} has a gap or no token; accepted: one run of 1s in each row")
    ids = input_ids[mask]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"input_ids: {low if low < 0 else high} is out of range; accepted: 0 to {vocab_size - 1}")
    return mask
