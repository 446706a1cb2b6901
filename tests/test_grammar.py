"""Structured output: what comes out of a random model under a grammar always has the form that was asked for."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_m1.continuation import Continuation, choose_tokens
from minimax_m1.errors import UserError
from minimax_m1.generation import generate_batch
from minimax_m1.grammar import GrammarCompiler, Matcher
from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.sampling import SamplingParams, StructuredOutput
from minimax_m1.tokenizer import MiniMaxM1Tokenizer, parse_answer
from minimax_m1.weights import load_model

UNKNOWN = np.arange(320, 400)  # ids that the model has and the tokenizer lacks
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["pear", "plum"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "ripe": {"type": "boolean"},
    },
    "required": ["name", "kind", "sizes", "ripe"],
    "additionalProperties": False,
}
TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": 'count "fruit"', "parameters": SCHEMA}},
    {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> MiniMaxM1Tokenizer:
    return MiniMaxM1Tokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def compiler(tokenizer: MiniMaxM1Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 400)  # more than the tokenizer knows


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> MiniMaxM1ForCausalLM:
    model = load_model(tiny_checkpoint)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    return model


def make(
    compiler: GrammarCompiler,
    tokenizer: MiniMaxM1Tokenizer,
    params: SamplingParams,
    *,
    eos_ids: tuple[int, ...] | None = None,
    thinking_open: bool = False,
) -> Continuation:
    eos = (tokenizer.eos_token_id,) if eos_ids is None else eos_ids
    matcher = compiler.matcher(params, eos)
    return Continuation(params, 5, [1], eos, tokenizer, 400, matcher=matcher, thinking_open=thinking_open)


def run(row: Continuation, seed: int, *, bias: dict[int, float] | None = None, steps: int = 400) -> Continuation:
    """Continue with random logits, the masks computed in another thread."""
    generator = torch.Generator().manual_seed(seed)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(steps):
            if row.finish_reason is not None:
                break
            row.start_mask(pool)
            logits = torch.randn(1, 400, generator=generator) * 2
            for token, value in (bias or {}).items():
                logits[0, token] += value
            row.append(*choose_tokens(logits, [row], UNKNOWN)[0])
    return row


def structured(room: int = 400, **form: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=room, structured=StructuredOutput(**form))


# -- the form --------------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**31)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_a_json_schema_is_kept(compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer, seed: int) -> None:
    form = StructuredOutput(json_schema=json.dumps(SCHEMA))
    params = SamplingParams(max_new_tokens=2000, structured=form, max_thinking_tokens=10)
    row = run(make(compiler, tokenizer, params), seed, steps=2000)
    assert row.finish_reason == "stop" and row.stop_reason is None and row.output_ids[-1] == tokenizer.eos_token_id
    parsed = parse_answer(row.text)
    value = json.loads(parsed.content)
    assert list(value) == ["name", "kind", "sizes", "ripe"] and len(value["name"]) <= 4
    assert value["kind"] in ("pear", "plum") and value["ripe"] in (True, False)
    assert all(0 <= size <= 99 for size in value["sizes"])


@pytest.mark.parametrize("layout", [{}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}], ids=str)
def test_json_may_have_any_layout_that_programs_write(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer, layout: dict[str, Any]
) -> None:
    value = {"name": "a", "kind": "plum", "sizes": [1, 2], "ripe": True}
    for form in ({"json_schema": SCHEMA}, {"json_object": True}):
        row = make(compiler, tokenizer, structured(**form))
        for token in tokenizer.encode(json.dumps(value, **layout)):
            allowed = row.allowed_ids()
            assert allowed is not None and allowed[token]
            row.append(token)
        assert row.allowed_ids() is not None and np.flatnonzero(row.allowed_ids()).tolist() == [tokenizer.eos_token_id]


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, form=st.sampled_from(["regex", "choice", "grammar", "json_object"]))
def test_the_other_forms_are_kept(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer, seed: int, form: str
) -> None:
    choices = ("pear", "pear tree", 'a "quoted"\n\tword', "été")
    forms: dict[str, Any] = {
        "regex": r"[0-9]{3}/[a-f]{2,4}(é|x)",
        "choice": choices,
        "grammar": 'start: "(" start ")" | /[a-z]{1,3}/',
        "json_object": True,
    }
    row = run(make(compiler, tokenizer, structured(room=120, **{form: forms[form]})), seed, bias={ord("}"): 6.0})
    content = parse_answer(row.text).content
    if row.finish_reason == "length":
        assert form in ("json_object", "grammar") or row.reasoning_tokens > 0
        return
    assert row.finish_reason == "stop"
    if form == "regex":
        assert re.fullmatch(forms["regex"], content)
    elif form == "choice":
        assert content in choices
    elif form == "json_object":
        assert isinstance(json.loads(content), dict)
    else:
        assert re.fullmatch(r"(\()*[a-z]{1,3}(\))*", content) and content.count("(") == content.count(")")


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, parallel=st.booleans(), choice=st.sampled_from(["required", {"name": "now"}]))
def test_a_forced_call_is_one_that_the_parser_reads(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer, seed: int, parallel: bool, choice: Any
) -> None:
    params = SamplingParams(
        max_new_tokens=900, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, max_thinking_tokens=3
    )
    # A random model calls on and on; this one likes to close.
    bias = dict.fromkeys(tokenizer.encode("</tool_calls>"), 5.0)
    row = run(make(compiler, tokenizer, params), seed, bias=bias, steps=900)
    assert row.finish_reason == "stop"
    answer = parse_answer(row.text)
    assert answer.content == "" and answer.tool_calls
    assert len(answer.tool_calls) == 1 or parallel
    for call in answer.tool_calls:
        if choice != "required" or call.name == "now":
            assert call.name == "now" and call.arguments == {}
        else:
            assert call.name == 'count "fruit"' and list(call.arguments) == list(SCHEMA["properties"])
    # As the chat template writes them, to the byte.
    history = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"name": c.name, "arguments": c.arguments} for c in answer.tool_calls]},
    ]
    rendered = tokenizer.apply_chat_template(history, tools=TOOLS, tokenize=False, add_generation_prompt=False)
    assert isinstance(rendered, str)
    written = row.text[row.text.index("<tool_calls>") :]
    if "\\u" not in written and "\\/" not in written and "\ufffd" not in written:
        assert written + tokenizer.eos_token in rendered


def test_a_form_end_to_end(model: MiniMaxM1ForCausalLM, tokenizer: MiniMaxM1Tokenizer) -> None:
    params = SamplingParams(
        max_new_tokens=200,
        temperature=3.0,
        seed=1,
        structured=StructuredOutput(json_schema=SCHEMA),
        max_thinking_tokens=4,
    )
    rows = generate_batch(model, [[65], [66, 67], [70]], params, tokenizer=tokenizer)
    for i, row in enumerate(rows):
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert row[-1] == tokenizer.eos_token_id or len(row) == 200
        if row[-1] == tokenizer.eos_token_id:
            assert list(json.loads(parse_answer(text).content)) == SCHEMA["required"]
        alone = SamplingParams(**{**vars(params), "seed": 1 + i})
        assert generate_batch(model, [[[65], [66, 67], [70]][i]], alone, tokenizer=tokenizer) == [row]
    assert any(row[-1] == tokenizer.eos_token_id for row in rows)


# -- beside thinking -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, budget=st.sampled_from([None, 0, 5]), is_open=st.booleans(), close=st.integers(0, 6))
def test_thinking_is_free_and_the_grammar_begins_behind_it(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer, seed: int, budget: int | None, is_open: bool, close: int
) -> None:
    params = SamplingParams(
        max_new_tokens=60, structured=StructuredOutput(regex="[0-9]{4}"), max_thinking_tokens=budget
    )
    row = make(compiler, tokenizer, params, thinking_open=is_open)
    said = [] if is_open else tokenizer.encode("<think>")
    said += tokenizer.encode("pears " * close)
    if budget is None:
        said += tokenizer.encode("</think>")
    for token in said:
        if row.forced_ids:
            break
        allowed = row.allowed_ids()
        assert allowed is None or allowed[token], "thinking is free"
        assert token not in row.banned_ids()
        row.append(token)
    run(row, seed)
    answer = parse_answer(row.text, thinking_open=is_open)
    if row.finish_reason == "stop":
        assert re.fullmatch("[0-9]{4}", answer.content)
    else:
        assert row.finish_reason == "length" and budget == 5 and not answer.content
    if budget is not None:
        assert row.reasoning_tokens <= budget


def test_no_eos_while_the_content_is_to_come(compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer) -> None:
    row = make(compiler, tokenizer, structured(regex="[0-9]"), thinking_open=True)
    assert row.allowed_ids() is None and tokenizer.eos_token_id in row.banned_ids()
    for token in tokenizer.encode("one</think"):
        row.append(token)
    straddling = [i for i in range(len(tokenizer)) if tokenizer.token_bytes(i).startswith(b">") and i != ord(">")]
    assert {i for i in straddling if tokenizer.token_bytes(i).strip(b">\n")} <= set(row.banned_ids())
    row.append(ord(">"))
    allowed = row.allowed_ids()
    assert allowed is not None
    assert {tokenizer.decode(int(i)) for i in np.flatnonzero(allowed)} - {"\n", "\n\n"} == set("0123456789")
    row.append(ord("\n"))
    row.append(ord("\n"))
    allowed = row.allowed_ids()
    assert allowed is not None and not allowed[ord("\n")]


def test_content_may_begin_like_the_marker_of_thinking(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer
) -> None:
    """Both readings stay open until a token excludes one."""
    params = structured(regex="<th[0-9]")
    row = make(compiler, tokenizer, params)
    for character in "<th":
        row.append(ord(character))
    allowed = row.allowed_ids()
    assert allowed is not None and allowed[ord("i")] and allowed[ord("7")] and not allowed[ord("x")]
    thinks, answers = row, row.fork(6)
    for character in "ink>x</think>":
        thinks.append(ord(character))
    assert thinks.reasoning_tokens == 1
    allowed = thinks.allowed_ids()
    assert allowed is not None and allowed[ord("<")], "the content begins anew"
    answers.append(ord("7"))
    answers.append(tokenizer.eos_token_id)
    assert answers.text == "<th7" and answers.finish_reason == "stop"


# -- the end ---------------------------------------------------------------------------------------------------------


def test_a_complete_grammar_leaves_only_eos(compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer) -> None:
    row = make(compiler, tokenizer, structured(choice=("pear",)), eos_ids=(7, 9))
    for token in tokenizer.encode("pear"):
        row.append(token)
    allowed = row.allowed_ids()
    assert allowed is not None and np.flatnonzero(allowed).tolist() == [7, 9] and row.finish_reason is None
    row.append(9)
    assert row.finish_reason == "stop" and row.text == "pear"


@pytest.mark.parametrize("form", [{"choice": ("pear",)}, {"json_schema": {"type": "null"}}, {"regex": "a|b"}])
@pytest.mark.parametrize("ignore", [True, False])
def test_without_an_eos_a_complete_grammar_ends_the_output(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer, form: dict[str, Any], ignore: bool
) -> None:
    params = SamplingParams(ignore_eos=ignore, structured=StructuredOutput(**form))
    row = run(make(compiler, tokenizer, params, eos_ids=(7,) if ignore else ()), 1, bias={ord("<"): -50.0})
    assert row.finish_reason == "stop" and row.text in ("pear", "null", "a", "b")


def test_min_tokens_ask_for_more_only_where_the_grammar_has_more(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer
) -> None:
    longer = SamplingParams(min_tokens=9, structured=StructuredOutput(regex="a+"), logit_bias={ord("<"): -100.0})
    assert len(run(make(compiler, tokenizer, longer), 2).output_ids) >= 9
    complete = SamplingParams(min_tokens=9, structured=StructuredOutput(regex="a"), logit_bias={ord("<"): -100.0})
    assert run(make(compiler, tokenizer, complete), 2).text == "a"


def test_ids_that_only_the_model_has_are_never_allowed(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer
) -> None:
    row = make(compiler, tokenizer, structured(regex="(?s:.)*"))
    allowed = row.allowed_ids()
    assert allowed is not None and len(allowed) == 400 and not allowed[len(tokenizer) :].any()
    special = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    assert not allowed[special].any() and allowed[ord("x")]


def test_untrained_ids_are_taken_if_the_grammar_has_no_others(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer
) -> None:
    row = make(compiler, tokenizer, structured(regex="[xy]z"))
    opening = [i for i in range(len(tokenizer)) if tokenizer.token_bytes(i)[:1] == b"<"]
    logits = torch.zeros(1, 400)
    assert choose_tokens(logits, [row], np.array([*opening, ord("x")]))[0].token == ord("y")
    assert choose_tokens(logits, [row], np.array([*opening, ord("x"), ord("y")]))[0].token in (*opening, 120, 121)


def test_a_grammar_with_a_dead_end_aborts_its_own_output(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer
) -> None:
    row = make(compiler, tokenizer, structured(grammar='start: "ab" rest\nrest: /[^\\s\\S]/'))
    row.append(ord("a"))
    run(row, 0)
    assert row.finish_reason == "abort" and isinstance(row.stop_reason, str)


# -- copies, and what cannot be used ---------------------------------------------------------------------------------


def test_a_fork_of_a_matcher_goes_on_apart(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(structured(regex="a(b|c)d"), [7])
    assert matcher is not None
    with ThreadPoolExecutor(1) as pool:
        matcher.accept(ord("a"))
        matcher.start_mask(pool)
        twin = matcher.fork()
        matcher.accept(ord("b"))
        matcher.start_mask(pool)
        assert np.flatnonzero(twin.mask()).tolist() == [ord("b"), ord("c")]
        assert np.flatnonzero(matcher.mask()).tolist() == [ord("d")]
    matcher.reset()
    assert np.flatnonzero(matcher.mask())[0] == ord("a")


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, cut=st.integers(0, 30))
def test_a_forked_output_is_the_same_output(
    compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer, seed: int, cut: int
) -> None:
    params = SamplingParams(max_new_tokens=60, structured=StructuredOutput(json_schema=SCHEMA), max_thinking_tokens=2)
    logits = torch.randn(60, 400, generator=torch.Generator().manual_seed(seed)) * 2
    whole, other = make(compiler, tokenizer, params), make(compiler, tokenizer, params)
    for step in range(60):
        if step == cut:
            other = other.fork(other.seed)
        for row in (whole, other):
            if row.finish_reason is None:
                row.append(*choose_tokens(logits[step : step + 1], [row], UNKNOWN)[0])
    assert whole.output_ids == other.output_ids and whole.finish_reason == other.finish_reason


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"structured": {"json_schema": {"type": "fruit"}}}, "structured.json_schema: cannot be used: Invalid type"),
        (
            {"structured": {"json_schema": {"type": "string", "minLength": 3, "maxLength": 1}}},
            "structured.json_schema: cannot be used: Unsatisfiable",
        ),
        ({"structured": {"json_schema": {"not": {}}}}, "structured.json_schema: cannot be used: Unimplemented"),
        ({"structured": {"regex": "(a"}}, "structured.regex: cannot be used: .*unclosed group"),
        ({"structured": {"regex": r"[^\s\S]"}}, "structured.regex: cannot be used: no text matches it"),
        ({"structured": {"grammar": "start: unknown"}}, "structured.grammar: cannot be used: .*unknown"),
        (
            {"tools": [{"name": "a"}, {"name": "b", "parameters": {"properties": {"x": {"type": "fruit"}}}}]},
            r"tools\[1\].parameters: cannot be used: Invalid type",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_field(
    compiler: GrammarCompiler, params: dict[str, Any], message: str
) -> None:
    if "tools" in params:
        params = {**params, "tool_choice": "required"}
    with pytest.raises(UserError, match=f"^{message}") as caught:
        compiler.matcher(SamplingParams.parse(params), [7])
    assert "\n" not in str(caught.value)


def test_no_form_needs_no_matcher(compiler: GrammarCompiler, tokenizer: MiniMaxM1Tokenizer) -> None:
    assert compiler.matcher(SamplingParams(tools=TOOLS), [7]) is None
    with pytest.raises(UserError, match=r"structured: .* give the tokenizer as well"):
        Continuation(structured(regex="a"), 0, [1], (), None, 400)
    with pytest.raises(UserError, match=r"tool_choice: .* give the tokenizer as well"):
        Continuation(SamplingParams(tools=TOOLS, tool_choice="required"), 0, [1], (), None, 400)


def test_grammars_are_compiled_once_and_shared_by_threads(tokenizer: MiniMaxM1Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, 400)

    def first_ids(number: int) -> list[int]:
        matcher = compiler.matcher(structured(choice=(f"{number % 7}x", "abc")), [7])
        assert isinstance(matcher, Matcher)
        return np.flatnonzero(matcher.mask()).tolist()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(first_ids, range(140)))
    assert all(ids[0] == ord(str(number % 7)) and ord("a") in ids for number, ids in enumerate(found))
