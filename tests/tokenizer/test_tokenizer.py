"""The tokenizer's public behaviour, offline, on a small trained one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimax_m1.errors import UserError
from minimax_m1.tokenizer import MiniMaxM1Tokenizer, train_tokenizer
from minimax_m1.tokenizer.vocabulary import TRAINED_ADDED_TOKENS

TEXT = "The answer is 12.\n<end_of_sentence> naïve 你好 🙂"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def test_single_text(small_tokenizer: MiniMaxM1Tokenizer) -> None:
    ids = small_tokenizer.encode(TEXT)
    assert small_tokenizer(TEXT) == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    tensors = small_tokenizer(TEXT, return_tensors="pt")
    assert set(tensors) == {"input_ids", "attention_mask"}
    assert tensors["input_ids"].dtype == tensors["attention_mask"].dtype == torch.int64
    assert tensors["input_ids"].tolist() == [ids]
    assert tensors["attention_mask"].shape == (1, len(ids))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch(small_tokenizer: MiniMaxM1Tokenizer, side: str) -> None:
    texts = ["The answer", "The answer is 1234567", ""]
    batch = small_tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")  # type: ignore[call-overload]
    longest = max(len(small_tokenizer.encode(text)) for text in texts)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest)
    for text, row, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row[mask == 1].tolist() == small_tokenizer.encode(text)
        assert (row[mask == 0] == small_tokenizer.pad_token_id).all()
        assert mask.tolist() == sorted(mask.tolist(), reverse=side == "right")
    assert small_tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts


def test_ragged_batch_without_tensors(small_tokenizer: MiniMaxM1Tokenizer) -> None:
    batch = small_tokenizer(["a", "The answer 12"])
    assert batch["input_ids"] == [small_tokenizer.encode("a"), small_tokenizer.encode("The answer 12")]
    with pytest.raises(UserError, match="padding=True"):
        small_tokenizer(["a", "The answer 12"], return_tensors="pt")


@given(UNICODE)
def test_decode_inverts_encode(small_tokenizer: MiniMaxM1Tokenizer, text: str) -> None:
    for allow_special in (True, False):
        ids = small_tokenizer.encode(text, allow_special=allow_special)
        assert small_tokenizer.decode(ids) == text
        assert all(0 <= token_id < len(small_tokenizer) for token_id in ids)


def test_special_text_is_special_only_where_allowed(small_tokenizer: MiniMaxM1Tokenizer) -> None:
    text = "a<end_of_sentence>b"
    assert small_tokenizer.eos_token_id in small_tokenizer.encode(text)
    ordinary = small_tokenizer.encode(text, allow_special=False)
    assert not set(ordinary) & set(small_tokenizer.all_special_ids)
    assert small_tokenizer.decode(ordinary) == text
    assert small_tokenizer.decode(small_tokenizer.encode(text), skip_special_tokens=True) == "ab"


def test_decode_takes_lists_tensors_and_single_ids(small_tokenizer: MiniMaxM1Tokenizer) -> None:
    ids = small_tokenizer.encode(TEXT)
    tensor = torch.tensor(ids)
    assert small_tokenizer.decode(tensor) == small_tokenizer.decode(list(tensor)) == small_tokenizer.decode(ids) == TEXT
    assert small_tokenizer.decode(84) == small_tokenizer.decode(torch.tensor(84)) == "T"
    assert small_tokenizer.decode([0xC3]) == "\ufffd"


def test_bad_input_is_one_line(small_tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    tokenizer = small_tokenizer
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "merges.txt").write_text("#version: 0.2\nĠ t\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    attempts = [
        lambda: tokenizer.encode(None),  # type: ignore[arg-type]
        lambda: tokenizer.encode("half \ud83d"),
        lambda: tokenizer(3),  # type: ignore[call-overload]
        lambda: tokenizer(["a", 3]),  # type: ignore[list-item]
        lambda: tokenizer("a", return_tensors="np"),  # type: ignore[call-overload]
        lambda: tokenizer(["a"], padding_side="up"),  # type: ignore[call-overload]
        lambda: tokenizer.decode([len(tokenizer)]),
        lambda: tokenizer.decode([-1]),
        lambda: tokenizer.decode(torch.zeros(1, 2, dtype=torch.int64)),
        lambda: tokenizer.convert_tokens_to_ids("nothing such"),
        lambda: train_tokenizer(["a"], 260),
        lambda: MiniMaxM1Tokenizer.from_pretrained(tmp_path / "missing"),
        *(lambda name=name: MiniMaxM1Tokenizer.from_pretrained(tmp_path / name) for name in ("empty", "broken", "cut")),
    ]
    for attempt in attempts:
        with pytest.raises(UserError) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_save_and_load_are_inverse(small_tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    small_tokenizer.settings["model_max_length"] = 4096
    small_tokenizer.save_pretrained(first)
    again = MiniMaxM1Tokenizer.from_pretrained(first)
    again.save_pretrained(second)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert json.loads((second / "tokenizer_config.json").read_text())["model_max_length"] == 4096
    assert again.get_vocab() == small_tokenizer.get_vocab()
    assert again.encode(TEXT) == small_tokenizer.encode(TEXT)
    assert again.chat_template == small_tokenizer.chat_template


def test_missing_or_wrong_special_tokens_are_named(small_tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    small_tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {name: "<nothing>"}))
        with pytest.raises(UserError, match=f"{name} = '<nothing>'"):
            MiniMaxM1Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert MiniMaxM1Tokenizer.from_pretrained(tmp_path).pad_token_id == small_tokenizer.pad_token_id


def test_transformers_reads_a_trained_tokenizer_alike(small_tokenizer: MiniMaxM1Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small_tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == small_tokenizer.encode(TEXT)


def test_trained_tokenizer_has_the_promised_ids() -> None:
    texts = ["The answer is 1234.\n", "<think>\nhm\n</think>\n"] * 5
    tokenizer = train_tokenizer(iter(texts), vocab_size=300)
    again = train_tokenizer(texts, vocab_size=300)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.encode("The answer 12") == again.encode("The answer 12")
    assert [tokenizer.decode([byte]).encode() for byte in range(128)] == [bytes([byte]) for byte in range(128)]
    first_added = len(tokenizer) - len(TRAINED_ADDED_TOKENS)
    assert [tokenizer.added_tokens[token] for token in TRAINED_ADDED_TOKENS] == list(range(first_added, len(tokenizer)))
    assert len(tokenizer) <= 300
    assert tokenizer.encode("1234") == [ord(digit) for digit in "1234"]
    assert not set(tokenizer.encode("<think></think>")) & set(tokenizer.all_special_ids)
    rich = train_tokenizer([f"word{i} other{i * 7} {'x' * (i % 9)}yz{chr(97 + i % 26)}" for i in range(300)], 320)
    assert len(rich) == 320


def test_import_does_not_load_torch() -> None:
    code = "import sys, minimax_m1.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_close_of_the_thinking_is_the_checkpoints_own(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two"], vocab_size=280)
    assert tokenizer.thinking_close == "\n</think>\n"  # the chat template's layout
    tokenizer.save_pretrained(tmp_path)
    assert MiniMaxM1Tokenizer.from_pretrained(tmp_path).thinking_close == "\n</think>\n"
    with pytest.raises(UserError, match="thinking_close"):
        MiniMaxM1Tokenizer(tokenizer._backend, tokenizer.added_tokens, {"thinking_close": "stop"})
