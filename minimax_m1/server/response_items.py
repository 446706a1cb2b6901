"""The items of Responses: reading a client's, making a conversation of them, and writing those of an answer."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from minimax_m1.errors import UserError
from minimax_m1.sampling import TokenLogprob
from minimax_m1.server.answers import Gain, chat_logprobs
from minimax_m1.server.reading import read_kind, read_object, read_parts, read_text, seal, shown, unseal
from minimax_m1.server.replies import new_id
from minimax_m1.server.service import Exchange
from minimax_m1.thinking import Thinking, opens_thinking
from minimax_m1.tokenizer import AnswerEvent, MiniMaxM1Tokenizer, ToolCall

# What may be included.
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"

_TEXT_FIELDS = ("text", "prompt_cache_breakpoint")  # a breakpoint changes nothing: prompts are cached by themselves
_INPUT_PARTS = {"input_text": _TEXT_FIELDS}
_OUTPUT_PARTS = {
    "output_text": ("text", "annotations", "logprobs"),
    "refusal": ("refusal",),
    "input_text": _TEXT_FIELDS,
}


def read_items(given: str | Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return the items of an input in the form that they are kept in.

    Raises:
        UserError: an item that cannot be used.
        ApiError: 400, one with a field that is not known.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items = []
    for i, item in enumerate(given or []):
        where = f"input[{i}]"
        default = "message" if isinstance(item, Mapping) and "role" in item else None
        kind = read_kind(item, where, tuple(_READERS), default)
        items.append({"status": "completed", **_READERS[kind](item, where)})
        if not isinstance(items[-1].setdefault("id", new_id(_PREFIXES[kind] + "_")), str):
            raise UserError(f"{where}.id: {shown(items[-1]['id'])} cannot be used; accepted: a text")
    return items


def _read_message(item: Any, where: str) -> dict[str, Any]:
    item = read_object(item, where, ("type", "id", "status", "role", "content", "phase"))
    role = item.get("role")
    if role not in ("user", "system", "developer", "assistant"):
        raise UserError(f"{where}.role: {shown(role)} cannot be used; accepted: user, system, developer, assistant")
    is_answer = role == "assistant"
    if "content" not in item:
        raise UserError(f"{where}.content: is missing")
    parts = read_parts(item["content"], f"{where}.content", _OUTPUT_PARTS if is_answer else _INPUT_PARTS)
    content = []
    for i, part in enumerate(parts):
        text = read_text(part, "refusal" if part["type"] == "refusal" else "text", f"{where}.content[{i}]")
        content.append(_text_part(text) if is_answer else {"type": "input_text", "text": text})
    return {**_kept(item), "type": "message", "role": role, "content": content}


def _read_reasoning(item: Any, where: str) -> dict[str, Any]:
    item = read_object(item, where, ("type", "id", "status", "summary", "content", "encrypted_content"))
    texts = {}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts = read_parts(item.get(name, []), f"{where}.{name}", {kind: ("text",)})
        texts[name] = [read_text(part, "text", f"{where}.{name}[{i}]") for i, part in enumerate(parts)]
    carried = unseal(read_text(item, "encrypted_content", where)) if "encrypted_content" in item else ""
    content = texts["content"] or ([carried] if carried else [])
    return {
        **_kept(item),
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": text} for text in texts["summary"]],
        "content": [{"type": "reasoning_text", "text": text} for text in content],
    }


def _read_call(item: Any, where: str) -> dict[str, Any]:
    item = read_object(item, where, ("type", "id", "status", "call_id", "name", "arguments"))
    arguments = read_text(item, "arguments", where)
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise UserError(f"{where}.arguments: {shown(arguments)} cannot be used; accepted: an object as JSON text")
    texts = {name: read_text(item, name, where) for name in ("call_id", "name", "arguments")}
    return {**_kept(item), "type": "function_call", **texts}


def _read_call_output(item: Any, where: str) -> dict[str, Any]:
    item = read_object(item, where, ("type", "id", "status", "call_id", "name", "output"))
    if "output" not in item:
        raise UserError(f"{where}.output: is missing")
    parts = read_parts(item["output"], f"{where}.output", _INPUT_PARTS)
    texts = [read_text(part, "text", f"{where}.output[{i}]") for i, part in enumerate(parts)]
    call_id = read_text(item, "call_id", where)
    return {**_kept(item), "type": "function_call_output", "call_id": call_id, "output": "".join(texts)}


def _kept(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item's own id and status, if they can be given back."""
    kept = {"id": item["id"]} if "id" in item else {}
    if item.get("status") in ("in_progress", "completed", "incomplete"):
        kept["status"] = item["status"]
    return kept


