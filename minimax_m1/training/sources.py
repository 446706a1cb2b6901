"""Records of data files by number: an endless order, shuffled by seed, in which any record can be read at once.

Shapes: a source has n records; index i = 0, 1, 2, … of its order is a record of pass i // n, and every pass has every
record once.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimax_m1.errors import UserError
from minimax_m1.tasks import NANO_TASKS
from minimax_m1.tokenizer.chat_template import check_tools, normalize_messages

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".parquet")
FORMS = '{"text"}, {"messages"}, {"prompt", "response"} or {"prompt", "completion"}'
ROW_GROUPS_HELD = 2  # decoded row groups of one source in memory
SCAN_BYTES = 1 << 24
TEXT_BYTES = 1 << 20  # most of a text file that is read as one record
COLUMNS = ("text", "messages", "tools", "prompt", "response", "completion")  # of Parquet files


class RecordError(UserError):
    """A record that cannot be read: where it is, why, and what exactly."""

    def __init__(self, place: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{place}: {reason}" + (f" ({' '.join(detail.split())})" if detail else ""))
        self.place, self.reason = place, reason


@dataclass(frozen=True)
class Record:
    """One checked record: a document's text, or else a conversation."""

    place: str  # FILE:LINE
    text: str = ""
    is_end: bool = True  # of the document: what comes after it is another
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()


# -- Order --------------------------------------------------------------------------------------------------------


