"""Files of records: what is accepted, what is refused and in which words, and the order in which they are read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from minimax_m1.errors import UserError
from minimax_m1.training import sources
from minimax_m1.training.sources import FileRecords, RecordError, check_record, find_files, open_records

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def texts_of(records: FileRecords, seed: int = 0, number: int = 0) -> list[str]:
    """Return the texts of one pass, in its order."""
    return [records.read(number * len(records) + i, seed).text for i in range(len(records))]


def test_a_pass_is_shuffled_anew_and_has_every_record_once(tmp_path: Path) -> None:
    names = [f"text {i}" for i in range(50)]
    records = open_records(str(write_lines(tmp_path / "a.jsonl", *({"text": name} for name in names))))
    passes = [texts_of(records), texts_of(records, number=1), texts_of(records, seed=1)]
    assert all(sorted(one) == sorted(names) for one in passes)
    assert len({tuple(one) for one in [names, *passes]}) == 4


def test_a_name_is_a_file_a_folder_or_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "a.jsonl", {"text": "one"})
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n{"text": "four"}'))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("fünf".encode()))
    (tmp_path / "notes.md").write_text("not data")
    assert sorted(texts_of(open_records(str(tmp_path)))) == ["four", "fünf", "one", "three", "two\nlines"]
    assert sorted(texts_of(open_records(str(tmp_path / "*.txt*")))) == ["fünf", "two\nlines"]
    assert texts_of(open_records(str(tmp_path / "a.jsonl"))) == ["one"]


def test_empty_lines_are_no_records_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "one"}\r\n\r\n\n{"text": "two"}\n{')
    records = open_records(str(path))
    assert len(records) == 3
    with pytest.raises(RecordError, match=r"a\.jsonl:6: broken JSON"):
        texts_of(records)


def test_an_unknown_name_names_the_nearest_family(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mixture: 'additoin' .* no data file; accepted: .* 'addition'"):
        find_files("additoin")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"a\.csv: unknown kind of file"):
        find_files(str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="no data file"):
        find_files(str(tmp_path / "*.jsonl"))


BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "a number": (3, "not an object"),
    "no known field": ({"question": "?", "answer": "!"}, r"unknown form \(has question, answer; accepted: "),
    "no field": ({}, r"unknown form \(has nothing"),
    "a prompt alone": ({"prompt": "?"}, "unknown form"),
    "a text of a number": ({"text": 5}, r"text is not a string \(int\)"),
    "an empty text": ({"text": " \n"}, "text is empty"),
    "an empty response": ({"prompt": "?", "response": ""}, "response is empty"),
    "a null completion": ({"prompt": "?", "completion": None}, r"completion is not a string \(NoneType\)"),
    "messages of a string": ({"messages": "Hi"}, r"malformed chat \(messages = 'Hi'"),
    "no messages": ({"messages": []}, "malformed chat"),
    "an unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\]\.role = 'bot'"),
    "no assistant": ({"messages": CHAT[:1]}, "without an assistant's turn"),
    "content of a number": ({"messages": [{"role": "user", "content": 4}, CHAT[1]]}, r"messages\[0\]\.content = 4"),
    "tools of a string": ({"messages": CHAT, "tools": "search"}, "tools = 'search'"),
    "a result without a name": (
        {"messages": [*CHAT, {"role": "tool", "content": "3"}]},
        r"messages\[2\]\.name = None, tool_call_id = None",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_says_where_and_why(content: Any, message: str) -> None:
    with pytest.raises(RecordError, match=r"^data\.jsonl:7: .*" + message):
        check_record(content, "data.jsonl:7")


BAD_LINES = {
    "cut off": (b'{"text": "on', r"broken JSON \(Unterminated string starting, column 10\)"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "broken JSON"),
    "nested too deep": (b"[" * 100_000, "broken JSON"),
    "Latin-1": (b'{"text": "f\xfcnf"}', r"not UTF-8 \(invalid start byte at byte 11\)"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_says_where_and_why(line: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(RecordError, match=r"a\.jsonl:2: " + message):
        texts_of(open_records(str(tmp_path / "a.jsonl")))


def test_a_bad_line_of_a_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TEXT_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"a good line\n" * 30 + b"f\xfcnf\n" + b"another\n" * 3)
    with pytest.raises(RecordError, match=r"a\.txt:31: not UTF-8 \(invalid start byte at byte 1\)"):
        texts_of(open_records(str(tmp_path / "a.txt")))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}' * 100)[:-12])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: is not a whole gzip file"):
        open_records(str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "b.txt.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"b\.txt\.gz: is not a whole gzip file"):
        open_records(str(tmp_path / "b.txt.gz"))
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b" \n")
    with pytest.raises(UserError, match=r"c\.jsonl, .*d\.txt: no records"):
        open_records(str(tmp_path / "[cd].*"))


def test_empty_files_beside_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    (tmp_path / "b.txt").write_text("text")
    records = open_records(str(tmp_path))
    assert (len(records), records.empty_files) == (1, [str(tmp_path / "a.jsonl")])


def test_a_changed_file_is_opened_anew(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"})
    first = open_records(str(path))
    assert open_records(str(path)) is first
    write_lines(path, {"text": "one"}, {"text": "two"})
    assert len(open_records(str(path))) == 2


def test_a_large_text_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TEXT_BYTES", 100)
    text = "Grüße, 你好!\n" * 20 + "ü你" * 100 + "\nend"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    file = sources.Text(tmp_path / "a.txt", text.encode())
    parts = [file.read(i) for i in range(len(file))]
    assert "".join(part.text for part in parts) == text
    assert max(len(part.text.encode()) for part in parts) <= 100
    assert [part.is_end for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [part.place for part in parts[:2]] == [f"{tmp_path}/a.txt:1", f"{tmp_path}/a.txt:6"]


def test_bad_utf8_in_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(RecordError, match=r"a\.txt:2: not UTF-8 \(invalid start byte at byte 0\)"):
        open_records(str(tmp_path / "a.txt")).read(0, 0)


# -- Parquet ------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, Any]], rows_per_group: int = 10) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=rows_per_group)
    return path


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    tools = [{"name": "clock", "description": "tells the time"}]
    rows = [{"id": 1, "text": "a document", "messages": None, "tools": None}]
    rows += [{"id": 2, "text": None, "messages": CHAT, "tools": tools}]
    records = open_records(str(write_parquet(tmp_path / "a.parquet", rows)))
    read = sorted((records.read(i, 0) for i in range(2)), key=lambda record: record.place)
    assert [record.place for record in read] == [f"{tmp_path}/a.parquet:1", f"{tmp_path}/a.parquet:2"]
    assert read[0].text == "a document"
    assert [message["content"] for message in read[1].messages] == ["Hi", "Hello"]
    assert list(read[1].tools) == tools


def test_neighbours_share_row_groups_which_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:03}" for i in range(95)]
    write_parquet(tmp_path / "a.parquet", [{"text": name} for name in names[:60]])
    write_parquet(tmp_path / "b.parquet", [{"text": name} for name in names[60:]])
    decoded, read_rows = [], sources._read_rows
    monkeypatch.setattr(sources, "_read_rows", lambda *group: decoded.append(group) or read_rows(*group))
    records = FileRecords("a", [tmp_path / "a.parquet", tmp_path / "b.parquet"])
    one_pass = texts_of(records)
    assert sorted(one_pass) == names
    assert len(decoded) == len(set(decoded)) == 10
    groups = [int(name) // 10 for name in one_pass]
    changes = sum(a != b for a, b in zip(groups, groups[1:], strict=False))
    assert changes == 9 and groups != sorted(groups)
    first = [name for name in one_pass if int(name) // 10 == groups[0]]
    assert first != sorted(first)  # the rows within a group are shuffled too


def test_parquet_without_a_known_column_and_broken_parquet(tmp_path: Path) -> None:
    records = open_records(str(write_parquet(tmp_path / "a.parquet", [{"question": "?"}, {"question": "!"}])))
    assert len(records) == 2
    with pytest.raises(RecordError, match=r"a\.parquet:[12]: unknown form"):
        records.read(0, 0)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"b\.parquet: is not a Parquet file"):
        open_records(str(tmp_path / "b.parquet"))


def test_lines_and_row_groups_in_one_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", {"text": "line"})
    write_parquet(tmp_path / "b.parquet", [{"text": f"row {i}"} for i in range(4)], rows_per_group=2)
    assert sorted(texts_of(open_records(str(tmp_path)))) == ["line", "row 0", "row 1", "row 2", "row 3"]