_READERS = {
    "message": _read_message,
    "reasoning": _read_reasoning,
    "function_call": _read_call,
    "function_call_output": _read_call_output,
}
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}


def as_messages(items: Sequence[Mapping[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """Return items as a conversation: thinking, text and calls that follow one another are one turn of the assistant.

    Raises:
        UserError: there is nothing to say, or the output of a call that is not there.
    """
    system = [] if instructions is None else [instructions]
    messages: list[dict[str, Any]] = []
    call_ids = set()
    turn: dict[str, Any] | None = None  # the assistant's, that still grows
    reasoning = ""  # for the assistant's next turn
    for i, item in enumerate(items):
        kind, role = item["type"], item.get("role")
        if kind == "reasoning":
            reasoning += "".join(part["text"] for part in item["content"] or item["summary"])
            turn = None
        elif kind == "function_call" or role == "assistant":
            if turn is None or (role == "assistant" and ("tool_calls" in turn or turn["content"])):
                turn = {"role": "assistant", "content": "", "reasoning_content": reasoning}
                messages.append(turn)
                reasoning = ""
            if role == "assistant":
                turn["content"] = "".join(part["text"] for part in item["content"])
            else:
                call_ids.add(item["call_id"])
                function = {"name": item["name"], "arguments": item["arguments"]}
                turn.setdefault("tool_calls", []).append({"id": item["call_id"], "function": function})
        elif kind == "function_call_output":
            if item["call_id"] not in call_ids:
                raise UserError(
                    f"input: item {i} of the conversation answers the call {shown(item['call_id'])}; accepted: the "
                    "call_id of a function_call before it"
                )
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
            turn, reasoning = None, ""
        else:
            text = "".join(part["text"] for part in item["content"])
            if role == "user":
                messages.append({"role": "user", "content": text})
                turn, reasoning = None, ""
            else:
                system.append(text)
    if system:  # the template has one place for it, at the top
        messages.insert(0, {"role": "system", "content": "\n\n".join(system)})
    if not messages:
        raise UserError(
            "input: is missing; accepted: a text or items, where instructions or a previous response are none"
        )
    return messages


# -- what an answer becomes --------------------------------------------------------------------------------------------


class Output:
    """The items of a response as they grow: those that are done, and the one that is open."""

    def __init__(self, exchange: Exchange, *, top_logprobs: int | None, seals_thinking: bool) -> None:
        """Begin before the first token.

        Args:
            exchange: that the output comes from.
            top_logprobs: of each token of a text, the most probable tokens to give with it; None: no log-probabilities.
            seals_thinking: whether the thinking is also given in the form for clients that carry it unseen.
        """
        self.items: list[dict[str, Any]] = []  # that are done
        self._exchange, self._top_logprobs, self._seals_thinking = exchange, top_logprobs, seals_thinking
        self._id = ""  # of the open item
        self._kind: Literal["reasoning", "message"] | None = None  # of the open item
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []  # of the open item
        self._tokens = None if top_logprobs is None else TextTokens(exchange.service.tokenizer, exchange.prompts[0])

    def take(self, gain: Gain) -> list[dict[str, Any]]:
        """Let the items grow; return the events that tell of it."""
        events: list[dict[str, Any]] = []
        if self._tokens is not None:
            self._tokens.push(gain.delta.logprobs)
        call_ids = iter(gain.call_ids)
        for event in gain.events:
            if event.tool_call is not None:
                events += self._close() + self._call(next(call_ids), event.tool_call)
            else:
                events += self._grow(event)
        return events

    def end(self, *, is_whole: bool) -> list[dict[str, Any]]:
        """Close what is open; a whole answer without content is an empty message."""
        events: list[dict[str, Any]] = []
        if is_whole and self._kind != "message" and all(item["type"] == "reasoning" for item in self.items):
            events += self._close() + self._open("message")
        return events + self._close("completed" if is_whole else "incomplete")

    def _grow(self, event: AnswerEvent) -> list[dict[str, Any]]:
        kind: Literal["reasoning", "message"] = "message" if event.kind == "content" else "reasoning"
        events = [] if self._kind == kind else self._close() + self._open(kind)
        self._texts.append(event.text)
        if kind == "reasoning":
            return [*events, self._event("response.reasoning_text.delta", delta=event.text)]
        logprobs = self._take_logprobs(event.text)
        self._logprobs += logprobs
        return [*events, self._event("response.output_text.delta", delta=event.text, logprobs=logprobs)]

    def _take_logprobs(self, text: str) -> list[dict[str, Any]]:
        if self._tokens is None:
            return []
        return chat_logprobs(self._exchange.service, self._tokens.take(text), self._top_logprobs or 0)

    def _open(self, kind: Literal["reasoning", "message"]) -> list[dict[str, Any]]:
        self._kind, self._id = kind, new_id("msg_" if kind == "message" else "rs_")
        item = self._item("in_progress", [])
        part = _text_part("") if kind == "message" else {"type": "reasoning_text", "text": ""}
        return [self._item_event("added", item), self._event("response.content_part.added", part=part)]

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        if self._kind is None:
            return []
        text, logprobs = "".join(self._texts), self._logprobs
        if self._kind == "message":
            part = _text_part(text, logprobs)
            done = self._event("response.output_text.done", text=text, logprobs=logprobs)
        else:
            part = {"type": "reasoning_text", "text": text}
            done = self._event("response.reasoning_text.done", text=text)
        item = self._item(status, [part])
        events = [done, self._event("response.content_part.done", part=part), self._item_event("done", item)]
        self.items.append(item)
        self._kind, self._texts, self._logprobs = None, [], []
        if self._tokens is not None:
            self._tokens.lose()
        return events

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the open item as it is told of at its beginning and its end."""
        if self._kind == "message":
            return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}
        item = {"id": self._id, "type": "reasoning", "status": status, "summary": [], "content": content}
        if self._seals_thinking:
            item["encrypted_content"] = seal("".join(self._texts))
        return item

    def _call(self, call_id: str, call: ToolCall) -> list[dict[str, Any]]:
        """Return the events of a call, which comes whole."""
        self._id = new_id("fc_")
        item = {"id": self._id, "type": "function_call", "call_id": call_id, "name": call.name, "arguments": ""}
        whole = {**item, "arguments": call.arguments_json}
        place = {"item_id": self._id, "output_index": len(self.items)}
        events = [
            self._item_event("added", {**item, "status": "in_progress"}),
            {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments_json},
            {
                "type": "response.function_call_arguments.done",
                **place,
                "arguments": call.arguments_json,
                "name": call.name,
            },
            self._item_event("done", {**whole, "status": "completed"}),
        ]
        self.items.append({**whole, "status": "completed"})
        return events

    def _item_event(self, what: str, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": f"response.output_item.{what}", "output_index": len(self.items), "item": item}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return an event of the open item's one part."""
        return {"type": kind, "item_id": self._id, "output_index": len(self.items), "content_index": 0, **fields}


class TextTokens:
    """Finds the tokens that hold the text of messages, among those of thinking, of calls and of the end."""

    def __init__(self, tokenizer: MiniMaxM1Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._thinking = Thinking(is_open=opens_thinking(prompt_ids, tokenizer))
        self._waiting: deque[tuple[str, TokenLogprob]] = deque()  # (what a token adds to the text, the token)
        self._num_used = 0  # characters of the first that waits
        self._is_lost = True  # where the next text begins is not known

    def push(self, tokens: Sequence[TokenLogprob]) -> None:
        """Take what has come."""
        for found in tokens:
            text = self._decoder.push(found.token)
            self._thinking.push(self._tokenizer.token_bytes(found.token))
            if self._thinking.phase in ("thinking", "after"):
                self._waiting.clear()
            else:
                self._waiting.append((text, found))

    def lose(self) -> None:
        """Hear that the text goes on somewhere behind."""
        self._is_lost = True

    def take(self, text: str) -> list[TokenLogprob]:
        """Return the tokens that begin within the next piece of text; the first may begin in the markup before it."""
        if self._is_lost:
            self._find(text)
        taken = []
        left = len(text)
        while left and self._waiting:
            piece, found = self._waiting[0]
            if self._num_used == 0 or self._is_lost:
                taken.append(found)
            self._is_lost = False
            unused = len(piece) - self._num_used
            if unused <= left:
                self._waiting.popleft()
                self._num_used = 0
            else:
                self._num_used += left
            left -= min(left, unused)
        return taken

    def _find(self, text: str) -> None:
        """Drop the tokens before a text, which is behind the markup of calls if there are any."""
        joined = "".join(piece for piece, _ in self._waiting)
        start = joined.find(text, max(0, joined.find("</tool_calls>")))
        while start > 0 and start >= len(self._waiting[0][0]):
            start -= len(self._waiting.popleft()[0])
        self._num_used = max(0, start)


def _text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
