"""The chat format: checks messages, renders them with Jinja2, and keeps user text from posing as special tokens.

A message is a dict with `role` (system, developer, user, assistant, tool) and `content` (a string, or a list of parts
`{"type": "text", "text": ...}`); see `normalize_messages` for the rest.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minimax_m1.errors import UserError

Message = Mapping[str, Any]

# The template in the official tokenizer_config.json fails on plain-string content, loses the quotes of the tool format
# line, drops the assistant's tool_calls, and takes only the first part of system and user content. We ship a mended
# template instead of patching the text at load time: it is readable, it is saved with our checkpoints so that
# Transformers and vLLM render the same bytes, and a test holds it against the official one.
CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content if part.type is undefined or part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<begin_of_document>' -}}
{%- set ns = namespace(system='', last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = ns.system + text_of(message.content) -%}
    {%- elif message.role == 'user' -%}
        {%- set ns.last_user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- if ns.system != '' -%}
    {{- '<beginning_of_sentence>system ai_setting=assistant\n' + ns.system + '<end_of_sentence>\n' -}}
{%- endif -%}
{%- if tools -%}
    {{- '<beginning_of_sentence>system tool_setting=tools\nYou are provided with these tools:\n<tools>\n' -}}
    {%- for tool in tools -%}
        {{- (tool.function if tool.function is defined else tool) | tojson + '\n' -}}
    {%- endfor -%}
    {{- '</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags, ' -}}
    {{- 'and provide tool-name and json-object of arguments, following the format below:\n<tool_calls>\n' -}}
    {{- '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls><end_of_sentence>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<beginning_of_sentence>user name=user\n' + text_of(message.content) + '<end_of_sentence>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<beginning_of_sentence>ai name=assistant\n' -}}
        {%- if message.reasoning_content and loop.index0 > ns.last_user -%}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n' -}}
        {%- endif -%}
        {%- set text = text_of(message.content) -%}
        {{- text -}}
        {%- if message.tool_calls -%}
            {{- '\n' if text and text[-1] != '\n' else '' -}}
            {{- '<tool_calls>\n' -}}
            {%- for call in message.tool_calls -%}
                {%- set call = call.function if call.function is defined else call -%}
                {{- '{"name": ' + call.name | tojson + ', "arguments": ' -}}
                {{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\n' -}}
            {%- endfor -%}
            {{- '</tool_calls>' -}}
        {%- endif -%}
        {{- '<end_of_sentence>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<beginning_of_sentence>tool name=tools\n' -}}
        {%- if message.content is string -%}
            {{- 'tool name: ' + message.name + '\ntool result: ' + message.content + '\n\n' -}}
        {%- else -%}
            {%- for part in message.content -%}
                {{- 'tool name: ' + (part.name or message.name) + '\ntool result: ' + part.text + '\n\n' -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '<end_of_sentence>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<beginning_of_sentence>ai name=assistant\n' -}}
{%- endif -%}
""".strip("\n")

_DEFECTIVE_OFFICIAL_SHA256 = "11fc33a57630c6e71a2231641db07c724208f4cc7611659c419c027c3fb3cf18"
_ROLES = ("system", "developer", "user", "assistant", "tool")


