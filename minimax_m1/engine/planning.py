"""TEMPORARY until accounting.plan_memory is there."""
from __future__ import annotations

import os
from dataclasses import dataclass

from minimax_m1.errors import UserError


@dataclass(frozen=True)
class Plan:
    max_model_len: int
    num_pages: int
    checkpoint_bytes: int


def plan_cache(model, settings):
    c = model.config
    size = 4
    page = len(c.softmax_layers) * 2 * c.num_key_value_heads * c.head_dim * 64 * size
    slot = len(c.lightning_layers) * c.num_attention_heads * c.head_dim**2 * 4
    total = settings.cache_bytes or int(0.4 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    wanted = settings.max_model_len or c.max_position_embeddings
    pages = min((total - slot * settings.max_batch_size) // max(1, page), settings.max_batch_size * -(-wanted // 64))
    if pages < 1:
        raise UserError(f"cache_bytes: {total} cannot be used; accepted: at least {slot * settings.max_batch_size + page}")
    return Plan(min(wanted, pages * 64), pages, settings.checkpoint_bytes if settings.checkpoint_bytes is not None else total // 4)
