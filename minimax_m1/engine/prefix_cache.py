"""PrefixCache: prompts that begin alike share their pages of keys and values, and checkpoints of lightning states.

Keys and values of a prefix are there at every token; the lightning states are one thing, which is only known where a
prefill stopped to copy it. So a prefix can be continued from a checkpoint and from nowhere else: a match is clamped to
the deepest one. Checkpoints lie at page boundaries, where a cut of the prefill changes no bit of what follows, so a
hit gives the bits of a miss.

The cache is a tree with one node a page. A node's key is the hash of its parent's key and its own PAGE_SIZE token ids,
so equal keys mean equal tokens from the first one on, and a look-up is one dictionary access a page.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from torch import Tensor

from minimax_m1.cache import PAGE_SIZE

MIN_CACHEABLE = PAGE_SIZE + 1  # tokens: one whole page, and a token behind it that has to be run for its logits


class Pages(Protocol):
    """What the cache needs of the pool of pages (`minimax_m1.cache.PagePool`)."""

    def retain(self, pages: Sequence[int], /) -> None:
        """Hold pages once more."""

    def release(self, pages: Sequence[int], /) -> None:
        """Let go of pages."""

    def holders(self, page: int, /) -> int:
        """Return by how many a page is held."""


@dataclass(eq=False, slots=True)
class Node:
    """One cached page and all tokens before it; with `states`, a checkpoint that a sequence can continue from."""

    key: bytes
    parent: Node | None  # of the page before; None: this is a prompt's first page
    page: int
    position: int  # tokens up to the end of this page
    num_children: int = 0
    states: Tensor | None = None  # [Ll, H, D, D], a copy


@dataclass(frozen=True)
class Match:
    """The longest prefix of a prompt that need not be run."""

    position: int  # its tokens, a multiple of PAGE_SIZE; `cached_tokens` of a request
    pages: list[int]  # that hold their keys and values, in order; retain them before anything else takes pages
    states: Tensor  # [Ll, H, D, D] behind the last of these tokens


@dataclass
class PrefixCacheStats:
    """Counts since the cache was made, and what it holds now."""

    queries: int = 0
    query_tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0
    evictions: int = 0  # checkpoints dropped to make room
    checkpoints: int = 0
    pages: int = 0
    num_bytes: int = 0  # of the checkpoints' states; the pages are the pool's


class PrefixCache:
    """Checkpoints of up to `max_bytes` bytes of states, and the pages that lead to them.

    One request: `match` its prompt, retain the match's pages for the sequence and copy the states into its slot; stop
    the prefill at `checkpoint_positions` and at `shared_prefix`, and `insert` there. Running sequences need no lock:
    pages that they hold stay theirs whatever is evicted, and states are copied.

    Only what a prefill computed may go in: decode kernels sum in another order, and a hit must give the bits of a miss.
    """

    def __init__(self, pool: Pages, fingerprint: str, max_bytes: int) -> None:
        """Make an empty cache.

        Args:
            pool: of the pages that `insert` is given.
            fingerprint: everything beside the tokens that decides the bits: model, dtype, quantization, backend,
                expert threshold.
            max_bytes: for the states; 0 caches nothing.
        """
        self._pool, self._max_bytes = pool, max_bytes
        self._fingerprint = fingerprint.encode()
        self._nodes: dict[bytes, Node] = {}
        self._checkpoints: OrderedDict[Node, int] = OrderedDict()  # -> bytes; the least recently used first
        self.stats = PrefixCacheStats()

    def match(self, token_ids: Sequence[int], salt: bytes = b"", *, peek: bool = False) -> Match | None:
        """Return the deepest checkpoint on the way of a prompt, at least one token before its end; None: there is none.

        Args:
            token_ids: the prompt.
            salt: what else decides the bits of this request; requests of different salts share nothing.
            peek: leave no trace: neither counted nor a use.
        """
        found, path = None, []
        for node in self._walk(token_ids, len(token_ids) - 1, salt):
            path.append(node.page)
            found = node if node.states is not None else found
        if not peek:
            self.stats.queries += 1
            self.stats.query_tokens += len(token_ids)
            if found is not None:
                self.stats.hits += 1
                self.stats.hit_tokens += found.position
                self._checkpoints.move_to_end(found)
        if found is None:
            return None
        assert found.states is not None
        return Match(found.position, path[: found.position // PAGE_SIZE], found.states)

    def shared_prefix(self, token_ids: Sequence[int], salt: bytes = b"") -> int:
        """Return how many tokens of a prompt another one had as well, a multiple of PAGE_SIZE below its length.

        It may lie behind the deepest checkpoint. What two prompts had in common a third may have too, so this is a
        place where a prefill should take a checkpoint. Source of the idea: Marconi (arXiv 2411.19379).
        """
        position = 0
        for node in self._walk(token_ids, len(token_ids) - 1, salt):
            position = node.position
        return position

    def insert(
        self, token_ids: Sequence[int], position: int, pages: Sequence[int], states: Tensor, salt: bytes = b""
    ) -> bool:
        """Keep a checkpoint behind the first `position` tokens, and drop others beyond `max_bytes`.

        Where the cache has a page of these tokens, it keeps that one: they are equal to the bit.

        Args:
            token_ids: the prompt; tokens from `position` on do not matter.
            position: a multiple of PAGE_SIZE.
            pages: of the first `position` tokens, held by the caller; the cache holds what it keeps once more.
            states: [Ll, H, D, D] behind these tokens, Ll lightning layers; kept as it is, so it must be a copy.
            salt: as in `match`.

        Returns:
            whether it is kept; its states alone may be beyond `max_bytes`.
        """
        assert 0 < position <= len(token_ids) and position % PAGE_SIZE == 0, f"no page ends at {position}"
        assert len(pages) == position // PAGE_SIZE, f"{len(pages)} pages for {position} tokens"
        if states.nbytes > self._max_bytes:
            return False
        node: Node | None = None
        new_pages = []
        for key, page in zip(self._keys(token_ids, position, salt), pages, strict=True):
            parent, node = node, self._nodes.get(key)
            if node is None:
                node = Node(key, parent, page, PAGE_SIZE if parent is None else parent.position + PAGE_SIZE)
                self._nodes[key] = node
                new_pages.append(page)
                if parent is not None:
                    parent.num_children += 1
        assert node is not None
        self._pool.retain(new_pages)
        self.stats.pages += len(new_pages)
        if node.states is None:
            node.states = states
            self._checkpoints[node] = states.nbytes
            self.stats.checkpoints += 1
            self.stats.num_bytes += states.nbytes
        self._checkpoints.move_to_end(node)
        while self.stats.num_bytes > self._max_bytes:
            self._drop(next(iter(self._checkpoints)))
            self.stats.evictions += 1
        return True

    def evict(self, num_pages: int) -> int:
        """Make `num_pages` pages of the pool free by dropping checkpoints, least recently used first.

        A checkpoint that others lead on from, or whose last page a sequence holds, would free nothing and stays.

        Returns:
            the pages that became free, fewer than asked when no more can.
        """
        freed = 0
        while freed < num_pages:
            idle = (n for n in self._checkpoints if n.num_children == 0 and self._pool.holders(n.page) == 1)
            node = next(idle, None)
            if node is None:
                break
            freed += self._drop(node)
            self.stats.evictions += 1
        return freed

    def clear(self) -> None:
        """Drop everything, as after new weights; the counts stay."""
        self._pool.release([node.page for node in self._nodes.values()])
        self._nodes.clear()
        self._checkpoints.clear()
        self.stats.checkpoints = self.stats.pages = self.stats.num_bytes = 0

    def _drop(self, node: Node) -> int:
        """Drop a checkpoint and the pages that led to it alone; return how many pages became free.

        Pages lead to the checkpoints behind them, whatever becomes of those on the way: states need no ancestors.
        """
        self.stats.num_bytes -= self._checkpoints.pop(node)
        self.stats.checkpoints -= 1
        node.states = None
        freed, leaf, released = 0, node, []
        while leaf.num_children == 0 and leaf.states is None:
            freed += self._pool.holders(leaf.page) == 1
            released.append(leaf.page)
            del self._nodes[leaf.key]
            if leaf.parent is None:
                break
            leaf = leaf.parent
            leaf.num_children -= 1
        self._pool.release(released[::-1])
        self.stats.pages -= len(released)
        return freed

    def _walk(self, token_ids: Sequence[int], length: int, salt: bytes) -> Iterator[Node]:
        """Yield the nodes of the whole pages of the first `length` tokens, as far as there are any."""
        for key in self._keys(token_ids, length, salt):
            node = self._nodes.get(key)
            if node is None:
                return
            yield node

    def _keys(self, token_ids: Sequence[int], length: int, salt: bytes) -> Iterator[bytes]:
        """Yield the keys of the whole pages of the first `length` tokens.

        32 bytes, so that nobody can make two prompts of one key; the salt's length keeps it apart from the fingerprint.
        """
        key = blake2b(len(salt).to_bytes(8, "little") + salt + self._fingerprint, digest_size=32).digest()
        for end in range(PAGE_SIZE, length + 1, PAGE_SIZE):
            ids = array("i", token_ids[end - PAGE_SIZE : end])
            key = blake2b(key + ids.tobytes(), digest_size=32).digest()
            yield key


def checkpoint_positions(
    token_ids: Sequence[int], turn_end_ids: Collection[int], every: int | None = None, start: int = 0
) -> list[int]:
    """Return where the prefill of a prompt should stop for a checkpoint.

    Behind system text and tools, which other conversations have too; behind the last two turns, in case this one goes
    on otherwise; at the end of the prompt, because it goes on. All of them down to a multiple of PAGE_SIZE.

    Args:
        token_ids: the prompt.
        turn_end_ids: the tokens that end a turn (`<end_of_sentence>`); none: the prompt is one turn.
        every: a checkpoint every so many tokens as well.
        start: tokens that need not be run.

    Returns:
        positions above `start` and below the prompt's length, ascending.
    """
    ends = [i + 1 for i, token_id in enumerate(token_ids) if token_id in turn_end_ids]
    wanted = [*ends[_num_leading_turns(token_ids, ends) - 1 :][:1], *ends[-2:], len(token_ids) - 1]
    if every is not None:
        wanted += range(every, len(token_ids), every)
    floored = {position // PAGE_SIZE * PAGE_SIZE for position in wanted}
    return sorted(position for position in floored if start < position < len(token_ids))


def _num_leading_turns(token_ids: Sequence[int], ends: list[int]) -> int:
    """Return how many turns have the role of the first: system text and tools are two turns of the role system.

    A turn is one token (`<begin_of_document>`, or the line break behind the turn before it), then
    `<beginning_of_sentence>`, then the role.
    """
    num_turns = 1
    while num_turns < len(ends) and token_ids[1:3] == token_ids[ends[num_turns - 1] + 1 : ends[num_turns - 1] + 3]:
        num_turns += 1
    return num_turns