def permuted(index: int, size: int, key: str) -> int:
    """Return where a permutation of 0 … size - 1, chosen by `key`, sends `index`; it needs no memory.

    A Feistel network permutes the numbers of an even number of bits, whatever its round function; what falls outside
    the range goes through it again until it falls inside (cycle walking), fewer than four times on average where there
    are 17 numbers or more. Fewer rounds than eight, or fewer bits than six, leave short permutations uneven.
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002).
    """
    assert 0 <= index < size
    half = max(3, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    digest = hashlib.sha256(key.encode()).digest()
    round_keys = [int.from_bytes(digest[start : start + 4], "big") << 32 for start in range(0, 32, 4)]
    while size > 1:
        left, right = index >> half, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        index = left << half | right
        if index < size:
            break
    return index


def _mixed(x: int) -> int:
    """Return 64 well mixed bits of x (the finaliser of splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


class FileRecords:
    """The records of some files, in an endless order that depends on the seed.

    Lines and texts are permuted over all files at once. Of Parquet files, the order of the row groups is permuted and
    the rows within each, so that neighbours in the order share a row group and it is decoded once, or once again where
    readers have drifted apart by more than ROW_GROUPS_HELD. Plain files are mapped into memory; compressed ones are
    decompressed into it when they are opened.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        """Open the files and find where their records lie.

        Raises:
            UserError: a file that cannot be read, or not one record in all of them.
        """
        self.name = name
        files: list[Lines | Text] = []
        groups: list[RowGroup] = []
        read_rows = functools.lru_cache(maxsize=ROW_GROUPS_HELD)(_read_rows)
        for path in paths:
            if path.suffix == ".parquet":
                first_rows = itertools.accumulate(_row_group_sizes(path), initial=0)
                groups += [
                    RowGroup(path, i, begin, end - begin, read_rows)
                    for i, (begin, end) in enumerate(itertools.pairwise(first_rows))
                ]
            else:
                data = _read_bytes(path)
                files.append(Text(path, data) if ".txt" in path.suffixes[-2:] else Lines(path, data))
        self.empty_files = [str(file.path) for file in files if not len(file)]
        self.empty_files += sorted({str(p) for p in paths if p.suffix == ".parquet"} - {str(g.path) for g in groups})
        # Records of one block lie together in the order.
        blocks: list[list[Lines | Text | RowGroup]] = [[file for file in files if len(file)]]
        blocks += [[group] for group in groups if len(group)]
        self._blocks = [block for block in blocks if block]
        self._part_ends = [list(itertools.accumulate(map(len, block))) for block in self._blocks]
        self._num_records = sum(ends[-1] for ends in self._part_ends)
        if not self._num_records:
            raise UserError(f"mixture: {name!r} cannot be used: {', '.join(map(str, paths))}: no records")
        self._block_order = functools.lru_cache(maxsize=4)(self._order_blocks)

    def __len__(self) -> int:
        return self._num_records

    def read(self, index: int, seed: int) -> Record:
        """Return the record at place `index` of the order that `seed` makes.

        Raises:
            RecordError: it cannot be used.
        """
        number, position = divmod(index, len(self))
        key = f"{seed}:{self.name}:{number}"
        order, ends = self._block_order(key)
        place = bisect.bisect_right(ends, position)
        block = order[place]
        position -= ends[place - 1] if place else 0
        row = permuted(position, self._part_ends[block][-1], f"{key}:{block}")
        part = bisect.bisect_right(self._part_ends[block], row)
        row -= self._part_ends[block][part - 1] if part else 0
        return self._blocks[block][part].read(row)

    def _order_blocks(self, key: str) -> tuple[list[int], list[int]]:
        """Return the blocks in the order of one pass, and where in the pass each ends."""
        order = [permuted(i, len(self._blocks), key) for i in range(len(self._blocks))]
        return order, list(itertools.accumulate(self._part_ends[block][-1] for block in order))


# -- Files --------------------------------------------------------------------------------------------------------


class Lines:
    """A JSONL file: the places of its lines that are not empty."""

    def __init__(self, path: Path, data: bytes | mmap.mmap) -> None:
        self.path, self._data = path, data
        breaks = [np.flatnonzero(chunk == 10) + start for start, chunk in _chunks(data)]
        ends = np.concatenate([*breaks, np.array([len(data)], np.int64)])
        begins = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
        # A lone carriage return is an empty line as well; it takes a look into the data.
        kept = ends > begins
        for index in np.flatnonzero(ends - begins == 1):
            kept[index] = data[begins[index] : ends[index]] != b"\r"
        self._begins, self._ends, self._line_numbers = begins[kept], ends[kept], np.flatnonzero(kept) + 1

    def __len__(self) -> int:
        return len(self._begins)

    def read(self, row: int) -> Record:
        """Return one record."""
        begin, end = int(self._begins[row]), int(self._ends[row])
        place = f"{self.path}:{int(self._line_numbers[row])}"
        try:
            content = json.loads(_decode(self._data[begin:end], place))
        except json.JSONDecodeError as error:  # whose own line is always the first
            raise RecordError(place, "broken JSON", f"{error.msg.removesuffix(' at')}, column {error.colno}") from None
        except RecursionError as error:
            raise RecordError(place, "broken JSON", str(error)) from None
        return check_record(content, place)


class Text:
    """A text file, which is one document; a large one is read as several records, cut at line ends.

    There is no record in a file with nothing but space in it.
    """

    def __init__(self, path: Path, data: bytes | mmap.mmap) -> None:
        self.path, self._data = path, data
        self._begins, self._line_numbers = [0], [1]
        while len(data) - self._begins[-1] > TEXT_BYTES:
            begin = self._begins[-1]
            end = data.rfind(b"\n", begin, begin + TEXT_BYTES) + 1 or begin + TEXT_BYTES
            while data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            self._line_numbers.append(self._line_numbers[-1] + data[begin:end].count(b"\n"))
            self._begins.append(end)
        if len(data) <= TEXT_BYTES and not data[:].strip():
            self._begins = []

    def __len__(self) -> int:
        return len(self._begins)

    def read(self, row: int) -> Record:
        """Return the document, or one part of it."""
        ends = [*self._begins[1:], len(self._data)]
        line, data = self._line_numbers[row], self._data[self._begins[row] : ends[row]]
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            begin = data.rfind(b"\n", 0, error.start) + 1
            place = f"{self.path}:{line + data[:begin].count(10)}"  # 10 ends a line
            raise RecordError(place, "not UTF-8", f"{error.reason} at byte {error.start - begin}") from None
        return Record(f"{self.path}:{line}", text, is_end=row + 1 == len(self))


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file."""

    path: Path
    number: int
    first_row: int
    num_rows: int
    read_rows: Any  # (path, number) -> a pyarrow.Table

    def __len__(self) -> int:
        return self.num_rows

    def read(self, row: int) -> Record:
        """Return one row; what is null counts as absent."""
        place = f"{self.path}:{self.first_row + row + 1}"
        columns = self.read_rows(self.path, self.number).slice(row, 1).to_pydict()
        return check_record({name: value for name, [value] in columns.items() if value is not None}, place)


def _chunks(data: bytes | mmap.mmap) -> Iterator[tuple[int, np.ndarray]]:
    """Yield data as uint8 [at most SCAN_BYTES] arrays that are copies, with where each begins."""
    for start in range(0, len(data), SCAN_BYTES):
        yield start, np.frombuffer(data[start : start + SCAN_BYTES], np.uint8)


def _read_bytes(path: Path) -> bytes | mmap.mmap:
    """Map a file into memory, or decompress it.

    Raises:
        UserError: it cannot be read, or is not gzip although it says so.
    """
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(place, "not UTF-8", f"{error.reason} at byte {error.start}") from None


def _row_group_sizes(path: Path) -> list[int]:
    """Return the number of rows of each row group.

    Raises:
        UserError: it is not a Parquet file, or pyarrow is missing.
    """
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path}: Parquet needs pyarrow: pip install "minimax-m1[parquet]"') from None
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a Parquet file that can be read ({' '.join(str(error).split())})") from None
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def _read_rows(path: Path, number: int) -> Any:
    """Decode the columns of a row group that a record may have, as a pyarrow.Table."""
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS]
            return file.read_row_group(number, columns=columns)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise UserError(f"{path}: row group {number} cannot be read ({' '.join(str(error).split())})") from None


# -- Records ------------------------------------------------------------------------------------------------------


def check_record(content: Any, place: str) -> Record:
    """Return a record as what it is: a document or a conversation.

    Raises:
        RecordError: it is neither, or not a whole one.
    """
    if not isinstance(content, Mapping):
        raise RecordError(place, "not an object", f"accepted: {FORMS}")
    if "messages" in content:
        return _check_chat(content["messages"], content.get("tools"), place)
    answer = next((name for name in ("response", "completion") if name in content), None)
    fields = ("text",) if "text" in content else ("prompt", answer) if "prompt" in content and answer else ()
    if not fields:
        raise RecordError(place, "unknown form", f"has {', '.join(map(str, content)) or 'nothing'}; accepted: {FORMS}")
    for name in fields:
        if not isinstance(content[name], str):
            raise RecordError(place, f"{name} is not a string", f"{type(content[name]).__name__}")
        if not content[name].strip():
            raise RecordError(place, f"{name} is empty")
    if "text" in content:
        return Record(place, content["text"])
    turns = [{"role": "user", "content": content["prompt"]}, {"role": "assistant", "content": content[answer]}]
    return Record(place, messages=turns)


def _check_chat(messages: Any, tools: Any, place: str) -> Record:
    try:
        normalized = normalize_messages(messages)
        tools = check_tools(tools)
    except UserError as error:
        raise RecordError(place, "malformed chat", str(error)) from None
    if not any(message["role"] == "assistant" for message in normalized):
        raise RecordError(place, "a chat without an assistant's turn")
    return Record(place, messages=normalized, tools=tools)


# -- Names --------------------------------------------------------------------------------------------------------


def open_records(name: str) -> FileRecords:
    """Open the files that a name of a mixture stands for: a file, a folder or a pattern.

    The streams of one process share what is open, as long as the files do not change.

    Raises:
        UserError: no such file, one of an unknown kind, or one that cannot be read.
    """
    paths = find_files(name)
    versions = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    return _open_versions(name, versions)


@functools.lru_cache(maxsize=64)
def _open_versions(name: str, versions: tuple[tuple[Path, int, int], ...]) -> FileRecords:
    return FileRecords(name, [path for path, _, _ in versions])


def find_files(name: str) -> list[Path]:
    """Return the data files that a name stands for, in the order of their names.

    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name.endswith(SUFFIXES)]
    elif path.exists():
        found = [path]
    else:
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        found = [file for file in found if file.is_file()]
    unknown = [str(file) for file in found if not file.name.endswith(SUFFIXES)]
    if found and not unknown:
        return found
    near = difflib.get_close_matches(name, NANO_TASKS, n=1, cutoff=0.0)[0]
    why = f"{', '.join(unknown)}: unknown kind of file" if unknown else "no family of problems and no data file"
    raise UserError(
        f"mixture: {name!r} cannot be used: {why}; accepted: families (the nearest: {near!r}), "
        f"or files, folders and patterns of {', '.join(SUFFIXES)}"
    )
