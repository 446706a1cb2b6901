"""Weights of 8 and 4 bits: how they lie in memory, what they stand for, and products with them.

Shapes: a weight is [N, K], or a stack [..., N, K] of such; M rows. Column k of row n stands for

    value[n, k] * scale[n, k // group_size]        value: a whole number, -128 to 127 (8 bits) or -8 to 7 (4 bits)

With 8 bits there is one scale a row. In memory values lie in tiles, filled up to whole ones: R rows of J words of B
bytes each. The columns of a tile's row are counted through the words first: part i of word j, of 8 or 4 bits and from
the lowest, holds column J i + j, as value + 128 or + 8. A CPU has tiles of 16 rows of 4 words of one byte, as
csrc/quantized.cpp reads them. A GPU has one row of 16 words of two bytes: a weight's rows are contiguous, and of two
words, which are a register, a part becomes two bfloat16 at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_TILE, GPU_TILE = (16, 4, 1), (1, 16, 2)  # R, J, B
SCALE_DTYPES = {8: torch.float32, 4: torch.bfloat16}  # of 4 bits there are many, and a bfloat16 is fine enough


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight or a stack of weights; only read, and not differentiable."""

    requires_grad: ClassVar[bool] = False

    tiles: Tensor  # [..., ceil(N / R), ceil(K / columns of a tile), R, J, B] uint8
    scales: Tensor  # 8 bits: [..., ceil(N / R), 1, R] float32; 4 bits: [..., ceil(N / R), groups, R] bfloat16
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
        return (*self.tiles.shape[:-5], self.size_out, self.size_in)

    @classmethod
    def empty(cls, *shape: int, group_size: int | None, device: torch.device | str | None = None) -> QuantizedWeight:
        """Return a weight of this shape that holds anything."""
        *stack, size_out, size_in = shape
        bits, tile = 8 if group_size is None else 4, tile_of(torch.empty(0, device=device).device)
        rows, columns = -(-size_out // tile[0]), -(-size_in // _columns(bits, tile))
        groups = 1 if group_size is None else -(-size_in // group_size)
        tiles = torch.empty(*stack, rows, columns, *tile, dtype=torch.uint8, device=device)
        scales = torch.empty(*stack, rows, groups, tile[0], dtype=SCALE_DTYPES[bits], device=device)
        return cls(tiles, scales, size_out, size_in, group_size)

    @classmethod
    def pack(
        cls, values: Tensor, scales: Tensor, group_size: int | None, tile: tuple[int, int, int] | None = None
    ) -> QuantizedWeight:
        """Return the weight with these values [..., N, K] int8 and scales [..., N, groups], in the device's tiles."""
        size_out, size_in = values.shape[-2:]
        bits, tile = 8 if group_size is None else 4, tile or tile_of(values.device)
        columns, filling = _columns(bits, tile), -size_out % tile[0]
        raw = F.pad(values.view(torch.uint8), (0, -size_in % columns, 0, filling)) + (128 if bits == 8 else 8)
        raw = raw.unflatten(-1, (-1, tile[2], 8 // bits, tile[1])).unflatten(-5, (-1, tile[0])).transpose(-5, -4)
        raw = raw[..., 0, :] if bits == 8 else raw[..., 0, :] | (raw[..., 1, :] << 4)  # [..., T, Q, R, B, J]
        scales = F.pad(scales, (0, 0, 0, filling)).unflatten(-2, (-1, tile[0])).transpose(-2, -1)
        scales = scales.to(SCALE_DTYPES[bits])
        return cls(raw.transpose(-2, -1).contiguous(), scales.contiguous(), size_out, size_in, group_size)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Return values [..., N, K] int8 and scales [..., N, groups]; the inverse of `pack`."""
        raw = self.tiles.transpose(-2, -1).unsqueeze(-2)  # [..., T, Q, R, B, 1, J]
        if self.bits == 4:
            raw = torch.cat((raw & 15, raw >> 4), -2)
        raw = raw.transpose(-5, -4).flatten(-6, -5).flatten(-4)[..., : self.size_out, : self.size_in]
        values = (raw - (128 if self.bits == 8 else 8)).view(torch.int8)
        return values, self.scales.transpose(-2, -1).flatten(-3, -2)[..., : self.size_out, :].contiguous()

    def in_tiles(self, tile: tuple[int, int, int] | None = None) -> QuantizedWeight:
        """Return it in these tiles, None for those of its device; itself if it lies in them already."""
        tile = tile or tile_of(self.tiles.device)
        return self if self.tiles.shape[-3:] == tile else self.pack(*self.unpack(), self.group_size, tile)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the float weight, its stack laid along N: [... N, K] as a matrix."""
        values, scales = self.unpack()
        wide = torch.promote_types(dtype, torch.float32)  # the product is rounded once
        if self.group_size is not None:
            scales = scales.repeat_interleave(self.group_size, -1)[..., : self.size_in]
        return (values.to(wide) * scales.to(wide)).to(dtype).view(-1, self.size_in)

    def __getitem__(self, index: int) -> QuantizedWeight:
        """Return one of a stack; it shares its memory."""
        assert self.tiles.dim() > 5
        return QuantizedWeight(self.tiles[index], self.scales[index], self.size_out, self.size_in, self.group_size)

    def copy_(self, other: QuantizedWeight) -> None:
        """Take over the values and scales of a weight of the same form."""
        assert self.shape == other.shape and self.group_size == other.group_size
        other = replace(other, tiles=other.tiles.to(self.tiles.device), scales=other.scales.to(self.tiles.device))
        other = other.in_tiles(GPU_TILE if self.tiles.shape[-3] == 1 else CPU_TILE)
        self.tiles.copy_(other.tiles)
        self.scales.copy_(other.scales)


def tile_of(device: torch.device) -> tuple[int, int, int]:
    """Return R, J and B of a weight on this device."""
    return GPU_TILE if device.type == "cuda" else CPU_TILE


def _columns(bits: int, tile: tuple[int, int, int]) -> int:
    """The columns of a tile."""
    return tile[1] * tile[2] * (8 // bits)
