"""What requests of all APIs have in common: how to draw, how to think, in which form; as SamplingParams."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minimax_m1.errors import UserError
from minimax_m1.sampling import THINKING_40K, THINKING_80K, SamplingParams, StructuredOutput
from minimax_m1.server.errors import ApiError, nearest, renamed
from minimax_m1.server.service import DEFAULT_TOP_P, RoutingDetail, Service

# OpenAI's efforts as tokens of thinking; None: no limit. M1 was trained with budgets of 40K and 80K.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 2_048,
    "medium": 8_192,
    "high": THINKING_40K,
    "xhigh": THINKING_80K,
    "max": None,
}
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# What clients may send and this server cannot do, with what to do instead. Nothing is swallowed.
UNSUPPORTED = {
    "audio": "answers are texts",
    "best_of": "use n, and choose",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "prediction": "start the server with --speculative-tokens",
    "suffix": "M1 is not trained to fill gaps",
    "use_beam_search": "use n",
    "verbosity": "ask for it in the prompt",
    "web_search_options": "give a tool",
}


class Body(BaseModel):
    """The body of a request: exact types, no unknown fields; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    inside: ClassVar[str] = ""  # the field that holds this object, with a dot, for messages

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = {name: value for name, value in values.items() if value is not None}
        known = {info.alias or name for name, info in cls.model_fields.items()}
        for name, value in values.items():
            place = f"{cls.inside}{name}"
            if name not in known:
                instead = UNSUPPORTED.get(name)
                hint = nearest(name, sorted(known)) if instead is None else f"; {instead}"
                what = "is not known here" if instead is None else "is not supported"
                raise ApiError(400, f"{place}: {what}{hint}", param=place, code="unknown_parameter")
            if isinstance(value, str | list | dict):
                _check_text(place, value)
        return values


def _check_text(place: str, value: str | list[Any] | dict[str, Any]) -> None:
    """Refuse what Python's JSON reader takes and JSON has not: NaN, infinities, and halves of surrogate pairs.

    Raises:
        ApiError: naming the field.
    """
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{place}: holds half of a surrogate pair; accepted: Unicode text", param=place) from None
    except ValueError:
        raise ApiError(400, f"{place}: holds NaN or an infinity; accepted: JSON", param=place) from None
    except RecursionError:
        raise ApiError(400, f"{place}: is nested too deeply", param=place) from None


class Structured(Body):
    """The form of the content, in vLLM's spelling: exactly one field."""

    inside = "structured_outputs."

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None


