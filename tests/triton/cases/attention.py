"""Launches of softmax attention and the rotary embedding: M1's size, and a small odd one."""

import torch

from minimax_m1.kernels.attention import softmax_attention, softmax_attention_cached
from minimax_m1.kernels.rotary import rotate, rotate_append

HEADS, GROUPS, HEAD_DIM, ROTARY_DIM = 64, 8, 128, 64
PAGES_OF_1M = (1 << 20) // 64


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def train(tokens, heads=HEADS, groups=GROUPS, head_dim=HEAD_DIM, dtype=torch.bfloat16, window=None):
    q, k, v = (meta(tokens, n, head_dim, dtype=dtype).requires_grad_() for n in (heads, groups, groups))
    bounds = meta(5, dtype=torch.int32)
    o = softmax_attention(q, k, v, cu_seqlens=bounds, max_seqlen=tokens, window=window, backend="triton")
    o.backward(meta(*o.shape, dtype=dtype))


def serve(num_seqs, rows_each, decodes, heads=HEADS, groups=GROUPS, head_dim=HEAD_DIM, dtype=torch.bfloat16):
    rows = num_seqs * rows_each
    pools = (meta(groups, 4 * PAGES_OF_1M, 64, head_dim, dtype=dtype) for _ in range(2))
    softmax_attention_cached(
        meta(rows, heads, head_dim, dtype=dtype),
        *pools,
        cu_seqlens=meta(num_seqs + 1, dtype=torch.int32),
        kv_lens=meta(num_seqs, dtype=torch.int64),
        slots=meta(num_seqs, dtype=torch.int64),
        block_tables=meta(64, PAGES_OF_1M, dtype=torch.int32),
        num_decodes=num_seqs if decodes else 0,
        num_decode_rows=rows if decodes else 0,
        backend="triton",
    )


def case_train_32k():
    train(32 << 10)


def case_train_window_of_float32():
    train(2048, heads=6, groups=2, head_dim=64, dtype=torch.float32, window=1000)


def case_prefill_8k_behind_1m():
    serve(1, 8192, decodes=False)


def case_prefill_float32_odd():
    serve(3, 50, decodes=False, heads=6, groups=2, head_dim=24, dtype=torch.float32)


def case_decode():
    serve(64, 1, decodes=True)


def case_decode_drafts():
    serve(8, 4, decodes=True)


def case_rotary():
    angles = [meta(8192, 1, ROTARY_DIM // 2, dtype=torch.float32) for _ in range(2)]
    q, k, v = meta(8192, HEADS + 2 * GROUPS, HEAD_DIM).split([HEADS, GROUPS, GROUPS], 1)
    rotate(q.requires_grad_(), *angles, backend="triton").sum().backward()
    pools = (meta(GROUPS, 4 * PAGES_OF_1M, 64, HEAD_DIM) for _ in range(2))
    rotate_append(q.detach(), k, v, *angles, *pools, meta(8192, dtype=torch.int64), backend="triton")
