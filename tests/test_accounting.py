"""Closed forms against published figures, against direct sums, and against what torch counts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimax_m1.accounting import (
    DEEPSEEK_ATTENTION,
    active_parameters,
    deepseek_r1_flops,
    flops_by_part,
    flops_per_token,
    generation_flops,
    kv_bytes,
    kv_bytes_per_token,
    lightning_state_bytes,
    parameter_counts,
    parameters,
    plan_memory,
    prefill_flops,
    share_of_deepseek_r1,
    training_flops,
    weight_bytes,
)
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError

M1 = MiniMaxM1Config.preset("minimax-m1")
TINY = MiniMaxM1Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    attn_type_list=(0, 1, 0, 1),
    num_local_experts=4,
)


def test_parameters_of_minimax_m1() -> None:
    assert parameters(M1) == 456_089_655_296
    assert weight_bytes(M1, "float32") == 4 * parameters(M1)
    assert weight_bytes(M1, "bfloat16") == 912_210_767_872  # total_size of the official index
    assert parameter_counts(M1)["experts"] == 434_865_438_720
    assert active_parameters(M1) == pytest.approx(45.9e9, rel=1e-3)


def test_memory_per_sequence_of_minimax_m1() -> None:
    assert kv_bytes_per_token(M1) == 40 * 1024
    assert kv_bytes(M1, 7168) == lightning_state_bytes(M1) == 280 * 1024**2


def test_flops_of_minimax_m1() -> None:
    assert flops_per_token(M1, 0) == pytest.approx(94.64e9, rel=1e-4)
    assert flops_per_token(M1, 1000) - flops_per_token(M1, 0) == 1000 * 327_680


def test_deepseek_r1_by_its_published_figures() -> None:
    """37B of its parameters are active (with the head, without the embedding); MLA's latent form by the V2 report."""
    constant = deepseek_r1_flops(1, past_len=0) - 2 * 61 * 128 * (192 + 128)
    assert constant / 2 == pytest.approx(36.6e9, rel=1e-3)  # 37B published, the embedding's 0.9B in it
    # a token's part in all layers, in FLOPs: 2 x 61 layers x 128 heads x ...
    for attention, macs in (("latent", 576 + 512), ("decompressed", 192 + 128), ("plain", 128 + 128)):
        grown = deepseek_r1_flops(1, attention=attention, past_len=1000) - deepseek_r1_flops(1, attention=attention)
        assert grown == 1000 * 2 * 61 * 128 * macs
        each = sum(deepseek_r1_flops(1, attention=attention, past_len=i) for i in range(7, 19))
        assert deepseek_r1_flops(12, attention=attention, past_len=7) == each


@pytest.mark.parametrize(
    ("attention", "cumulative", "published_share"),
    [("decompressed", False, 0.222), ("decompressed", True, 0.344), ("plain", False, 0.269), ("latent", True, 0.120)],
)
def test_share_of_deepseek_r1(attention: str, cumulative: bool, published_share: float) -> None:
    """By hand, at 100,000 tokens: a line for each model, 94.64 GFLOP + 327,680 a token of context for M1's."""
    n = 100_000
    seen = n / 2 if cumulative else n
    slope = 2 * 61 * 128 * {"latent": 1088, "decompressed": 320, "plain": 256}[attention]
    by_hand = (94.64e9 + 327_680 * seen) / (73.25e9 + slope * seen)
    share = share_of_deepseek_r1(M1, n, attention=attention, cumulative=cumulative)
    assert share == pytest.approx(by_hand, rel=1e-3) == pytest.approx(published_share, abs=5e-4)


def test_published_shares_lie_between_the_conventions() -> None:
    """M1's report: less than 50% at 64K generated tokens, about 30% at 80K, about 25% at 100K."""

    def last(attention: str, n: int) -> float:
        return share_of_deepseek_r1(M1, n, attention=attention, cumulative=False)

    assert last("decompressed", 80_000) < 0.30 < last("plain", 80_000) < 0.31
    assert last("decompressed", 100_000) < 0.25 < last("plain", 100_000)
    assert share_of_deepseek_r1(M1, 64_000, attention="decompressed", cumulative=True) < 0.5
    # no straight lines can fall from 50% to 25% in 36K tokens: what halves the share must at least double the tokens
    ratios = [
        share_of_deepseek_r1(M1, 100_000, attention=a, cumulative=c)
        / share_of_deepseek_r1(M1, 64_000, attention=a, cumulative=c)
        for a in DEEPSEEK_ATTENTION
        for c in (False, True)
    ]
    assert min(ratios) > 0.64


@pytest.mark.parametrize("window", [None, 3])
def test_flops_by_part_sum_up(window: int | None) -> None:
    config = TINY.replace(sliding_window=window, shared_intermediate_size=40)
    parts = flops_by_part(config, 10)
    assert sum(parts.values()) == prefill_flops(config, 10, num_logits=10)
    # by hand: 2 softmax layers, 3 heads of 8, q k^T and p v
    assert parts["softmax_scores"] == 2 * 4 * 24 * (55 if window is None else 1 + 2 + 8 * 3)
    assert parts["lightning_state"] == 10 * 2 * 2 * 2 * 3 * 64
    assert parts["experts"] == 10 * 2 * 4 * 2 * 3 * 32 * 24


