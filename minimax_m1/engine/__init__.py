"""Serving many requests at once: continuous batching over a paged hybrid cache."""

from minimax_m1.engine.async_engine import AsyncEngine
from minimax_m1.engine.engine import Engine
from minimax_m1.engine.outputs import Delta, GenerationResult, Usage

__all__ = ["AsyncEngine", "Delta", "Engine", "GenerationResult", "Usage"]
