"""Weights in 8 or 4 bits: rounding them, and the modules that hold them in a network.

A quantized matrix has two tensors in a checkpoint, beside each other under the official name of its float one:

    NAME.weight        int8 [N, K], or uint8 [N, ceil(K / 2)]: byte j holds columns 2 j (low half) and 2 j + 1, each + 8
    NAME.weight_scale  float32 [N, 1] (8 bits) or bfloat16 [N, groups] (4 bits)

weight[n, k] = value[n, k] * scale[n, k // group_size]. Groups are counted from column 0; the last may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minimax_m1.batch import ForwardBatch
from minimax_m1.config import QuantizationConfig
from minimax_m1.errors import UserError
from minimax_m1.kernels.experts import expert_mlp
from minimax_m1.kernels.linear import linear
from minimax_m1.kernels.quantized import SCALE_DTYPES, QuantizedWeight
from minimax_m1.model import Experts, Linear, MiniMaxM1ForCausalLM

ROUNDED_AT_ONCE = 1 << 17  # weights that are rounded at a time, so that the search stays in the processor's cache
ROUNDED_AT_ONCE_ON_GPU = 1 << 26  # launches are dear there, memory is not: it takes some 2 GB
# What a 4-bit group's weight of the largest magnitude is tried as, before the scale is fitted to all of the group.
# Twelve targets gain 0.4% of the error and take three times as long.
_TARGETS = (-8.6, -8.0, -7.4, 7.3)


# -- rounding -----------------------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor, quantization: QuantizationConfig, name: str = "weight") -> QuantizedWeight:
    """Return a float weight [N, K] in fewer bits; the same weight always gives the same bits.

    Raises:
        UserError: a value is not finite; the message says `name`.
    """
    group_size, size_in = quantization.group_size, weight.shape[1]
    step = max(1, (ROUNDED_AT_ONCE_ON_GPU if weight.is_cuda else ROUNDED_AT_ONCE) // size_in)
    parts = []
    for part in weight.split(step):
        part = part.float()
        if not bool(part.isfinite().all()):
            raise UserError(f"weights: {name} has values that are not finite; it cannot be quantized")
        parts.append(_round_int8(part) if group_size is None else _round_int4(part, group_size))
    values, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedWeight.pack(values, scales, group_size)


def _round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [N, K] int8 within -127 to 127 and scales [N, 1]: the largest magnitude of a row is 127."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight * _inverse(scales)).round_().to(torch.int8), scales


def _round_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return values [N, K] int8 within -8 to 7 and bfloat16 scales [N, groups], of small squared error.

    A scale may be negative, so that -8, which has no counterpart, serves the larger side.
    """
    size_in = weight.shape[1]
    groups = nn.functional.pad(weight, (0, -size_in % group_size)).unflatten(1, (-1, group_size))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(extreme)
    least = groups.square().sum(-1, keepdim=True)  # the error of a scale of 0
    for target in _TARGETS:
        tried = (groups * (target * _inverse(extreme))).round_().clamp_(-8, 7)
        # for these values, the scale of least squared error: w . q / q . q
        scale = (groups * tried).sum(-1, keepdim=True) * _inverse(tried.square().sum(-1, keepdim=True))
        scale = scale.to(SCALE_DTYPES[4]).float()
        values = (groups * _inverse(scale)).round_().clamp_(-8, 7)
        error = (values * scale - groups).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    values = (groups * _inverse(best)).round_().clamp_(-8, 7).to(torch.int8)
    return values.flatten(1)[:, :size_in], best[..., 0].to(SCALE_DTYPES[4])


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is (nearly) 0."""
    return torch.where(x.abs() > 1e-30, 1 / x, 0.0)


# -- as in a checkpoint -------------------------------------------------------------------------------------------


def to_checkpoint(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the two tensors of a checkpoint, made anew."""
    values, scales = weight.unpack()
    if weight.bits == 8:
        return values, scales
    raw = nn.functional.pad((values + 8).to(torch.uint8), (0, values.shape[1] % 2))
    return raw[:, 0::2] | (raw[:, 1::2] << 4), scales


def from_checkpoint(values: Tensor, scales: Tensor, size_in: int, group_size: int | None) -> QuantizedWeight:
    """Return the weight [N, size_in] of the two tensors of a checkpoint."""
    if group_size is not None:
        values = torch.stack((values & 15, values >> 4), -1).flatten(1)[:, :size_in].to(torch.int8) - 8
    return QuantizedWeight.pack(values, scales, group_size)


# -- modules ------------------------------------------------------------------------------------------------------


