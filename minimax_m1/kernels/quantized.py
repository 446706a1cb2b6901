"""Weights of 8 and 4 bits: how they lie in memory, what they stand for, and products with them.

Shapes: a weight is [N, K], or a stack [..., N, K] of such; M rows. Column k of row n stands for

    value[n, k] * scale[n, k // group_size]        value: a whole number, -128 to 127 (8 bits) or -8 to 7 (4 bits)

With 8 bits there is one scale a row. In memory values lie in tiles, as csrc/quantized.cpp reads them: 16 rows by 4
columns (8 bits; each byte value + 128), or 16 rows by 8 columns (4 bits; byte b of a row holds column b below column
4 + b, each value + 8), filled up to whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # rows of a weight that lie together
SCALE_DTYPES = {8: torch.float32, 4: torch.bfloat16}  # of 4 bits there are many, and a bfloat16 is fine enough


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight or a stack of weights; only read, and not differentiable."""

    requires_grad: ClassVar[bool] = False

    tiles: Tensor  # [..., ceil(N / 16), ceil(K / 4 or 8), 16, 4] uint8
    scales: Tensor  # 8 bits: [..., ceil(N / 16), 1, 16] float32; 4 bits: [..., ceil(N / 16), groups, 16] bfloat16
    size_out: int  # N
    size_in: int  # K
    group_size: int | None  # columns that share a scale; None: all of a row, and 8 bits

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.group_size is None else 4

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float weight: [..., N, K]."""
        return (*self.tiles.shape[:-4], self.size_out, self.size_in)

    @classmethod
    def empty(cls, *shape: int, group_size: int | None, device: torch.device | str | None = None) -> QuantizedWeight:
        """Return a weight of this shape that holds anything."""
        *stack, size_out, size_in = shape
        bits = 8 if group_size is None else 4
        rows, columns = -(-size_out // TILE), -(-size_in // _columns(bits))
        groups = 1 if group_size is None else -(-size_in // group_size)
        tiles = torch.empty(*stack, rows, columns, TILE, 4, dtype=torch.uint8, device=device)
        scales = torch.empty(*stack, rows, groups, TILE, dtype=SCALE_DTYPES[bits], device=device)
        return cls(tiles, scales, size_out, size_in, group_size)

    @classmethod
    def pack(cls, values: Tensor, scales: Tensor, group_size: int | None) -> QuantizedWeight:
        """Return the weight with these values [..., N, K] int8 and scales [..., N, groups]."""
        size_out, size_in = values.shape[-2:]
        bits = 8 if group_size is None else 4
        columns = _columns(bits)
        padding = (0, -size_in % columns, 0, -size_out % TILE)
        raw = F.pad((values.to(torch.int16) + (128 if bits == 8 else 8)).to(torch.uint8), padding)
        raw = raw.unflatten(-1, (-1, columns)).unflatten(-3, (-1, TILE)).transpose(-3, -2)  # [..., T, Q, 16, columns]
        if bits == 4:
            raw = raw[..., :4] | (raw[..., 4:] << 4)
        scales = F.pad(scales, (0, 0, 0, -size_out % TILE)).unflatten(-2, (-1, TILE)).transpose(-2, -1)
        scales = scales.to(SCALE_DTYPES[bits])
        return cls(raw.contiguous(), scales.contiguous(), size_out, size_in, group_size)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Return values [..., N, K] int8 and scales [..., N, groups]; the inverse of `pack`."""
        raw = self.tiles
        if self.bits == 4:
            raw = torch.cat((raw & 15, raw >> 4), -1)
        raw = raw.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., : self.size_out, : self.size_in]
        values = (raw.to(torch.int16) - (128 if self.bits == 8 else 8)).to(torch.int8)
        return values, self.scales.transpose(-2, -1).flatten(-3, -2)[..., : self.size_out, :].contiguous()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the float weight, its stack laid along N: [... N, K] as a matrix."""
        values, scales = self.unpack()
        wide = torch.promote_types(dtype, torch.float32)  # the product is rounded once
        if self.group_size is not None:
            scales = scales.repeat_interleave(self.group_size, -1)[..., : self.size_in]
        return (values.to(wide) * scales.to(wide)).to(dtype).view(-1, self.size_in)

    def __getitem__(self, index: int) -> QuantizedWeight:
        """Return one of a stack; it shares its memory."""
        assert self.tiles.dim() > 4
        return QuantizedWeight(self.tiles[index], self.scales[index], self.size_out, self.size_in, self.group_size)

    def copy_(self, other: QuantizedWeight) -> None:
        """Take over the values and scales of a weight of the same form."""
        assert self.shape == other.shape and self.group_size == other.group_size
        self.tiles.copy_(other.tiles)
        self.scales.copy_(other.scales)


def _columns(bits: int) -> int:
    """The columns of a tile."""
    return 4 if bits == 8 else 8
