"""HybridCache: pages come and go, sequences fork and move, and no token's result changes by it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimax_m1.cache import PAGE_SIZE, HybridCache, PagePool, SequenceState
from minimax_m1.config import MiniMaxM1Config
from minimax_m1.errors import UserError
from minimax_m1.model import MiniMaxM1ForCausalLM

CONFIG = MiniMaxM1Config(
    vocab_size=89,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_type_list=(0, 1, 0, 1),
    num_local_experts=4,
)


@pytest.fixture(scope="module")
def model() -> MiniMaxM1ForCausalLM:
    model = MiniMaxM1ForCausalLM(CONFIG)
    model.init_weights(seed=0)
    return model.eval()


def run(model, cache, slot, ids):
    return model.forward_packed(ids, cache.batch([slot], [len(ids)]), cache)[0]


def random_ids(count, seed=0):
    return torch.randint(0, 89, (count,), generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.tuples(st.sampled_from(["take", "retain", "release"]), st.integers(0, 5)), max_size=60))
def test_a_page_is_free_exactly_when_nobody_holds_it(actions):
    pool, held = PagePool(8), []
    for action, number in actions:
        if action == "take":
            pages = pool.take(number)
            assert (pages is None) == (number > 8 - len({p for group in held for p in group}))
            if pages is not None:
                assert len(set(pages)) == number
                assert not set(pages) & {p for group in held for p in group}
                held.append(pages)
        elif held:
            pages = held[number % len(held)]
            if action == "retain":
                pool.retain(pages)
                held.append(pages)
            else:
                pool.release(held.pop(number % len(held)))
        assert pool.num_free == 8 - len({p for group in held for p in group})


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 150])
def test_a_fork_goes_on_like_its_source_and_leaves_it_alone(model, length):
    cache = HybridCache(CONFIG, 3, 256)
    prompt, first, second = random_ids(length), random_ids(70, 1), random_ids(70, 2)
    run(model, cache, 0, prompt)
    free = cache.pool.num_free
    assert cache.fork(0, 1)
    assert free - cache.pool.num_free == (length % PAGE_SIZE > 0)  # only an unfinished page is copied
    after_first = torch.cat([run(model, cache, 0, token[None]) for token in first])
    after_second = torch.cat([run(model, cache, 1, token[None]) for token in second])
    for ids, expected in ((first, after_first), (second, after_second)):
        cache.reset(2)
        run(model, cache, 2, prompt)
        assert torch.equal(torch.cat([run(model, cache, 2, token[None]) for token in ids]), expected)
    for slot in range(3):
        cache.release(slot)
    assert cache.pool.num_free == cache.pool.num_pages


@torch.inference_mode()
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_state_swapped_out_and_in_goes_on_to_the_bit(model, on_disk, tmp_path):
    cache = HybridCache(CONFIG, 2, 256)
    prompt, following = random_ids(130), random_ids(5, 1)
    run(model, cache, 0, prompt)
    state = cache.swap_out(0)
    assert cache.pool.num_free == cache.pool.num_pages and state.length == 130
    if on_disk:
        state.save(tmp_path / "state.safetensors")
        state = SequenceState.load(tmp_path / "state.safetensors")
    run(model, cache, 0, random_ids(200, 3))  # somebody else takes the slot and the pages
    assert cache.swap_in(1, state)
    moved = torch.cat([run(model, cache, 1, token[None]) for token in following])
    cache.reset(0)
    run(model, cache, 0, prompt)
    assert torch.equal(moved, torch.cat([run(model, cache, 0, token[None]) for token in following]))


@torch.inference_mode()
def test_without_pages_nothing_happens(model):
    cache = HybridCache(CONFIG, 2, 256, num_pages=3)
    run(model, cache, 0, random_ids(130))
    assert not cache.fork(0, 1) and not cache.reserve(1, 1) and cache.pages[1] == []
    state = cache.swap_out(0)
    assert cache.reserve(0, 64)
    assert not cache.swap_in(1, state) and cache.pages[1] == [] and cache.pool.num_free == 2


def test_states_of_another_model_are_refused(model, tmp_path: Path):
    cache = HybridCache(CONFIG, 1, 128)
    other = HybridCache(CONFIG.replace(num_key_value_heads=1), 1, 128)
    other.reserve(0, 10)
    other.lens[0] = 10
    with pytest.raises(UserError, match="another model"):
        cache.swap_in(0, other.swap_out(0))
    (tmp_path / "other").write_text("no state")
    with pytest.raises(UserError, match="cannot read"):
        SequenceState.load(tmp_path / "other")


@torch.inference_mode()
def test_a_batch_laid_out_on_the_device_is_the_one_that_the_host_lays_out(model):
    cache = HybridCache(CONFIG, 3, 256)
    for slot, length in ((0, 130), (2, PAGE_SIZE)):
        run(model, cache, slot, random_ids(length))
    expected = cache.batch([2, 0], [1, 1])
    slot_ids, positions = torch.tensor([2, 0, cache.spare_slot]), torch.tensor([PAGE_SIZE, 130, 0])
    batch = cache.decode_batch(slot_ids, positions, torch.arange(4, dtype=torch.int32))
    assert batch.only_decodes and batch.bounds == batch.cu_seqlens.tolist()
    assert torch.equal(batch.positions[:2], expected.positions)
    assert torch.equal(batch.cached.kv_lens[:2], expected.cached.kv_lens)
    assert torch.equal(batch.cached.token_rows[:2], expected.cached.token_rows)
    assert batch.cached.token_rows[2] == cache.pool.num_pages * PAGE_SIZE  # padding writes into no sequence's page
