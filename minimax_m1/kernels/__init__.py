"""Kernels: one module per operation with its signature, mathematics and reference; `<op>_<backend>.py` beside it.

Four backends, and `choose` is the whole dispatch:

- `reference`: the plain formula, in any float dtype. A wrong number is bisected to a kernel by running with it.
- `torch`: PyTorch operations, differentiable, on any device.
- `compiled`: `torch`, but a CPU runs few rows (decoding) without gradients through our C++ kernels. It is there if a
  compiler was when the package was installed.
- `triton`: our Triton kernels on a GPU, differentiable, which never make the host wait; dense products of float
  matrices are the library's. On a CPU they run only interpreted, for tests (TRITON_INTERPRET=1).

A backend that was named is used or refused, never replaced; None takes the fastest that is there.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from minimax_m1.errors import UserError
from minimax_m1.kernels import compiled

BACKENDS = ("triton", "compiled", "torch", "reference")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of activations


def choose(backend: str | None, x: Tensor) -> str:
    """Return the backend to run with on tensors like x.

    Raises:
        UserError: `backend` does not exist, not in this installation, or cannot take x.
    """
    if backend is None:
        if x.is_cuda:
            return "triton" if has_triton() and x.dtype in TRITON_DTYPES and _is_fit(x.device) else "torch"
        return "torch" if compiled.library is None else "compiled"
    if backend not in BACKENDS:
        raise UserError(f"backend: {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if backend == "compiled" and compiled.library is None:
        raise UserError("backend: 'compiled' was not built here (a C++ compiler at installation builds it); use torch")
    if backend == "triton":
        _check_triton(x)
    return backend


@cache
def has_triton() -> bool:
    """Say whether Triton is installed; PyTorch's builds for GPUs bring it along."""
    return find_spec("triton") is not None


@cache
def _is_fit(device: torch.device) -> bool:
    """Say whether our kernels run on this GPU: they want NVIDIA's instructions, and bfloat16 in its tensor cores."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _check_triton(x: Tensor) -> None:
    if not has_triton():
        raise UserError("backend: 'triton' is not installed here (pip install triton); use torch")
    if x.dtype not in TRITON_DTYPES:
        raise UserError(f"backend: 'triton' does not take {x.dtype}; accepted: bfloat16, float16, float32; use torch")
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("backend: 'triton' needs a GPU, and the tensors are on a CPU; use compiled or torch")
    if x.is_cuda and not _is_fit(x.device):
        raise UserError("backend: 'triton' needs an NVIDIA GPU of compute capability 8.0 or above; use torch")
