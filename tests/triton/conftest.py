"""What Triton's interpreter lacks for these tests, and fresh memory that shows what was not written."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def interpreted_bfloat16():
    """Make the interpreter multiply and round bfloat16 as a GPU does.

    It keeps one as the 16-bit integer of its bits: `tl.dot` multiplies those, a cast cuts a float32's bits off, and one
    of an integer takes it for the bits.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened_dot(self, a, b, *rest):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def rounded_cast(self, x, dtype):
        if dtype.scalar != tl.bfloat16 or not (x.dtype.scalar == tl.float32 or x.dtype.scalar.is_int()):
            return cast(self, x, dtype)
        return TensorHandle(
            torch.from_numpy(x.data.astype("float32")).bfloat16().view(torch.uint16).numpy(), tl.bfloat16
        )

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = widened_dot, rounded_cast


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Make fresh memory NaN, or an index far out of range: what a kernel forgets to write is then seen."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **options):
            x = allocate(*args, **options)
            if x.is_floating_point():
                return x.fill_(torch.nan)
            return x.fill_(1 << 30) if x.dtype in (torch.int32, torch.int64) else x

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
