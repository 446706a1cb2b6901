"""Lightning attention as training, prefill and decode launch it."""

import torch

from minimax_m1.kernels.lightning import lightning_attention, lightning_decode, lightning_prefill

EMPTY = {"device": "meta", "dtype": torch.bfloat16}
FLOAT = {"device": "meta", "dtype": torch.float32}


def _qkv(tokens, heads, head_dim, **options):
    """Views of one tensor, as the model passes them."""
    return torch.empty(tokens, heads, 3 * head_dim, **{**EMPTY, **options}).chunk(3, dim=-1)


def _train(tokens, heads, head_dim, num_seqs, **options):
    q, k, v = (x.requires_grad_() for x in _qkv(tokens, heads, head_dim, **options))
    state = torch.empty(num_seqs, heads, head_dim, head_dim, **FLOAT).requires_grad_()
    bounds = torch.empty(num_seqs + 1, device="meta", dtype=torch.int32)
    slope = torch.empty(heads, **FLOAT)
    o, final = lightning_attention(q, k, v, slope, cu_seqlens=bounds, initial_state=state, backend="triton")
    (o.sum() + final.sum()).backward()


def case_train_64_heads_of_128():
    _train(131072, 64, 128, 1)


def case_train_heads_of_96():
    _train(4096, 8, 96, 3)


def case_train_heads_of_256_and_32():
    _train(4096, 8, 256, 3)
    _train(4096, 8, 32, 3)


def case_train_float32():
    _train(4096, 64, 128, 1, dtype=torch.float32)


def _pool(heads, head_dim, num_seqs):
    states = torch.empty(num_seqs + 1, heads, head_dim, head_dim, **FLOAT)
    slots = torch.empty(num_seqs, device="meta", dtype=torch.int64)
    bounds = torch.empty(num_seqs + 1, device="meta", dtype=torch.int32)
    return torch.empty(heads, **FLOAT), states, slots, bounds


def case_prefill():
    slope, states, slots, bounds = _pool(64, 128, 4)
    lightning_prefill(*_qkv(8192, 64, 128), slope, states, slots, bounds, backend="triton")


def case_decode():
    for head_dim in (32, 96, 128, 256):
        slope, states, slots, bounds = _pool(64, head_dim, 64)
        lightning_decode(*_qkv(64, 64, head_dim), slope, states, slots, backend="triton")
        lightning_decode(*_qkv(256, 64, head_dim), slope, states, slots, bounds, backend="triton")
