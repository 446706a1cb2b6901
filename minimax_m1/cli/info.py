"""`minimax-m1 info`: what a checkpoint is and costs, from its config.json: no weights are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from minimax_m1 import accounting, kernels, shipped
from minimax_m1.cache import PAGE_SIZE
from minimax_m1.config import PRESETS, MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.settings import InfoSettings, parse_bytes

CONTEXTS = (1024, 32_768, 131_072, 1_048_576)
WEIGHT_DTYPES = ("float32", "bfloat16", "int8", "int4")


def info(settings: InfoSettings) -> None:
    """Print the facts of `settings.model`.

    Raises:
        UserError: there is no such folder or preset, its config cannot describe a network, or no sequence fits into
            `settings.cache_bytes`.
    """
    facts = collect(settings.model)
    if settings.cache_bytes is not None:
        cache_bytes = parse_bytes("cache_bytes", settings.cache_bytes)
        _, config = find_config(settings.model)
        facts["cache"] = plan(config, cache_bytes, settings.max_batch_size)
    print(json.dumps(facts, indent=2) if settings.json else _as_text(facts))


def collect(model: str | None) -> dict[str, Any]:
    """Return the facts of a folder, a preset or (None) the shipped model; bytes and FLOPs are whole numbers.

    Raises:
        UserError: as `info`.
    """
    name, config = find_config(model)
    return {
        "model": name,
        "architecture": {
            "layers": config.num_hidden_layers,
            "lightning_layers": len(config.lightning_layers),
            "softmax_layers": len(config.softmax_layers),
            "hidden_size": config.hidden_size,
            "attention_heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "experts": config.num_local_experts,
            "experts_per_token": config.num_experts_per_tok,
            "expert_width": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "max_context": config.max_position_embeddings,
        },
        "parameters": {
            "total": accounting.parameters(config),
            "active": accounting.active_parameters(config),
            **accounting.parameter_counts(config),
        },
        "weight_bytes": {dtype: accounting.weight_bytes(config, dtype) for dtype in WEIGHT_DTYPES},
        "sequence_bytes": {
            "lightning_state": accounting.lightning_state_bytes(config),
            "kv_per_token_float32": accounting.kv_bytes_per_token(config, "float32"),
            "kv_per_token_bfloat16": accounting.kv_bytes_per_token(config, "bfloat16"),
        },
        "flops_per_token": {str(length): accounting.flops_per_token(config, length) for length in CONTEXTS},
        "backends": [name for name in kernels.BACKENDS if _is_available(name)],
    }


def plan(config: MiniMaxM1Config, cache_bytes: int, max_batch_size: int) -> dict[str, int]:
    """Return how an engine on a CPU, where keys and values are float32, would divide `cache_bytes`.

    Raises:
        UserError: not even one sequence fits.
    """
    found = accounting.plan_memory(config, cache_bytes, page_size=PAGE_SIZE, max_batch_size=max_batch_size)
    return {**dataclasses.asdict(found), "page_tokens": PAGE_SIZE, "used_bytes": found.used_bytes}


def find_config(model: str | None) -> tuple[str, MiniMaxM1Config]:
    """Return the name and config of a folder or a preset; of the shipped model for None."""
    if model is None:
        return shipped.NAME, MiniMaxM1Config.from_pretrained(shipped.path())
    if Path(model).is_dir():
        return model, MiniMaxM1Config.from_pretrained(model)
    if model in shipped.NAMES:
        return model, MiniMaxM1Config.from_pretrained(shipped.path(model))
    if model in PRESETS:
        return model, MiniMaxM1Config.preset(model)
    raise UserError(f"model: {model!r} cannot be used; accepted: a folder with config.json, or {', '.join(PRESETS)}")


def _is_available(backend: str) -> bool:
    x = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        return kernels.choose(backend, x) == backend
    except UserError:
        return False


def _as_text(facts: dict[str, Any]) -> str:
    """Lay the facts out for reading: one section a group, numbers with units."""
    architecture, parameters, sequence = facts["architecture"], facts["parameters"], facts["sequence_bytes"]
    parts = [name for name in parameters if name not in ("total", "active") and parameters[name]]
    lines = [
        f"{facts['model']}",
        "",
        "Architecture",
        f"  layers               {architecture['layers']} ({architecture['lightning_layers']} lightning, "
        f"{architecture['softmax_layers']} softmax)",
        f"  hidden size          {architecture['hidden_size']:,}",
        f"  attention            {architecture['attention_heads']} heads of {architecture['head_dim']}; softmax layers "
        f"share {architecture['key_value_heads']} key/value heads",
        f"  experts              {architecture['experts']} of width {architecture['expert_width']:,}, "
        f"{architecture['experts_per_token']} for each token",
        f"  vocabulary           {architecture['vocabulary']:,}",
        f"  longest context      {architecture['max_context']:,} tokens",
        "",
        "Parameters",
        f"  total                {parameters['total']:,}",
        f"  active per token     {parameters['active']:,} (without embedding and head)",
        *(f"  {name.replace('_', ' '):<20} {parameters[name]:,}" for name in parts),
        "",
        "Memory of the weights",
        *(f"  {dtype:<20} {_bytes(size)}" for dtype, size in facts["weight_bytes"].items()),
        "",
        "Memory of a sequence",
        f"  lightning state      {_bytes(sequence['lightning_state'])} at any length (float32)",
        f"  keys and values      {_bytes(sequence['kv_per_token_bfloat16'])} per token (bfloat16), "
        f"{_bytes(sequence['kv_per_token_float32'])} (float32)",
        "",
        *(_plan_as_text(facts["cache"]) if "cache" in facts else ()),
        "Compute per token, forward",
        *(f"  at {int(length):<9,} tokens  {_flops(count)}" for length, count in facts["flops_per_token"].items()),
        "",
        "Kernels",
        f"  backends here        {', '.join(facts['backends'])} (the first is used)",
    ]
    return "\n".join(lines)


def _plan_as_text(plan: dict[str, int]) -> list[str]:
    slots, pages, checkpoints = plan["num_slots"], plan["num_pages"], plan["checkpoint_bytes"]
    slot_bytes, page_bytes = plan["slot_bytes"], plan["page_bytes"]
    held = f", {checkpoints // slot_bytes:,} of them" if slot_bytes else ""
    each = min(plan["max_model_len"], pages // slots * plan["page_tokens"])
    return [
        f"A cache of {_bytes(plan['cache_bytes'])}",
        f"  sequences together   {slots:,}, a state of {_bytes(slot_bytes)} each: {_bytes(slots * slot_bytes)}",
        f"  keys and values      {pages:,} pages of {plan['page_tokens']} tokens, {_bytes(page_bytes)} each: "
        f"{_bytes(pages * page_bytes)}",
        f"  cached prefixes      states in {_bytes(checkpoints)}{held}",
        f"  longest sequence     {plan['max_model_len']:,} tokens alone, {each:,} each when all run together",
        "",
    ]


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} bytes"


def _flops(count: int) -> str:
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,} FLOP"