class QuantizedModule(nn.Module):
    """Holds quantized weights as attributes; they move, save and load like parameters, and are never trained.

    The tensors are buffers, `<attribute>_tiles` and `<attribute>_scales`, whose scales keep their dtype whatever
    `.to(dtype)` says. In a state dict they are the two tensors of a checkpoint, copies of what the module holds.
    """

    def __init__(self, **weights: QuantizedWeight) -> None:
        super().__init__()
        self._weights = list(weights)
        for name, weight in weights.items():
            self.hold(name, weight)
        self.eval()
        self.register_state_dict_post_hook(_save_weights)
        self.register_load_state_dict_pre_hook(_load_weights)

    def hold(self, name: str, weight: QuantizedWeight) -> None:
        """Take this weight as the attribute `name`."""
        self.register_buffer(f"{name}_tiles", weight.tiles, persistent=False)
        self.register_buffer(f"{name}_scales", weight.scales, persistent=False)
        setattr(self, name, weight)

    def materialise(self, device: torch.device) -> None:
        """Give weights on the meta device memory, which holds anything."""
        for name in self._weights:
            weight: QuantizedWeight = getattr(self, name)
            self.hold(name, QuantizedWeight.empty(*weight.shape, group_size=weight.group_size, device=device))

    def matrices(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield each matrix under its name in a checkpoint, after the module's own; it shares the module's memory."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> QuantizedModule:
        """Refuse to be trained.

        Raises:
            UserError: `mode` is True.
        """
        if mode:
            raise UserError("quantization: a quantized model cannot be trained; load the weights without quantization")
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        super()._apply(fn, recurse)
        for name in self._weights:
            old: QuantizedWeight = getattr(self, name)
            tiles, scales = getattr(self, f"{name}_tiles"), getattr(self, f"{name}_scales")
            if scales.dtype != old.scales.dtype:  # fn was to change the dtype as well; take only the move
                scales = old.scales.to(scales.device)
            moved = QuantizedWeight(tiles, scales, old.size_out, old.size_in, old.group_size)
            self.hold(name, moved.in_tiles())
        return self


class QuantizedLinear(QuantizedModule):
    """`Linear` with a quantized weight."""

    weight: QuantizedWeight

    def matrices(self) -> Iterator[tuple[str, QuantizedWeight]]:
        yield "weight", self.weight

    def forward(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return linear(x, self.weight, batch.backend, batch.num_decode_rows)


class QuantizedExperts(QuantizedModule):
    """`Experts` with quantized matrices: w13 [E, 2, I, hidden], gate and up apart, and w2 [E, hidden, I]."""

    w13: QuantizedWeight
    w2: QuantizedWeight

    def matrices(self) -> Iterator[tuple[str, QuantizedWeight]]:
        for e in range(self.w13.shape[0]):
            yield f"{e}.w1.weight", self.w13[e][0]
            yield f"{e}.w2.weight", self.w2[e]
            yield f"{e}.w3.weight", self.w13[e][1]

    def forward(self, v: Tensor, expert_ids: Tensor, expert_weights: Tensor, batch: ForwardBatch) -> Tensor:
        w13, w2, rows = self.w13, self.w2, batch.num_decode_rows
        return expert_mlp(v, w13, w2, expert_ids, expert_weights, backend=batch.backend, num_decodes=rows)


def _save_weights(module: QuantizedModule, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """state_dict hook: add each matrix as a checkpoint has it."""
    for name, weight in module.matrices():
        state[prefix + name], state[f"{prefix}{name}_scale"] = to_checkpoint(weight)


def _load_weights(
    module: QuantizedModule,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    *_: Any,
) -> None:
    """load_state_dict hook: take each matrix as a checkpoint has it; what is missing is left to be reported."""
    for name, weight in module.matrices():
        names = prefix + name, f"{prefix}{name}_scale"
        absent = [n for n in names if n not in state]
        missing += absent
        if not absent:
            values, scales = (state.pop(n).to(weight.tiles.device) for n in names)
            weight.copy_(from_checkpoint(values, scales, weight.size_in, weight.group_size))


# -- a network ----------------------------------------------------------------------------------------------------


def quantize_model(model: MiniMaxM1ForCausalLM, quantization: QuantizationConfig) -> None:
    """Replace the matrices of a network by quantized ones, in place, one module at a time; it cannot be trained then.

    Raises:
        UserError: it is quantized already, or a weight is not finite.
    """
    if model.config.quantization is not None:
        raise UserError(f"quantization: the model is quantized already ({model.config.quantization.name})")
    for parent, name, prefix in _places(model, quantization):
        module = getattr(parent, name)
        device = next(module.parameters()).device
        quantized = _planned(module, quantization)
        if device.type != "meta":
            quantized.materialise(device)
            state = module.state_dict()
            for key, target in quantized.matrices():
                target.copy_(quantize_weight(state[key], quantization, prefix + key))
        setattr(parent, name, quantized)
    _declare(model, quantization)


def plan_quantized(model: MiniMaxM1ForCausalLM, quantization: QuantizationConfig) -> None:
    """Replace the matrices of a network by quantized ones without memory, to be filled from a checkpoint."""
    for parent, name, _ in _places(model, quantization):
        setattr(parent, name, _planned(getattr(parent, name), quantization))
    _declare(model, quantization)


def quantized_matrices(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return every quantized matrix by its name in a checkpoint; each shares the network's memory."""
    return {
        f"{prefix}.{name}": weight
        for prefix, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for name, weight in module.matrices()
    }


def _places(model: MiniMaxM1ForCausalLM, quantization: QuantizationConfig) -> list[tuple[nn.Module, str, str]]:
    """Return (parent, attribute, prefix of its names) of every module to replace."""
    kinds = (Experts,) if quantization.modules == "experts" else (Experts, Linear)
    return [
        (parent, name, f"{prefix}.{name}.")
        for prefix, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) in kinds  # not the router's and the head's, which are made from Linear
    ]


def _planned(module: nn.Module, quantization: QuantizationConfig) -> QuantizedModule:
    """Return the quantized counterpart of a module, on the meta device."""

    def empty(*shape: int) -> QuantizedWeight:
        return QuantizedWeight.empty(*shape, group_size=quantization.group_size, device="meta")

    if isinstance(module, Linear):
        return QuantizedLinear(weight=empty(module.out_features, module.in_features))
    assert isinstance(module, Experts)
    num_experts, hidden, width = module.w2.shape
    return QuantizedExperts(w13=empty(num_experts, 2, width, hidden), w2=empty(num_experts, hidden, width))


def _declare(model: MiniMaxM1ForCausalLM, quantization: QuantizationConfig) -> None:
    """Write into the network's config what it is now, and ask for no gradients."""
    extra = {**model.config.extra, "quantization_config": quantization.to_dict()}
    model.config = model.model.config = model.config.replace(extra=extra)
    model.requires_grad_(False)
    model.eval()
