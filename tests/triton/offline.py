"""Compile for a GPU that is not there: the programs that operations would launch, as Triton's compiler makes them.

    python tests/triton/offline.py lightning decode     the cases of cases/lightning.py whose names contain "decode"
    python tests/triton/offline.py --launch model       launched only, which compiles nothing

A case is a function `case_…` in cases/, which runs an operation with backend="triton" on tensors of the meta device, at
any size. Every launch is compiled, as it would be on an H200, and nothing runs: a case shows that the compiler takes
the kernel, what it needs of a multiprocessor, and that the host asks for no value on its way (it would have to wait).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "cases"


def main(names: list[str]) -> None:
    """Compile the cases of a file, or of all, and print a line of JSON a launched kernel."""
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    compiles = names[:1] != ["--launch"]
    names = names if compiles else names[1:]
    files = [FOLDER / f"{names[0]}.py"] if names else sorted(FOLDER.glob("*.py"))
    launched = _intercept(compiles)
    for file in files:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, case in vars(module).items():
            if name.startswith("case_") and all(part in name for part in names[1:]):
                launched.clear()
                case()
                for kernel, compiled in {id(c) if compiles else k: (k, c) for k, c in launched}.values():
                    needs = _needs(compiled) if compiles else {}
                    print(json.dumps({"case": f"{file.stem}.{name}", "kernel": kernel, **needs}), flush=True)


def _intercept(compiles: bool) -> list:
    """Make every launch compile for compute capability 9.0, or not even that; return the list that they go to."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

    launched: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options) if compiles else None
        launched.append((self.__name__, compiled))
        return compiled

    JITFunction.run = compile_only
    driver.set_active(Absent())
    return launched


@cache  # cases share launches
def _needs(compiled) -> dict:
    """Return what a compiled kernel takes: registers a thread, bytes on the stack (spilled), shared memory, MMAs."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found is not None, usage.stdout
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", compiled.asm["ptx"])),
        "mma": len(re.findall(r"\bmma\.sync", compiled.asm["ptx"])),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