@pytest.mark.parametrize("window", [None, 3, 7])
def test_sums_over_tokens(window: int | None) -> None:
    config = TINY.replace(sliding_window=window)
    direct = sum(flops_per_token(config, t) for t in range(6, 11))
    assert generation_flops(config, 5, prompt_len=5) == direct
    head = 2 * config.vocab_size * config.hidden_size
    assert prefill_flops(config, 5, past_len=5) == direct - 4 * head
    assert prefill_flops(config, 10) == prefill_flops(config, 4) + prefill_flops(config, 6, past_len=4) - head
    assert training_flops(config, [4, 6]) == 3 * (generation_flops(config, 4) + generation_flops(config, 6))
    assert training_flops(config, [4], recompute=True) == 4 * generation_flops(config, 4)


def test_sliding_window_bounds_the_cache() -> None:
    assert kv_bytes(TINY.replace(sliding_window=16), 1000) == 16 * kv_bytes_per_token(TINY)


def test_plan_of_minimax_m1() -> None:
    """A slot is 280 MiB and a page of float32 keys and values 5 MiB."""
    plan = plan_memory(M1, 8 * 2**30, page_size=64, max_batch_size=32)
    assert (plan.slot_bytes, plan.page_bytes) == (280 * 2**20, 5 * 2**20)
    assert plan.checkpoint_bytes == 2 * 2**30
    assert plan.num_slots == 10  # half of what is left
    assert plan.num_pages == (6 * 1024 - 10 * 280) // 5 and plan.max_model_len == 64 * plan.num_pages


KINDS = {
    "hybrid": TINY,
    "softmax only": TINY.replace(attn_type_list=(1, 1, 1, 1)),
    "lightning only": TINY.replace(attn_type_list=(0, 0, 0, 0)),
}


@given(
    kind=st.sampled_from(sorted(KINDS)),
    cache_bytes=st.integers(1, 10**7),
    max_batch_size=st.integers(1, 40),
    max_model_len=st.none() | st.integers(1, 3000),
    checkpoint_bytes=st.none() | st.integers(0, 10**6),
    dtype=st.sampled_from(["float64", "float32", "bfloat16"]),
)
def test_plans_keep_the_budget_and_use_it(
    kind: str,
    cache_bytes: int,
    max_batch_size: int,
    max_model_len: int | None,
    checkpoint_bytes: int | None,
    dtype: str,
) -> None:
    config = KINDS[kind].replace(max_position_embeddings=5000)
    options = dict(page_size=64, max_batch_size=max_batch_size, max_model_len=max_model_len)
    options |= dict(checkpoint_bytes=checkpoint_bytes, dtype=dtype)
    try:
        plan = plan_memory(config, cache_bytes, **options)
    except UserError as error:
        least = int(re.search("at least ([0-9,]+)", str(error))[1].replace(",", ""))
        assert least > cache_bytes
        fitting = plan_memory(config, least, **options)
        assert fitting.num_slots >= 1 and fitting.used_bytes <= least
        with pytest.raises(UserError):
            plan_memory(config, least - 1, **options)
        return
    assert plan.used_bytes <= cache_bytes
    assert 1 <= plan.num_slots <= min(max_batch_size, plan.num_pages)
    assert plan.max_model_len <= plan.num_pages * 64
    assert max_model_len in (None, plan.max_model_len)
    is_capped = plan.num_pages == 2 * plan.num_slots * -(-(max_model_len or 5000) // 64)
    assert is_capped or plan.used_bytes + plan.page_bytes > cache_bytes
    assert checkpoint_bytes is not None or plan.checkpoint_bytes in (0, *range(plan.slot_bytes, cache_bytes // 4 + 1))


def test_the_least_cache_is_named() -> None:
    with pytest.raises(
        UserError, match=r"cache_bytes: 1,000 cannot be used; accepted: at least 132,608, which hold .* 1,024"
    ):
        plan_memory(TINY, 1000, page_size=64, max_batch_size=4, max_model_len=1000)


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(UserError, match="dtype: 'int3' is not known"):
        weight_bytes(TINY, "int3")


VARIANTS = {
    "plain": TINY,
    "shared expert": TINY.replace(shared_intermediate_size=40),
    "dynamic gate": TINY.replace(dynamic_gate=True),
    "tied": TINY.replace(tie_word_embeddings=True),
    "softmax only": TINY.replace(attn_type_list=(1, 1, 1, 1)),
    "lightning only": TINY.replace(attn_type_list=(0, 0, 0, 0)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_network(variant: str) -> None:
    torch = pytest.importorskip("torch")
    from minimax_m1.model import MiniMaxM1ForCausalLM

    config = VARIANTS[variant]
    with torch.device("meta"):
        model = MiniMaxM1ForCausalLM(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", ["plain", "shared expert", "softmax only"])
def test_flops_equal_what_torch_counts(variant: str) -> None:
    """Five tokens through the reference kernels, which run every expert (so all are chosen) and masked products too.

    They build k^T v by broadcasting, which torch's counter does not see: half of a lightning layer's state work. In
    float64 no compiled kernel hides a product from the counter.
    """
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from minimax_m1.batch import ForwardBatch
    from minimax_m1.model import MiniMaxM1ForCausalLM

    config = VARIANTS[variant].replace(num_experts_per_tok=4)
    model = MiniMaxM1ForCausalLM(config).double()
    model.init_weights(seed=0)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        hidden, _ = model.forward_packed(torch.arange(5), ForwardBatch.packed([5], backend="reference"))
        model.compute_logits(hidden)
    heads_width = config.num_attention_heads * config.head_dim
    unseen = len(config.lightning_layers) * 5 * 2 * heads_width * config.head_dim
    masked = len(config.softmax_layers) * 10 * 4 * heads_width
    assert counter.get_total_flops() == prefill_flops(config, 5, num_logits=5) - unseen + masked
