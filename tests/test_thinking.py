"""Where thinking begins and ends, and the count of its tokens, against a definition that sees the whole output."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minimax_m1.continuation import Continuation
from minimax_m1.sampling import SamplingParams
from minimax_m1.thinking import CLOSE, OPEN, Thinking, close_ids, opens_thinking
from minimax_m1.tokenizer import MiniMaxM1Tokenizer, parse_answer, train_tokenizer

FORCED = "\n</think>\n\n"
# Pieces of markup, and what could be mistaken for it.
PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<",
        "</",
        "</thi",
        "nk>",
        "think",
        ">",
        "\n",
        "\n\n",
        " ",
        "a",
        "b>c",
        "x<y",
        "é",
        "</think",
    ]
)


@pytest.fixture(scope="module")
def tokenizer() -> MiniMaxM1Tokenizer:
    """Trained so that tokens hold markup in many divisions, as M1's do."""
    texts = ["<think>\n one </think>\n\n two", "a </think> b", "thin </ think > x<y", "one two one two"] * 3
    tokenizer = train_tokenizer(texts, vocab_size=300)
    tokenizer.thinking_close = FORCED  # M1's own, of which a part may have begun
    return tokenizer


@pytest.fixture(scope="module")
def m1_tokenizer(shared_data) -> MiniMaxM1Tokenizer:
    return MiniMaxM1Tokenizer.from_pretrained(shared_data / "minimax-m1")


def follow(tokens: list[bytes], *, is_open: bool = False) -> Thinking:
    thinking = Thinking(is_open=is_open)
    for token in tokens:
        thinking.push(token)
    return thinking


def count_by_definition(tokens: list[bytes], is_open: bool) -> tuple[str, int]:
    """Return the phase and the count, from the whole text and the places where tokens end."""
    text = b"".join(tokens)
    starts = [len(b"".join(tokens[:i])) for i in range(len(tokens) + 1)]
    first = 0  # token, and the byte that the search for the close begins at
    place = 0
    if not is_open:
        begin = len(text) - len(text.lstrip(b" \t\r\n"))
        if not text[begin:].startswith(OPEN):
            return ("start" if OPEN.startswith(text[begin:]) else "content"), 0
        place = begin + len(OPEN)
        first = next(i for i in range(len(tokens) + 1) if starts[i] >= place)
    close = text.find(CLOSE, place)
    if close < 0:
        return "thinking", len(tokens) - first
    last = next(i for i in range(len(tokens)) if starts[i + 1] > close)  # the token in which the close begins
    if starts[last] == close and last > 0 and tokens[last - 1] == b"\n":
        last -= 1
    rest = text[close + len(CLOSE) :]
    return ("after" if not rest.strip(b"\n") else "content"), max(0, last - first)


@settings(max_examples=400)
@given(pieces=st.lists(PIECES, max_size=12), cuts=st.data(), is_open=st.booleans())
def test_the_count_equals_its_definition_for_any_tokens(pieces: list[str], cuts: st.DataObject, is_open: bool) -> None:
    text = ("" if is_open else cuts.draw(st.sampled_from(["", "<think>", "\n <think>"]))) + "".join(pieces)
    data = text.encode()
    places = sorted(cuts.draw(st.sets(st.integers(1, len(data) - 1)))) if len(data) > 1 else []
    tokens = [data[i:j] for i, j in zip([0, *places], [*places, len(data)], strict=True)]
    found = follow(tokens, is_open=is_open)
    assert (found.phase, found.num_tokens) == count_by_definition(tokens, is_open)


@given(pieces=st.lists(PIECES, max_size=12), is_open=st.booleans())
def test_thinking_is_where_the_parser_finds_it(pieces: list[str], is_open: bool) -> None:
    text = ("" if is_open else "<think>") + "".join(pieces)
    # a second opening, behind white space, is no thinking to the parser
    assume(not is_open or text == text.lstrip() or not text.lstrip().startswith("<think>"))
    found = follow([character.encode() for character in text], is_open=is_open)
    parsed = parse_answer(text, thinking_open=is_open)
    if found.phase in ("after", "content"):
        thinking = text.partition("</think>")[0].removeprefix("<think>").removeprefix("\n").removesuffix("\n")
        assert parsed.reasoning == thinking
    else:
        assert found.phase == "thinking" and not parsed.content and not parsed.tool_calls


def write(
    tokenizer: MiniMaxM1Tokenizer, budget: int | None, ids: list[int], *, is_open: bool, room: int = 500
) -> Continuation:
    """Let a model say `ids` wherever it is not forced."""
    params = SamplingParams(max_thinking_tokens=budget, max_new_tokens=room)
    row = Continuation(params, 0, [1], (), tokenizer, len(tokenizer), thinking_open=is_open)
    wanted = iter(ids)
    while row.finish_reason is None:
        token = row.forced_ids[0] if row.forced_ids else next(wanted, None)
        if token is None:
            break
        row.append(token)
    return row


