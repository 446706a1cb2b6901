"""Triton's products with weights of 8 and 4 bits, interpreted where there is no GPU, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from minimax_m1.errors import UserError
from minimax_m1.kernels import quantized_triton
from minimax_m1.kernels.linear import linear
from minimax_m1.kernels.quantized import GPU_TILE, QuantizedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_weight(*shape: int, group_size: int | None) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(sum(shape))
    most = 127 if group_size is None else 7
    values = torch.randint(-most - 1, most + 1, shape, generator=generator).to(torch.int8)
    groups = 1 if group_size is None else -(-shape[-1] // group_size)
    scales = (torch.rand(*shape[:-1], groups, generator=generator) - 0.3) / most
    return QuantizedWeight.pack(values.to(DEVICE), scales.to(DEVICE), group_size, GPU_TILE)


def random_rows(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return x.to(DEVICE, dtype)


def check(actual: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight) -> None:
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert actual.dtype == x.dtype and actual.shape == expected.shape
    assert float((actual.double() - expected).norm() / expected.norm()) < TOLERANCES[x.dtype]


@pytest.mark.parametrize(
    ("rows", "size_out", "size_in", "dtype", "group_size"),  # no group size: 8 bits
    [
        (1, 3, 2, torch.bfloat16, None),
        (1, 3, 2, torch.float32, 32),
        (2, 75, 45, torch.float16, None),
        (2, 75, 45, torch.bfloat16, 32),
        (5, 64, 256, torch.float32, None),
        (5, 64, 256, torch.bfloat16, 128),
        (17, 70, 129, torch.bfloat16, None),
        (17, 70, 129, torch.float16, 64),
        (17, 70, 129, torch.float32, 128),
        (65, 130, 96, torch.bfloat16, 64),
        (65, 33, 200, torch.float16, 32),
        (65, 33, 200, torch.bfloat16, None),
    ],
)
def test_product(rows: int, size_out: int, size_in: int, dtype: torch.dtype, group_size: int | None) -> None:
    weight, x = random_weight(size_out, size_in, group_size=group_size), random_rows(rows, size_in, dtype)
    check(linear(x, weight, "triton"), x, weight)


@pytest.mark.parametrize(
    ("dtype", "group_size"), [(torch.bfloat16, None), (torch.bfloat16, 32), (torch.float32, None), (torch.float16, 32)]
)
def test_programs_share_the_columns(dtype: torch.dtype, group_size: int | None) -> None:
    weight, x = random_weight(20, 1100, group_size=group_size), random_rows(3, 1100, dtype)
    actual = linear(x, weight, "triton")
    check(actual, x, weight)
    assert torch.equal(linear(x, weight, "triton"), actual)


@pytest.mark.parametrize(
    ("dtype", "group_size"), [(torch.bfloat16, None), (torch.float16, 32), (torch.float32, 64), (torch.bfloat16, 128)]
)
def test_many_rows(dtype: torch.dtype, group_size: int | None) -> None:
    weight, x = random_weight(9, 600, group_size=group_size), random_rows(600, 600, dtype)
    assert torch.equal(quantized_triton.dequantize_triton(weight, dtype), weight.dequantize(dtype))
    check(linear(x, weight, "triton"), x, weight)


@pytest.mark.parametrize("group_size", [None, 64])
def test_rows_that_are_not_contiguous_and_one_of_a_stack(group_size: int | None) -> None:
    stack = random_weight(3, 2, 20, 96, group_size=group_size)
    wide = random_rows(6, 200, torch.float32)
    for x in (wide[:, 7:103], wide[::2, :96], random_rows(96, 5, torch.float32).T):
        check(linear(x, stack[2][1], "triton"), x, stack[2][1])
    everything = quantized_triton.dequantize_triton(stack, torch.float32)
    assert torch.equal(everything, stack.dequantize(torch.float32))


def test_every_byte() -> None:
    values = torch.arange(-128, 128).to(torch.int8).repeat(2, 1).to(DEVICE)
    weight = QuantizedWeight.pack(values, torch.ones(2, 1, device=DEVICE), None, GPU_TILE)
    x = torch.eye(256, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(linear(x, weight, "triton"), values.T.to(torch.bfloat16))
    values = torch.arange(256).remainder(16).sub(8).to(torch.int8).repeat(2, 1).to(DEVICE)
    weight = QuantizedWeight.pack(values, torch.full((2, 8), 0.5, device=DEVICE), 32, GPU_TILE)
    assert torch.equal(linear(x, weight, "triton"), values.T.to(torch.bfloat16) / 2)


def test_no_rows_and_what_is_not_finite() -> None:
    weight = random_weight(20, 100, group_size=None)
    assert linear(random_rows(0, 100, torch.bfloat16), weight, "triton").shape == (0, 20)
    x = random_rows(4, 100, torch.float32)
    x[1, 99], x[2, 3] = float("inf"), float("nan")
    actual = linear(x, weight, "triton")
    assert actual[::3].isfinite().all() and not actual[1].isfinite().any() and not actual[2].isfinite().any()


def test_gradients_are_refused() -> None:
    x = random_rows(2, 32, torch.float32).requires_grad_()
    with pytest.raises(UserError, match="a quantized model cannot be trained"):
        linear(x, random_weight(16, 32, group_size=None), "triton")


# -- the numbers of the inline assembly, which the interpreter does not run --------------------------------------------


def test_how_bits_become_bfloat16() -> None:
    """As `whole_numbers` has it: lop3 0xEA is (a & b) | c, 0xAE is (~a & b) | c."""
    part = torch.arange(256)

    def as_bfloat16(bits: torch.Tensor) -> torch.Tensor:
        return bits.to(torch.int16).view(torch.bfloat16)

    found = as_bfloat16((part & 0x7F) | 0x4300) + as_bfloat16((~part & 0x80) | 0xC300)
    assert torch.equal(found.int(), part - 128)
    part = part[:16]
    assert torch.equal((as_bfloat16((part & 0xF) | 0x4300) + as_bfloat16(torch.tensor([0xC308]))).int(), part - 8)
