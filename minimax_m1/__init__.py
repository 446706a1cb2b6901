"""MiniMax-M1: hybrid lightning-attention mixture-of-experts language models.

The names below are imported on first use, so that `minimax-m1 --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimax_m1.config import MiniMaxM1Config
    from minimax_m1.engine import Engine
    from minimax_m1.model import MiniMaxM1ForCausalLM
    from minimax_m1.sampling import SamplingParams
    from minimax_m1.tokenizer import MiniMaxM1Tokenizer

__version__ = "0.1.0"

__all__ = ["Engine", "MiniMaxM1Config", "MiniMaxM1ForCausalLM", "MiniMaxM1Tokenizer", "SamplingParams"]

_HOME = {
    "Engine": "minimax_m1.engine",
    "MiniMaxM1Config": "minimax_m1.config",
    "MiniMaxM1ForCausalLM": "minimax_m1.model",
    "MiniMaxM1Tokenizer": "minimax_m1.tokenizer",
    "SamplingParams": "minimax_m1.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minimax_m1' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
