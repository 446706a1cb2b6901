"""Settings as TOML: what is written is read back, and what is no TOML is one clear line."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimax_m1.errors import UserError
from minimax_m1.settings import BenchSettings, ChatSettings, EvalSettings, option, parse_bytes, read_toml, to_toml

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8)


@dataclass(frozen=True)
class Anything:
    value: Any = option(None, "of any type that TOML has")
    path: Path | None = option(None, "a path")


@given(value=values)
def test_toml_reads_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(Anything(value=value, path=path)), encoding="utf-8", newline="")
    assert read_toml(path) == {"value": value, "path": str(path)}


def test_none_is_left_out() -> None:
    assert to_toml(Anything()) == ""


@pytest.mark.parametrize("settings", [ChatSettings, EvalSettings, BenchSettings])
def test_every_field_has_help(settings: type) -> None:
    assert all(field.metadata["help"] for field in fields(settings))


def test_a_default_table_is_copied() -> None:
    @dataclass(frozen=True)
    class WithTable:
        table: dict[str, int] = option({"a": 1}, "a table")

    WithTable().table["a"] = 2
    assert WithTable().table == {"a": 1}


@pytest.mark.parametrize("content", [b"a = [", b"\xff", b"a = 1\na = 2"])
def test_not_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(UserError, match=r"config: .*bad.toml is not TOML"):
        read_toml(tmp_path / "bad.toml")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config: cannot read .*: No such file"):
        read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        ("1048576", 2**20),
        ("10B", 10),
        ("512MB", 512_000_000),
        ("0.1GB", 10**8),
        ("8GiB", 2**33),
        ("1.5 KiB", 1536),
        (" .5GiB ", 2**29),
    ],
)
def test_byte_sizes(value: int | str, expected: int) -> None:
    assert parse_bytes("cache_bytes", value) == expected


@pytest.mark.parametrize(
    "value", ["8Gb", "8G", "", "GiB", "-1", "0", "0GiB", "1e9", "1.5", "8 Gi B", "٣GiB", 0, -5, True, 1.5]
)
def test_no_byte_sizes(value: object) -> None:
    with pytest.raises(UserError, match=r"cache_bytes: .* cannot be used; accepted: bytes, or a number of KB"):
        parse_bytes("cache_bytes", value)
