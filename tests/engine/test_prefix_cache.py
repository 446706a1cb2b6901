"""The prefix cache finds what a brute-force model says it must, drops what it may, and leaks no page."""

import time
from hashlib import blake2b

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from minimax_m1.cache import PAGE_SIZE, PagePool
from minimax_m1.engine.prefix_cache import MIN_CACHEABLE, PrefixCache, checkpoint_positions
from minimax_m1.tokenizer import MiniMaxM1Tokenizer, train_tokenizer

EOS = 2


def states_behind(prefix: list[int], nbytes: int = 10) -> Tensor:
    """Return something of `nbytes` bytes that tells what it is a copy of."""
    digest = blake2b(str(list(prefix)).encode(), digest_size=10).digest()
    return torch.tensor([*digest] + [0] * (nbytes - 10), dtype=torch.uint8)


def spell(letters: str, tail: int = 0) -> list[int]:
    """Return a prompt with one page a letter and `tail` tokens more."""
    return [ord(letter) for letter in letters for _ in range(PAGE_SIZE)] + [0] * tail


class Sequence:
    """What an engine does with the cache for one prompt that runs alone."""

    def __init__(self, cache: PrefixCache, pool: PagePool, ids: list[int], salt: bytes = b"") -> None:
        self.cache, self.pool, self.ids, self.salt = cache, pool, ids, salt
        match = cache.match(ids, salt)
        self.cached = match.position if match else 0
        self.pages = match.pages if match else []
        pool.retain(self.pages)
        if match:
            assert match.states.equal(states_behind(ids[: match.position]))
        lacking = -(-len(ids) // PAGE_SIZE) - len(self.pages)
        cache.evict(lacking - pool.num_free)
        new_pages = pool.take(lacking)
        assert new_pages is not None
        self.pages = self.pages + new_pages

    def checkpoint(self, position: int, nbytes: int = 10) -> bool:
        states = states_behind(self.ids[:position], nbytes)
        return self.cache.insert(self.ids, position, self.pages[: position // PAGE_SIZE], states, self.salt)

    def finish(self) -> None:
        self.pool.release(self.pages)


def run(cache: PrefixCache, pool: PagePool, ids: list[int], *positions: int) -> int:
    """Run a prompt from beginning to end, with checkpoints; return how many tokens were cached."""
    sequence = Sequence(cache, pool, ids)
    for position in positions:
        sequence.checkpoint(position)
    sequence.finish()
    return sequence.cached


class AgainstBruteForce(RuleBasedStateMachine):
    """Any order of prompts, checkpoints, evictions and ends, beside a model that is a list of whole prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(64)
        self.cache = PrefixCache(self.pool, "model", max_bytes=45)
        self.recent: list[tuple[bytes, tuple[int, ...]]] = []  # salt and tokens of each checkpoint, oldest first
        self.running: list[Sequence] = []

    def expected_match(self, ids: list[int], salt: bytes) -> tuple[bytes, tuple[int, ...]] | None:
        fitting = [c for c in self.recent if c[0] == salt and len(c[1]) < len(ids) and tuple(ids[: len(c[1])]) == c[1]]
        return max(fitting, key=lambda c: len(c[1]), default=None)

    def cached_pages(self) -> set[tuple[bytes, tuple[int, ...]]]:
        return {(salt, ids[:end]) for salt, ids in self.recent for end in range(PAGE_SIZE, len(ids) + 1, PAGE_SIZE)}

    @rule(
        letters=st.text("ab", max_size=5),
        tail=st.integers(0, PAGE_SIZE - 1),
        salt=st.sampled_from([b"", b"s"]),
        cuts=st.sets(st.integers(1, 5), max_size=2),
    )
    def start(self, letters: str, tail: int, salt: bytes, cuts: set[int]) -> None:
        ids = spell(letters, tail)
        if not ids or len(self.running) == 8:
            return
        shared = {p[1] for p in self.cached_pages() if p[0] == salt and len(p[1]) < len(ids)}
        shared_prefix = max((len(p) for p in shared if tuple(ids[: len(p)]) == p), default=0)
        assert self.cache.shared_prefix(ids, salt) == shared_prefix
        expected = self.expected_match(ids, salt)
        peeked = self.cache.match(ids, salt, peek=True)
        sequence = Sequence(self.cache, self.pool, ids, salt)
        assert sequence.cached == (len(expected[1]) if expected else 0) == (peeked.position if peeked else 0)
        if expected:
            self.recent.remove(expected)
            self.recent.append(expected)
        self.running.append(sequence)
        for position in sorted(PAGE_SIZE * cut for cut in cuts):
            if position <= len(ids):
                assert sequence.checkpoint(position)
                inserted = (salt, tuple(ids[:position]))
                if inserted in self.recent:
                    self.recent.remove(inserted)
                self.recent = [*self.recent, inserted][-4:]  # 45 bytes hold four

    @rule(which=st.integers(0, 7))
    def finish(self, which: int) -> None:
        if which < len(self.running):
            self.running.pop(which).finish()

    @rule(num_pages=st.integers(1, 4))
    def evict(self, num_pages: int) -> None:
        free = self.pool.num_free
        held = {page for sequence in self.running for page in sequence.pages}
        freed = self.cache.evict(num_pages)
        assert self.pool.num_free == free + freed
        expected = 0
        while expected < num_pages:
            for checkpoint in self.recent:
                is_leaf = not any(
                    c != checkpoint and c[0] == checkpoint[0] and extends(c, checkpoint) for c in self.recent
                )
                if is_leaf and self.last_page_of(checkpoint) not in held:
                    break
            else:
                break
            before = self.cached_pages()
            self.recent.remove(checkpoint)
            expected += sum(self.page_of[node] not in held for node in before - self.cached_pages())
        assert freed == expected

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.recent.clear()

    def last_page_of(self, checkpoint: tuple[bytes, tuple[int, ...]]) -> int:
        return self.page_of[checkpoint]

    @invariant()
    def pages_and_bytes(self) -> None:
        assert self.cache.stats.checkpoints == len(self.recent)
        assert self.cache.stats.num_bytes == 10 * len(self.recent) <= 45
        assert self.cache.stats.pages == len(self.cached_pages())
        self.page_of = {}
        for salt, ids in self.recent:
            match = self.cache.match([*ids, 0], salt, peek=True)
            assert match is not None and match.position == len(ids)
            for i, page in enumerate(match.pages):
                assert self.page_of.setdefault((salt, ids[: PAGE_SIZE * (i + 1)]), page) == page
        assert len(set(self.page_of.values())) == len(self.page_of)
        for page in range(self.pool.num_pages):
            holders = sum(sequence.pages.count(page) for sequence in self.running)
            assert self.pool.holders(page) == holders + (page in self.page_of.values())

    def teardown(self) -> None:
        self.cache.clear()
        for sequence in self.running:
            sequence.finish()
        assert self.pool.num_free == self.pool.num_pages


def extends(longer: tuple[bytes, tuple[int, ...]], shorter: tuple[bytes, tuple[int, ...]]) -> bool:
    return longer[1][: len(shorter[1])] == shorter[1]


AgainstBruteForce.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_order = AgainstBruteForce.TestCase


@pytest.fixture
def pool() -> PagePool:
    return PagePool(64)


@pytest.fixture
def cache(pool: PagePool) -> PrefixCache:
    return PrefixCache(pool, "model", max_bytes=30)


def test_one_token_is_always_left_to_run(cache: PrefixCache, pool: PagePool) -> None:
    run(cache, pool, spell("a", 1), PAGE_SIZE)
    assert cache.match(spell("a")) is None
    match = cache.match(spell("a", 1))
    assert match is not None and match.position == PAGE_SIZE == MIN_CACHEABLE - 1


def test_another_model_or_salt_shares_nothing(pool: PagePool) -> None:
    cache, other = PrefixCache(pool, "int8", 100), PrefixCache(pool, "int4", 100)
    run(cache, pool, spell("ab", 1), PAGE_SIZE)
    (key,), (other_key,) = ([*c._keys(spell("a"), PAGE_SIZE, b"")] for c in (cache, other))
    assert key != other_key
    assert cache.match(spell("ab", 1)) is not None
    assert cache.match(spell("ab", 1), b"somebody else") is None
    assert cache.shared_prefix(spell("ab", 1), b"somebody else") == 0


def test_a_change_in_the_first_page_is_a_miss(cache: PrefixCache, pool: PagePool) -> None:
    run(cache, pool, spell("abc", 1), 3 * PAGE_SIZE)
    changed = spell("abc", 1)
    changed[0] += 1
    assert cache.match(changed) is None


def test_the_least_recently_used_states_go_first(cache: PrefixCache, pool: PagePool) -> None:
    for letter in "abc":
        run(cache, pool, spell(letter, 1), PAGE_SIZE)
    assert run(cache, pool, spell("a", 1)) == PAGE_SIZE  # a use of a: b is the oldest now
    run(cache, pool, spell("d", 1), PAGE_SIZE)
    assert [run(cache, pool, spell(letter, 1)) for letter in "abcd"] == [64, 0, 64, 64]
    assert (cache.stats.evictions, cache.stats.num_bytes, cache.stats.pages) == (1, 30, 3)


def test_a_conversation_outlives_its_early_checkpoints(cache: PrefixCache, pool: PagePool) -> None:
    """The budget holds three; the states of early turns go, the pages below the later ones stay."""
    for turn in range(1, 8):
        letters = "abcdefgh"[:turn]
        assert run(cache, pool, spell(letters, 1), PAGE_SIZE * turn) == PAGE_SIZE * (turn - 1)
    assert (cache.stats.checkpoints, cache.stats.pages) == (3, 7)
    assert run(cache, pool, spell("ab", 1)) == 0
    assert cache.shared_prefix(spell("ab", 1)) == 2 * PAGE_SIZE  # so its states are worth taking anew


def test_states_beyond_the_budget_are_not_kept(cache: PrefixCache, pool: PagePool) -> None:
    sequence = Sequence(cache, pool, spell("a", 1))
    assert not sequence.checkpoint(PAGE_SIZE, nbytes=31)
    sequence.finish()
    assert pool.num_free == pool.num_pages and cache.stats.pages == 0


def test_pages_are_kept_once(cache: PrefixCache, pool: PagePool) -> None:
    """Two sequences that ran the same prompt at the same time: the second one's pages are not kept."""
    first, second = Sequence(cache, pool, spell("abc", 1)), Sequence(cache, pool, spell("abd", 1))
    assert set(first.pages).isdisjoint(second.pages)
    for sequence in (first, second):
        sequence.checkpoint(3 * PAGE_SIZE)
        sequence.finish()
    match = cache.match(spell("abd", 1))
    assert match is not None and match.pages == [*first.pages[:2], second.pages[2]]
    assert pool.num_free == pool.num_pages - 4


def test_pages_in_use_are_not_worth_an_eviction(cache: PrefixCache, pool: PagePool) -> None:
    run(cache, pool, spell("ab", 1), PAGE_SIZE * 2)
    running = Sequence(cache, pool, spell("abc", 1))
    assert cache.evict(1) == 0 and running.cached == 2 * PAGE_SIZE
    running.finish()
    assert cache.evict(1) == 2 and pool.num_free == pool.num_pages


def test_statistics(cache: PrefixCache, pool: PagePool) -> None:
    run(cache, pool, spell("ab", 5), PAGE_SIZE)
    run(cache, pool, spell("ac", 5))
    cache.match(spell("ac", 5), peek=True)
    stats = cache.stats
    assert (stats.queries, stats.query_tokens, stats.hits, stats.hit_tokens) == (2, 266, 1, 64)


def test_long_chains_need_no_recursion() -> None:
    pool = PagePool(10_000)
    cache = PrefixCache(pool, "model", max_bytes=100)
    ids = [i % 1000 for i in range(PAGE_SIZE * 10_000)]
    pages = pool.take(10_000)
    assert pages is not None
    for count in (9_999, 1, 5_000):
        cache.insert(ids, PAGE_SIZE * count, pages[:count], states_behind([]))
    pool.release(pages)
    match = cache.match(ids)
    assert match is not None and match.pages == pages[:-1]
    assert cache.evict(10_000) == 9_999 and pool.num_free == 10_000


def test_a_million_tokens_are_matched_quickly() -> None:
    ids = [i * 7919 % 200_000 for i in range(1_000_000)]
    count = len(ids) // PAGE_SIZE
    pool = PagePool(count)
    cache = PrefixCache(pool, "model", max_bytes=100)
    pages = pool.take(count)
    assert pages is not None
    cache.insert([*ids, 0], PAGE_SIZE * count, pages, states_behind([]))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        match = cache.match([*ids, 0])
        seconds.append(time.perf_counter() - start)
    assert match is not None and match.position == 1_000_000
    assert min(seconds) < 0.2  # 0.03 s on an idle core


# -- where to stop --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> MiniMaxM1Tokenizer:
    return train_tokenizer(["You are helpful. name system user ai tool weather"] * 9, vocab_size=300)


def positions(tokenizer: MiniMaxM1Tokenizer, messages: list[dict], **options) -> tuple[list[int], list[int]]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=options.pop("tools", None))
    return ids, checkpoint_positions(ids, {tokenizer.eos_token_id}, **options)


def floor(length: int) -> int:
    return length // PAGE_SIZE * PAGE_SIZE


def test_a_conversation_is_cut_behind_tools_and_its_last_turns(tokenizer: MiniMaxM1Tokenizer) -> None:
    tools = [{"name": "weather", "parameters": {"type": "object"}}]
    messages = [
        {"role": role, "content": f"{i} You are helpful. " * 20}
        for i, role in enumerate(["system", "user", "assistant", "user", "assistant", "user"])
    ]
    ids, cuts = positions(tokenizer, messages, tools=tools)
    ends = [i + 1 for i, token_id in enumerate(ids) if token_id == tokenizer.eos_token_id]
    assert len(ends) == 7  # system text and tools are two turns
    assert cuts == sorted({floor(ends[1]), floor(ends[-2]), floor(ends[-1]), floor(len(ids) - 1)})
    assert positions(tokenizer, messages)[1][0] == floor(ends[0])  # without tools the system turn is the beginning
    _, later = positions(tokenizer, messages, tools=tools, start=floor(ends[-2]))
    assert later == [cut for cut in cuts if cut > floor(ends[-2])]


def test_the_next_turn_continues_from_the_end_of_this_prompt(tokenizer: MiniMaxM1Tokenizer) -> None:
    messages = [{"role": "system", "content": "You are helpful. " * 30}, {"role": "user", "content": "weather"}]
    ids, cuts = positions(tokenizer, messages)
    answer = {"role": "assistant", "content": "helpful", "reasoning_content": "You are"}
    following, _ = positions(tokenizer, [*messages, answer, {"role": "user", "content": "weather"}])
    assert cuts[-1] == floor(len(ids) - 1) and following[: cuts[-1]] == ids[: cuts[-1]]


@pytest.mark.parametrize(
    ("length", "every", "start", "expected"),
    [
        (64, None, 0, []),
        (65, None, 0, [64]),
        (65, None, 64, []),
        (1000, 256, 0, [256, 512, 768, 960]),
        (1000, 100, 500, [576, 640, 768, 896, 960]),
        (1000, 10_000, 0, [960]),
        (1, 1, 0, []),
    ],
)
def test_a_prompt_without_turns(length: int, every: int | None, start: int, expected: list[int]) -> None:
    assert checkpoint_positions([7] * length, {EOS}, every, start) == expected
