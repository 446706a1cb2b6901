"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml.

Without a compiler that takes these flags the installation goes on without them (`minimax-m1 info` says so).
"""

import os
from glob import glob

from setuptools import Extension, setup

MARCH = os.environ.get("MINIMAX_M1_MARCH", "native")  # by default for the machine that installs it

setup(
    ext_modules=[
        Extension(
            "minimax_m1.kernels._compiled",
            sources=sorted(glob("minimax_m1/kernels/csrc/*.cpp")),
            depends=glob("minimax_m1/kernels/csrc/*.h"),
            # no -ffast-math: it would make the whole process flush denormals
            extra_compile_args=["-std=c++17", "-O3", f"-march={MARCH}", "-fopenmp", "-fno-math-errno"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