@settings(max_examples=400, deadline=None)
@given(data=st.data(), budget=st.integers(0, 12), is_open=st.booleans())
@example(data=None, budget=0, is_open=True)
def test_the_budget_is_exact_for_any_output(
    tokenizer: MiniMaxM1Tokenizer, data: st.DataObject | None, budget: int, is_open: bool
) -> None:
    """Ids drawn at random, many of them pieces of markup; never more tokens than the budget, fewer only by choice."""
    markup = [i for i in tokenizer.valid_token_ids if set(tokenizer.token_bytes(i)) <= set(b"</think>\n")]
    any_id = st.one_of(st.sampled_from(markup), st.integers(0, 255), st.sampled_from(tokenizer.encode("</think>")))
    ids = [] if data is None else data.draw(st.lists(any_id, max_size=30))
    opening = [] if is_open else tokenizer.encode("<think>")
    row = write(tokenizer, budget, opening + ids, is_open=is_open)
    tokens = [tokenizer.token_bytes(i, skip_special_tokens=True) for i in row.output_ids]
    phase, count = count_by_definition(tokens, is_open)
    assert row.reasoning_tokens == count <= budget
    free = write(tokenizer, None, opening + ids, is_open=is_open)
    if phase == "thinking":  # all was said, and the budget not reached
        assert row.output_ids == free.output_ids and count < budget
        return
    if row.output_ids == free.output_ids:
        return  # it closed by itself
    # What was forced is the whole close after exactly the budget, or the end of a close that had begun.
    same = next((i for i, (a, b) in enumerate(zip(row.output_ids, free.output_ids, strict=False)) if a != b), None)
    said = b"".join(tokens[: len(opening) + budget]) if same is None or same >= len(opening) else b""
    if not any(said.endswith(CLOSE[:size]) for size in range(2, len(CLOSE))):
        assert count == budget
        assert row.output_ids[len(opening) + budget :][
            : len(tokenizer.encode(tokenizer.thinking_close))
        ] == tokenizer.encode(tokenizer.thinking_close)


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_on_m1s_vocabulary(m1_tokenizer: MiniMaxM1Tokenizer, budget: int, is_open: bool) -> None:
    opening = [] if is_open else m1_tokenizer.encode("<think>\n")
    assert opening in ([], [60, 37959, 1100])
    thought = m1_tokenizer.encode("one two three four five six seven eight nine ten")
    row = write(m1_tokenizer, budget, [*opening, *thought], is_open=is_open)
    assert row.output_ids == [*opening, *thought[:budget], 10, 1579, 37959, 6983, *thought[budget:]]
    assert row.reasoning_tokens == budget
    assert (
        parse_answer(row.text, thinking_open=is_open).content.strip() == m1_tokenizer.decode(thought[budget:]).strip()
    )


@pytest.mark.parametrize(
    ("begun", "rest"),
    [("</", "think>\n\n"), ("</think", ">\n\n"), ("x <", FORCED), ("\n", FORCED), ("</tho", FORCED)],
)
def test_a_close_that_has_begun_is_finished(m1_tokenizer: MiniMaxM1Tokenizer, begun: str, rest: str) -> None:
    ids = [*m1_tokenizer.encode("one two three"), *m1_tokenizer.encode(begun)]
    row = write(m1_tokenizer, len(ids), ids, is_open=True)
    assert row.output_ids == ids + m1_tokenizer.encode(rest)
    assert row.reasoning_tokens == (len(ids) if rest == FORCED else 3)


def test_a_model_that_closes_earlier_is_left_alone(m1_tokenizer: MiniMaxM1Tokenizer) -> None:
    for close, counted in (("\n</think>\n\n", 1), ("\n</think>", 1), ("</think>\n", 1), (".\n</think>", 2)):
        ids = m1_tokenizer.encode("one" + close + "two")
        row = write(m1_tokenizer, 8, ids, is_open=True)
        assert row.output_ids == ids and row.reasoning_tokens == counted


def test_thinking_is_only_what_an_output_begins_with(tokenizer: MiniMaxM1Tokenizer) -> None:
    ids = tokenizer.encode("no <think> one </think>")
    row = write(tokenizer, 0, ids, is_open=False)
    assert row.output_ids == ids and row.reasoning_tokens == 0


def test_eos_ends_the_thinking_and_the_output(tokenizer: MiniMaxM1Tokenizer) -> None:
    params = SamplingParams(max_thinking_tokens=50)
    row = Continuation(params, 0, [1], (7,), tokenizer, len(tokenizer), thinking_open=True)
    for token in (*tokenizer.encode("one two"), 7):
        row.append(token)
    assert row.finish_reason == "stop" and row.reasoning_tokens == len(row.output_ids) - 1


def test_max_new_tokens_may_end_the_forced_close(tokenizer: MiniMaxM1Tokenizer) -> None:
    row = write(tokenizer, 3, [97] * 50, is_open=True, room=4)
    assert row.finish_reason == "length" and row.output_ids == [
        97,
        97,
        97,
        tokenizer.encode(tokenizer.thinking_close)[0],
    ]
    assert row.forced_ids == []


def test_what_a_prompt_opens(tokenizer: MiniMaxM1Tokenizer) -> None:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What does <think> mean?"}])
    opened = [
        chat + tokenizer.encode("<think>\n"),
        chat + tokenizer.encode("<think>\n" + "one two " * 30),
        tokenizer.encode("raw text <think>"),
    ]
    closed = [
        chat,
        chat + tokenizer.encode("<think>\n\n</think>\n\n"),
        chat + tokenizer.encode("Here <think> is a word"),
        tokenizer.encode("raw text, where <think> is mentioned"),
        [97],
    ]
    assert [opens_thinking(ids, tokenizer) for ids in opened] == [True] * len(opened)
    assert [opens_thinking(ids, tokenizer) for ids in closed] == [False] * len(closed)


def test_the_close_is_written_as_the_tokenizer_writes_it(m1_tokenizer: MiniMaxM1Tokenizer) -> None:
    assert close_ids(Thinking(is_open=True), m1_tokenizer) == [10, 1579, 37959, 6983]