def mended_template(template: str | None) -> str:
    """Return the template to use for a folder's own one: ours for none or for the official one with its defects."""
    if template is None or hashlib.sha256(template.encode()).hexdigest() == _DEFECTIVE_OFFICIAL_SHA256:
        return CHAT_TEMPLATE
    return template


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a Jinja chat template in a sandbox, with Transformers' settings and its `tojson` (no HTML escapes).

    Raises:
        UserError: the template does not compile, or refuses these messages.
    """
    try:
        return _compiled(template).render(variables)
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: a template that expects another form of content
        raise UserError(f"chat_template: {' '.join(str(error).split())}") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def normalize_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Check OpenAI-style messages and bring them to the form the template reads; the input is not modified.

    - `developer` is `system`; `reasoning` is `reasoning_content`.
    - an assistant's `tool_calls` may be null; a call is `{"function": {"name", "arguments"}}` or `{"name",
      "arguments"}`, with the arguments as an object or as its JSON text (parsed here, so never encoded twice).
    - a tool result with string content gets its name from `name`, or by `tool_call_id` from the call it answers;
      neighbouring ones become the parts of one message, which is how M1 saw the results of parallel calls.

    Raises:
        UserError: anything else, naming the message and the field.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"messages = {_shown(messages)}: accepted is a list of at least one message")
    normalized: list[dict[str, Any]] = []
    names_by_id: dict[str, str] = {}
    results: list[dict[str, Any]] | None = None  # the parts of the tool message that is being gathered
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise UserError(f"{where}.role = {_shown(role)}: accepted are {', '.join(_ROLES)}")
        result = {**message, "role": "system" if message["role"] == "developer" else message["role"]}
        if result["role"] == "assistant":
            _normalize_assistant(result, where, names_by_id)
        _check_content(result, where)
        if result["role"] == "tool" and isinstance(result["content"], str):
            part = {"type": "text", "name": _tool_name(result, where, names_by_id), "text": result["content"]}
            if results is None:
                results = []
                normalized.append({"role": "tool", "content": results})
            results.append(part)
            continue
        results = None
        if result["role"] == "tool":
            result["content"] = [
                {**part, "name": _tool_name({**result, **part}, where, names_by_id)} for part in result["content"]
            ]
        normalized.append(result)
    return normalized


def _normalize_assistant(message: dict[str, Any], where: str, names_by_id: dict[str, str]) -> None:
    """Bring reasoning and tool_calls of one assistant message to the template's form; remember the calls' names."""
    reasoning = message.get("reasoning_content") or message.pop("reasoning", None) or ""
    if not isinstance(reasoning, str):
        raise UserError(f"{where}.reasoning_content = {_shown(reasoning)}: accepted is a string")
    message["reasoning_content"] = reasoning
    calls = message.pop("tool_calls", None) or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{where}.tool_calls = {_shown(calls)}: accepted is a list or null")
    if calls:
        message["tool_calls"] = [
            _normalize_call(call, f"{where}.tool_calls[{i}]", names_by_id) for i, call in enumerate(calls)
        ]


def _normalize_call(call: Any, where: str, names_by_id: dict[str, str]) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f'{where} = {_shown(call)}: accepted is {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}.arguments = {_shown(arguments)}: not JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}.arguments = {_shown(arguments)}: accepted is an object or its JSON text")
    if isinstance(call.get("id"), str):
        names_by_id[call["id"]] = function["name"]
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _tool_name(message: Message, where: str, names_by_id: Mapping[str, str]) -> str:
    call_id = message.get("tool_call_id")
    name = message.get("name") or (names_by_id.get(call_id) if isinstance(call_id, str) else None)
    if not isinstance(name, str):
        raise UserError(
            f"{where}.name = {_shown(message.get('name'))}, tool_call_id = {_shown(call_id)}: "
            "a tool result needs the tool's name, or the id of an earlier call"
        )
    return name


def _check_content(message: dict[str, Any], where: str) -> None:
    """Accept a string or a list of text parts; null only from the assistant, where it becomes the empty string."""
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        message["content"] = ""
        return
    if isinstance(content, str):
        return
    if not isinstance(content, Sequence):
        raise UserError(f"{where}.content = {_shown(content)}: accepted is a string or a list of text parts")
    for i, part in enumerate(content):
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise UserError(f'{where}.content[{i}] = {_shown(part)}: accepted is {{"type": "text", "text": a string}}')


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Check tool definitions: `{"name", "description", "parameters"}`, bare or inside OpenAI's `{"function": ...}`.

    Raises:
        UserError: not a list of such objects.
    """
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UserError(f"tools = {_shown(tools)}: accepted is a list of tool definitions")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"tools[{index}] = {_shown(tool)}: accepted is an object with a name")
        try:
            json.dumps(tool)
        except (TypeError, ValueError) as error:
            raise UserError(f"tools[{index}] = {_shown(tool)}: accepted is what JSON can write ({error})") from error
    return [dict(tool) for tool in tools]


class SpecialTokenGuard:
    """Marks text that must not become special tokens: a sentinel after the first character of every look-alike.

    The template sees the text otherwise unchanged. A rendered special token without a sentinel then comes from the
    template; everything else is ordinary text once the sentinels are removed. A string that only ends in the beginning
    of a special token is marked too, because the template may join it to what follows.
    """

    def __init__(self, special_tokens: Iterable[str], guarded: Any):
        """Choose a sentinel that occurs nowhere in `guarded` (nested lists and dicts of strings)."""
        self._first, self._longest, self._prefixes, self._lookalike = _lookalikes(tuple(special_tokens))
        text = json.dumps(guarded, ensure_ascii=False, default=str)
        # U+FDD0 is a Unicode noncharacter: it exists for such private uses.
        self.sentinel = "\ufdd0"
        while self.sentinel in text:
            self.sentinel += "\ufdd0"

    def mark(self, value: Any) -> Any:
        """Return a copy of `value` with every string in it marked, keys included."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.mark(item) for item in value]
        return value

    def _mark_text(self, text: str) -> str:
        if self._first.isdisjoint(text):  # most texts: no special token begins in it
            return text
        starts = {match.start() for match in self._lookalike.finditer(text)}
        starts |= {len(text) - n for n in range(1, min(self._longest, len(text)) + 1) if text[-n:] in self._prefixes}
        cuts = [0, *(start + 1 for start in sorted(starts)), len(text)]
        return self.sentinel.join(text[begin:end] for begin, end in itertools.pairwise(cuts))


@functools.lru_cache(8)
def _lookalikes(special_tokens: tuple[str, ...]) -> tuple[frozenset[str], int, frozenset[str], re.Pattern[str]]:
    """Return what special tokens begin with, the longest one's length, their beginnings, and where they stand."""
    tokens = sorted(special_tokens, key=len, reverse=True)
    prefixes = frozenset(token[:size] for token in tokens for size in range(1, len(token)))
    lookalike = re.compile("(?=" + "|".join(map(re.escape, tokens)) + ")")
    return frozenset(token[0] for token in tokens), max(map(len, tokens), default=0), prefixes, lookalike


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
