"""MiniMaxM1Tokenizer: text to token ids and back, exactly as M1 does it.

Ids are Python ints, 0 <= id < len(tokenizer); tensors of ids are int64. The `tokenizers` library does the pre-tokenizer
and the merges; special tokens are found here, because whether a text may contain them is decided call by call.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TextIO, overload

from tokenizers import Tokenizer

from minimax_m1.errors import UserError
from minimax_m1.tokenizer import chat_template
from minimax_m1.tokenizer.chat_template import Message, SpecialTokenGuard
from minimax_m1.tokenizer.streaming import IncrementalDecoder, read_texts, safe_pieces
from minimax_m1.tokenizer.vocabulary import (
    BOS_TOKEN,
    EOS_TOKEN,
    O200K_SPLIT,
    OFFICIAL_ADDED_TOKENS,
    OFFICIAL_BASE_SIZE,
    PAD_TOKEN,
    SINGLE_DIGIT_SPLIT,
    UNK_TOKEN,
    build_backend,
    byte_characters,
)

if TYPE_CHECKING:
    import torch

_DEFAULT_SETTINGS: dict[str, Any] = {
    "add_prefix_space": False,
    "bos_token": BOS_TOKEN,
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS_TOKEN,
    "thinking_close": "\n</think>\n\n",  # as M1 was trained
    "unk_token": UNK_TOKEN,
}
SLICE_CHARS = 1 << 14  # of a long text: some 10 ms of encoding
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(byte_characters())}


class MiniMaxM1Tokenizer:
    """A byte-level BPE tokenizer with M1's special tokens and chat format.

    `bos_token_id`, `eos_token_id`, `pad_token_id`, `unk_token_id` and the strings `bos_token`, … are attributes.
    `thinking_close` is what a model is made to write when its thinking has to end, laid out as in its training.
    Nothing is added to a text, neither bos nor eos. Safe to share between threads.
    """

    def __init__(
        self, backend: Tokenizer, added_tokens: Mapping[str, int], settings: Mapping[str, Any] | None = None
    ) -> None:
        """Join the parts; users call `from_pretrained` or `train_tokenizer`.

        Args:
            backend: the BPE model and pre-tokenizer, without added tokens.
            added_tokens: the special tokens' ids.
            settings: the content of tokenizer_config.json; unknown keys are kept for `save_pretrained`.
        """
        self._backend = backend
        self.added_tokens = dict(added_tokens)
        self.settings = {**_DEFAULT_SETTINGS, **(settings or {})}
        self.chat_template = chat_template.mended_template(self.settings.pop("chat_template", None))
        self._added_by_id = {token_id: token for token, token_id in self.added_tokens.items()}
        # The official settings name no pad token; its id is known, its spelling in the official tokenizer.json is not.
        pad_token = PAD_TOKEN if PAD_TOKEN in self.added_tokens else self._added_by_id.get(OFFICIAL_BASE_SIZE)
        self.settings.setdefault("pad_token", pad_token)
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._bytes_by_id: dict[int, bytes] = {}
        self._size = max(backend.get_vocab_size(), *(token_id + 1 for token_id in self.added_tokens.values()))
        self.bos_token, self.bos_token_id = self._named_special("bos_token")
        self.eos_token, self.eos_token_id = self._named_special("eos_token")
        self.pad_token, self.pad_token_id = self._named_special("pad_token")
        self.unk_token, self.unk_token_id = self._named_special("unk_token")
        self.thinking_close = self.settings["thinking_close"]
        if not isinstance(self.thinking_close, str) or "</think>" not in self.thinking_close:
            raise UserError(
                f"tokenizer_config.json: thinking_close = {self.thinking_close!r}: accepted is a text with </think>"
            )

    def _named_special(self, name: str) -> tuple[str, int]:
        token = self.settings[name]
        token = token["content"] if isinstance(token, Mapping) else token  # Transformers also writes AddedToken dicts
        if token not in self.added_tokens:
            raise UserError(f"tokenizer_config.json: {name} = {token!r}: accepted is one of the added tokens")
        return token, self.added_tokens[token]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MiniMaxM1Tokenizer":
        """Load from `tokenizer.json`, or else from the official `merges.txt`; `tokenizer_config.json` may be absent.

        The vocabulary follows from the merges, and the official added tokens (ids 200000-200049) are known here, so
        `merges.txt` is enough.

        Raises:
            UserError: no folder, no tokenizer in it, or files that cannot be read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"folder = {folder}: no such folder")
        settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        if (folder / "tokenizer.json").exists():
            backend, added_tokens = _load_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "merges.txt").exists():
            backend, added_tokens = _load_merges(folder / "merges.txt")
        else:
            raise UserError(f"folder = {folder}: has neither tokenizer.json nor merges.txt")
        return cls(backend, added_tokens, settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which Transformers reads as well; creates the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(self._backend.to_str())
        content["added_tokens"] = [
            {"id": token_id, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for token_id, token in sorted(self._added_by_id.items())
        ]
        # GPT2Tokenizer, the official class, would put GPT-2's split in place of the one in tokenizer.json.
        ours = {"chat_template": self.chat_template, "tokenizer_class": "PreTrainedTokenizerFast"}
        settings = dict(sorted({**self.settings, **ours}.items()))
        for name, value in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
            (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Return the number of ids, added tokens included."""
        return self._size

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included (Transformers leaves them out; here it equals `len`)."""
        return self._size

    @property
    def num_valid_tokens(self) -> int:
        """Ids from here on stand for nothing and must never be sampled; a model's embedding may be larger."""
        return self._size

    @property
    def valid_token_ids(self) -> range:
        """The ids that a sampler may emit."""
        return range(self._size)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the added tokens, ascending."""
        return sorted(self._added_by_id)

    def get_vocab(self) -> dict[str, int]:
        """Return every token, spelled in byte characters (added tokens as they are), with its id."""
        return self._backend.get_vocab() | self.added_tokens

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of one token as spelled in `get_vocab`.

        Raises:
            UserError: there is no such token.
        """
        token_id = self.added_tokens.get(token)
        token_id = self._backend.token_to_id(token) if token_id is None else token_id
        if token_id is None:
            raise UserError(f"token = {token!r}: not in the vocabulary")
        return token_id

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Return the ids of `text`.

        Args:
            text: any text.
            allow_special: False encodes what looks like a special token as ordinary text: for text from outside.

        Raises:
            UserError: the text is not a str, or holds half of a surrogate pair, which UTF-8 cannot write.
        """
        if not isinstance(text, str):
            raise UserError(f"text = {text!r}: accepted is a str")
        try:
            if not allow_special or not self.added_tokens:
                return self._encode_plain(text)
            ids: list[int] = []
            for index, piece in enumerate(self._special_pattern.split(text)):
                if index % 2:
                    ids.append(self.added_tokens[piece])
                elif piece:
                    ids += self._encode_plain(piece)
            return ids
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"text = {text[:60]!r}: holds a lone surrogate") from error

    @overload
    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool = ...,
        padding_side: Literal["right", "left"] = ...,
        return_tensors: Literal["pt"] | None = ...,
        allow_special: bool = ...,
        stream: Literal[False] = ...,
    ) -> dict[str, Any]: ...

    @overload
    def __call__(
        self, text: str | Path | TextIO | BinaryIO | Iterable[str], *, allow_special: bool = ..., stream: Literal[True]
    ) -> Iterator[list[int]]: ...

    def __call__(
        self,
        text: Any,
        *,
        padding: bool = False,
        padding_side: Literal["right", "left"] = "right",
        return_tensors: Literal["pt"] | None = None,
        allow_special: bool = True,
        stream: bool = False,
    ) -> dict[str, Any] | Iterator[list[int]]:
        """Encode one text or a batch for `model(**inputs)`, or a text larger than memory piece by piece.

        Args:
            text: a str; a list of str; with `stream`, a str, a pathlib.Path, an open file or an iterable of str that
                are the pieces, cut anywhere, of one text.
            padding: fill the batch's rows with `pad_token_id` up to the longest one; the mask is 0 there.
            padding_side: where the padding goes.
            return_tensors: "pt" for int64 tensors [B, T] (B = 1 for a str); None for lists of ints (flat for a str).
            allow_special: see `encode`.
            stream: return an iterator over lists of ids, which joined are exactly the ids of the whole text.

        Returns:
            `{"input_ids", "attention_mask"}`, or the iterator.

        Raises:
            UserError: not text, an unknown option, or rows of different lengths for a tensor without padding.
        """
        if stream:
            return self._encode_stream(text, allow_special)
        if padding_side not in ("right", "left"):
            raise UserError(f"padding_side = {padding_side!r}: accepted are 'right' and 'left'")
        if isinstance(text, str):
            rows = [self.encode(text, allow_special=allow_special)]
        elif isinstance(text, Sequence):
            rows = [self.encode(row, allow_special=allow_special) for row in text]
        else:
            raise UserError(f"text = {text!r}: accepted is a str or a list of str (or anything readable with stream)")
        inputs = self._batch(rows, padding, padding_side, return_tensors)
        return (
            {name: rows[0] for name, rows in inputs.items()} if isinstance(text, str) and not return_tensors else inputs
        )

    def _batch(
        self, rows: list[list[int]], padding: bool, padding_side: str, return_tensors: str | None
    ) -> dict[str, Any]:
        masks = [[1] * len(row) for row in rows]
        if padding:
            longest = max(map(len, rows), default=0)
            gaps = [longest - len(row) for row in rows]
            if padding_side == "right":
                rows = [row + [self.pad_token_id] * gap for row, gap in zip(rows, gaps, strict=True)]
                masks = [mask + [0] * gap for mask, gap in zip(masks, gaps, strict=True)]
            else:
                rows = [[self.pad_token_id] * gap + row for row, gap in zip(rows, gaps, strict=True)]
                masks = [[0] * gap + mask for mask, gap in zip(masks, gaps, strict=True)]
        if return_tensors is None:
            return {"input_ids": rows, "attention_mask": masks}
        if return_tensors != "pt":
            raise UserError(f"return_tensors = {return_tensors!r}: accepted are 'pt' and None")
        if len({len(row) for row in rows}) != 1:
            raise UserError(f"padding = {padding}: texts of different lengths (or none) need padding=True for a tensor")
        import torch

        return {
            "input_ids": torch.tensor(rows, dtype=torch.int64),
            "attention_mask": torch.tensor(masks, dtype=torch.int64),
        }

    def _encode_stream(self, source: Any, allow_special: bool) -> Iterator[list[int]]:
        self._require_known_split()
        special_tokens = tuple(self.added_tokens) if allow_special else ()
        for piece in safe_pieces(read_texts(source), special_tokens):
            yield self.encode(piece, allow_special=allow_special)

    def _encode_plain(self, text: str) -> list[int]:
        """Encode a text without special tokens; a long one in slices, for other threads wait while one is encoded."""
        if len(text) <= SLICE_CHARS or not self._has_known_split:
            return self._backend.encode(text, add_special_tokens=False).ids
        slices = safe_pieces([text], chunk_chars=SLICE_CHARS)
        return [token for s in slices for token in self._backend.encode(s, add_special_tokens=False).ids]

    @functools.cached_property
    def _has_known_split(self) -> bool:
        """Whether the safe places to cut, which were worked out for two expressions, hold here."""
        return self._backend.normalizer is None and self.split_patterns in ([O200K_SPLIT], [SINGLE_DIGIT_SPLIT])

    def pieces(self, text: str) -> list[int]:
        """Return the ids that the merges make of `text`, uncut and spelled in byte characters as in `get_vocab`."""
        return [piece.id for piece in self._backend.model.tokenize(text)]

    @property
    def split_patterns(self) -> list[str]:
        """The regular expressions that cut a text into the pieces inside which merges apply."""
        pieces = json.loads(self._backend.pre_tokenizer.__getstate__()).get("pretokenizers", [])
        return [piece["pattern"].get("Regex") for piece in pieces if piece["type"] == "Split"]

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The byte-pair merges in order, spelled in byte characters."""
        return [(left, right) for left, right in json.loads(self._backend.to_str())["model"]["merges"]]

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """The most bytes that one token stands for."""
        return max(len(self.token_bytes(token)) for token in self.get_vocab().values())

    def _require_known_split(self) -> None:
        if not self._has_known_split:
            raise UserError(
                "stream = True: accepted only with the o200k pre-tokenizer; this tokenizer.json has another"
            )

    def decode(self, token_ids: "Sequence[int] | torch.Tensor | int", skip_special_tokens: bool = False) -> str:
        """Return the text of ids (a list, a one-dimensional tensor, or one id); invalid UTF-8 becomes U+FFFD.

        Raises:
            UserError: an id is not in the vocabulary, or the tensor has more than one dimension.
        """
        tokens = [self.token_bytes(token_id, skip_special_tokens) for token_id in _id_list(token_ids)]
        return b"".join(tokens).decode("utf-8", errors="replace")

    def batch_decode(
        self, sequences: "Sequence[Sequence[int]] | torch.Tensor", skip_special_tokens: bool = False
    ) -> list[str]:
        """Decode every row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def stream_decoder(self, skip_special_tokens: bool = False) -> IncrementalDecoder:
        """Return a decoder for ids that come one by one."""
        return IncrementalDecoder(lambda token_id: self.token_bytes(token_id, skip_special_tokens))

    def token_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """Return the bytes that one token stands for; of a special token its spelling, or nothing if it is skipped.

        Raises:
            UserError: the id is not in the vocabulary.
        """
        if token_id in self._added_by_id:
            return b"" if skip_special_tokens else self._added_by_id[token_id].encode()
        known = self._bytes_by_id.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < self._size else None
            if token is None:
                raise UserError(f"token id = {token_id}: accepted are ids from 0 to {self._size - 1}")
            known = self._bytes_by_id[token_id] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        return known

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[True] = ...,
        continue_final_message: bool = ...,
        return_tensors: None = ...,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
        continue_final_message: bool = ...,
        return_tensors: None = ...,
    ) -> str: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[True] = ...,
        continue_final_message: bool = ...,
        return_tensors: Literal["pt"],
    ) -> dict[str, Any]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        tokenize: bool = True,
        continue_final_message: bool = False,
        return_tensors: Literal["pt"] | None = None,
    ) -> list[int] | str | dict[str, Any]:
        """Render a conversation as the model saw it in training.

        What looks like a special token inside a message or a tool becomes ordinary text in the ids; so prefer the ids
        to encoding the string, which cannot tell the two apart. The reasoning of assistant turns after the last user
        message is kept (the model is in the middle of a chain of tool calls); that of earlier turns is dropped.

        Args:
            messages: see `chat_template.normalize_messages`.
            tools: definitions the model may call: `{"name", "description", "parameters"}`, bare or in OpenAI's
                `{"type": "function", "function": ...}`.
            add_generation_prompt: end with the beginning of the assistant's turn.
            tokenize: False returns the string.
            continue_final_message: leave the last message, the assistant's, open for the model to continue; then
                there is no generation prompt.
            return_tensors: "pt" for `{"input_ids", "attention_mask"}`, int64 [1, T], for `model.generate(**inputs)`.

        Returns:
            ids, the string, or the mapping.

        Raises:
            UserError: malformed messages or tools, naming the field.
        """
        conversation = {
            "messages": chat_template.normalize_messages(messages),
            "tools": chat_template.check_tools(tools),
        }
        guard = SpecialTokenGuard(self.added_tokens, conversation)
        text = chat_template.render(
            self.chat_template,
            {
                **guard.mark(conversation),
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
            },
        )
        if continue_final_message:
            text = self._without_end(text, messages)
        if not tokenize:
            return text.replace(guard.sentinel, "")
        ids: list[int] = []
        for index, piece in enumerate(self._special_pattern.split(text)):
            if index % 2:
                ids.append(self.added_tokens[piece])
            elif piece:
                ids += self.encode(piece.replace(guard.sentinel, ""), allow_special=False)
        return ids if return_tensors is None else self._batch([ids], False, "right", return_tensors)

    def _without_end(self, text: str, messages: Sequence[Message]) -> str:
        end = self.eos_token + "\n"
        if messages[-1]["role"] != "assistant" or not text.endswith(end):
            raise UserError("continue_final_message = True: accepted when the last message is the assistant's")
        return text.removesuffix(end)


def _id_list(token_ids: Any) -> list[int]:
    if isinstance(token_ids, int):
        return [token_ids]
    ids = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
    ids = [ids] if isinstance(ids, int) else ids
    if any(isinstance(token_id, Sequence) for token_id in ids):
        raise UserError("token_ids: has more than one dimension; use batch_decode for a batch")
    return [int(token_id) for token_id in ids]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, accepted is an object")
    return content


def _load_tokenizer_json(path: Path) -> tuple[Tokenizer, dict[str, int]]:
    """Read the model and the added tokens apart: special tokens are found by this package, not by the library."""
    content = _read_json(path)
    added = content.get("added_tokens") or []
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(f"{path}: added token {token.get('content')!r} strips or splits by word; not supported")
    content["added_tokens"] = []
    try:
        backend = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path}: not a tokenizer of the tokenizers library ({error})") from error
    if not added:
        raise UserError(f"{path}: has no added_tokens; M1's special tokens are needed")
    return backend, {token["content"]: token["id"] for token in added}


def _load_merges(path: Path) -> tuple[Tokenizer, dict[str, int]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges) or len(merges) != OFFICIAL_BASE_SIZE - 256:
        raise UserError(
            f"{path}: has {len(merges)} merges; accepted are the official {OFFICIAL_BASE_SIZE - 256}, two tokens a line"
        )
    backend = build_backend([(left, right) for left, right in merges], O200K_SPLIT)
    return backend, {token: OFFICIAL_BASE_SIZE + offset for offset, token in enumerate(OFFICIAL_ADDED_TOKENS)}
