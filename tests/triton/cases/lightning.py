"""Lightning attention as training, prefill and decode launch it."""

import torch

from minimax_m1.kernels.lightning import lightning_attention, lightning_decode, lightning_prefill

EMPTY = {"device": "meta", "dtype": torch.bfloat16}
FLOAT = {"device": "meta", "dtype": torch.float32}


def _qkv(tokens, heads, head_dim, **options):
    """Views of one tensor, as the model passes them."""
    return torch.empty(tokens, heads, 3 * head_dim, **{**EMPTY, **options}).chunk(3, dim=-1)


def _train(q, k, v):
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    bounds = torch.empty(2, device="meta", dtype=torch.int32)
    slope = torch.empty(q.shape[1], **FLOAT)
    o, _ = lightning_attention(q, k, v, slope, cu_seqlens=bounds, backend="triton")
    o.sum().backward()


def case_train_64_heads_of_128():
    _train(*_qkv(131072, 64, 128))


def case_train_8_heads_in_segments():
    _train(*(torch.empty(131072, 8, 128, **EMPTY) for _ in range(3)))  # of one layout: fewer kernels to compile


def _pool(heads, head_dim, num_seqs):
    states = torch.empty(num_seqs + 1, heads, head_dim, head_dim, **FLOAT)
    slots = torch.empty(num_seqs, device="meta", dtype=torch.int64)
    bounds = torch.empty(num_seqs + 1, device="meta", dtype=torch.int32)
    return torch.empty(heads, **FLOAT), states, slots, bounds


def _prefill(heads, head_dim, num_seqs, **options):
    slope, states, slots, bounds = _pool(heads, head_dim, num_seqs)
    lightning_prefill(*_qkv(8192, heads, head_dim, **options), slope, states, slots, bounds, backend="triton")


def case_prefill_of_one_and_of_four_sequences():
    _prefill(64, 128, 1)
    _prefill(64, 128, 4)


def case_prefill_heads_of_96_and_256():
    _prefill(8, 96, 3)
    _prefill(8, 256, 3)


def case_prefill_float32():
    _prefill(64, 128, 1, dtype=torch.float32)


def case_decode():
    slope, states, slots, bounds = _pool(64, 128, 64)
    lightning_decode(*_qkv(64, 64, 128), slope, states, slots, backend="triton")
    lightning_decode(*_qkv(256, 64, 128), slope, states, slots, bounds, backend="triton")