class Thinking(BaseModel):
    """Anthropic's switch of the thinking."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class ThinkingFields(Body):
    """How long to think: one field, under the names that it has elsewhere. -1 is no limit."""

    thinking_token_budget: int | None = Field(None, ge=-1, description="vLLM's name")
    max_thinking_tokens: int | None = Field(None, ge=-1, description="SGLang's name")
    thinking_budget_tokens: int | None = Field(None, ge=-1, description="llama.cpp's name")
    thinking: Thinking | None = Field(None, description="Anthropic's form")
    reasoning_effort: Effort | None = Field(None, description=f"as tokens: {EFFORTS}")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="only enable_thinking: true or false")

    def max_thinking(self, default: int | None) -> int | None:
        """Return the most tokens of thinking, None for no limit.

        Raises:
            UserError: two fields that say different things.
        """
        said: dict[str, int | None] = {}
        for name in ("thinking_token_budget", "max_thinking_tokens", "thinking_budget_tokens"):
            value = getattr(self, name)
            if value is not None:
                said[name] = None if value == -1 else value
        if self.reasoning_effort is not None:
            said["reasoning_effort"] = EFFORTS[self.reasoning_effort]
        if self.thinking is not None and self.thinking.type == "disabled":
            said["thinking"] = 0
        elif self.thinking is not None and self.thinking.budget_tokens is not None:
            said["thinking"] = self.thinking.budget_tokens
        for name, value in (self.chat_template_kwargs or {}).items():
            if name != "enable_thinking" or not isinstance(value, bool):
                raise UserError(
                    f"chat_template_kwargs.{name}: {value!r} cannot be used; accepted: enable_thinking, true or false"
                )
            if not value:
                said["chat_template_kwargs.enable_thinking"] = 0
        if len(set(said.values())) > 1:
            raise UserError(f"{', '.join(said)}: say different things; accepted: one of them")
        return next(iter(said.values())) if said else default


class SamplingFields(ThinkingFields):
    """How the next token is drawn, and what ends the output."""

    model: str | None = Field(None, description="the served model's id")
    temperature: float | None = Field(None, ge=0, le=1000, description="0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1000)
    logit_bias: dict[str, float] | None = Field(None, description="token id, as text -> what is added to its logit")
    expert_threshold: float | None = Field(
        None, gt=0, le=1, description="a token uses its experts until their weights reach this; 1: the model's own"
    )
    routing_log: Literal["summary", "tokens"] | None = Field(
        None, description="which experts the request went to; tokens: also token by token"
    )
    # for the client's own books; nothing here depends on them
    user: str | None = None
    metadata: dict[str, Any] | None = Field(None, max_length=16)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(
        self, service: Service, max_tokens: int | None, names: Mapping[str, str] | None = None, **more: Any
    ) -> SamplingParams:
        """Return the parameters for the engine.

        Args:
            service: its settings have what a request leaves open.
            max_tokens: of the output; None: what the context leaves.
            names: our fields' names -> the client's, for messages.
            more: further fields of SamplingParams; None leaves the default.

        Raises:
            UserError: a value that cannot be used.
        """
        values = {
            "max_new_tokens": service.engine.max_model_len if max_tokens is None else max_tokens,
            "temperature": service.default_temperature if self.temperature is None else self.temperature,
            "top_p": DEFAULT_TOP_P if self.top_p is None else self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "seed": None if self.seed is None else self.seed % 2**63,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "max_thinking_tokens": self.max_thinking(service.settings.thinking_budget),
            "expert_threshold": self.expert_threshold,
            **more,
        }
        try:
            return SamplingParams.parse({name: value for name, value in values.items() if value is not None})
        except UserError as error:
            raise renamed(error, {"max_new_tokens": "max_tokens", **(names or {})}) from None

    def routing(self, service: Service) -> RoutingDetail:
        """Return what the engine is to record: what is asked for, or else what the server does for everybody."""
        if self.routing_log is None:
            return service.settings.routing_log
        return "tokens" if self.routing_log == "tokens" else True


def check_context(
    service: Service,
    prompt_len: int,
    max_tokens: int | None,
    *,
    field: str = "max_tokens",
    prompt_field: str = "messages",
) -> None:
    """Refuse what does not fit into the context.

    Args:
        field: the client's name of `max_tokens`.
        prompt_field: the client's name of the prompt.

    Raises:
        ApiError: 400, with OpenAI's code for it.
    """
    most = service.engine.max_model_len
    if prompt_len >= most:
        raise ApiError(
            400,
            f"{prompt_field}: {prompt_len} tokens are too many; accepted: up to {most - 1}, as the context has {most}",
            param=prompt_field,
            code="context_length_exceeded",
        )
    if max_tokens is not None and prompt_len + max_tokens > most:
        raise ApiError(
            400,
            f"{field}: {max_tokens} is too many behind a prompt of {prompt_len} tokens; accepted: up to "
            f"{most - prompt_len}, as the context has {most}",
            param=field,
            code="context_length_exceeded",
        )


def structured_output(
    response_format: Mapping[str, Any] | None, structured: Structured | None
) -> StructuredOutput | None:
    """Return the form that OpenAI's `response_format` or vLLM's `structured_outputs` asks for; None for free text.

    Raises:
        UserError: both are given, or one that cannot be used.
    """
    form = None if response_format is None else _response_format(response_format)
    if structured is None:
        return form
    if form is not None:
        raise UserError("structured_outputs: cannot be used with response_format; accepted: one of the two")
    given = {name: value for name, value in structured.model_dump().items() if value is not None}
    if len(given) != 1:
        names = ", ".join(info.alias or name for name, info in Structured.model_fields.items())
        raise UserError(f"structured_outputs: {sorted(given)} cannot be used; accepted: exactly one of {names}")
    try:
        return StructuredOutput.parse(given)
    except UserError as error:
        raise renamed(error, STRUCTURED_NAMES) from None


def form_names(response_format: Mapping[str, Any] | None) -> dict[str, str]:
    """Return our names of the forms -> the client's, for messages."""
    return STRUCTURED_NAMES if response_format is None else RESPONSE_FORMAT_NAMES


RESPONSE_FORMAT_NAMES = {
    "structured.json_schema": "response_format.json_schema",
    "structured.json_object": "response_format",
}
# vLLM's.
STRUCTURED_NAMES = {"structured.json_schema": "structured_outputs.json"} | {
    f"structured.{name}": f"structured_outputs.{name}" for name in ("json_object", "regex", "choice", "grammar")
}


def _response_format(value: Mapping[str, Any]) -> StructuredOutput | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput(json_object=True)
    if kind != "json_schema":
        raise UserError(f"response_format.type: {kind!r} cannot be used; accepted: text, json_object, json_schema")
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise UserError(
            f'response_format.json_schema: {inner!r:.60} cannot be used; accepted: {{"name": ..., "schema": a schema}}'
        )
    return StructuredOutput(json_schema=schema)
