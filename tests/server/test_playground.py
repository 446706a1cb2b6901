"""The playground: its files, and the page itself in headless Chromium against a real server."""

import contextlib
import json
import random
import re
import shutil
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.server.conftest import Server, running_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request, Route

pytestmark = pytest.mark.slow

# The examples of the shipped model, and what is right.
ANSWERS = {
    "What is 384 + 729?": "The answer is 1113.",
    "Sort 31, 4, 15, 92, 6.": "4, 6, 15, 31, 92.",
    "How many times does the letter r appear in strawberry?": "It appears 3 times.",
    "What is 47 * 23?": "The answer is 1081.",
    "Which is larger, 90210 or 90120?": "90210 is larger.",
    "Spell lantern backwards.": 'It reads "nretnal".',
}
ADDITION, ADDED = next(iter(ANSWERS.items()))
PHONE = {"width": 360, "height": 740}
AA = 4.5  # WCAG's contrast of small text


# ---- the files -----------------------------------------------------------------------------------------------------


def test_files_have_their_types_and_a_strict_policy(server: Server) -> None:
    types = {"": "text/html", "app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
    for name, kind in types.items():
        reply = httpx.get(f"{server.url}/playground/{name}" if name else f"{server.url}/")
        assert reply.status_code == 200 and reply.headers["content-type"].split(";")[0] == kind
        policy = dict(rule.strip().split(" ", 1) for rule in reply.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'" and "unsafe" not in str(policy)
        assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(reply.url, headers={"If-None-Match": reply.headers["etag"]})
        assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == reply.headers["etag"]
        assert httpx.get(reply.url, headers={"If-None-Match": '"other"'}).status_code == 200
        head = httpx.head(reply.url)
        assert head.status_code == 200 and head.headers["content-length"] == str(len(reply.content))


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fplayground.py", "%2e%2e%2fapp.py", ".", "index.html%00"])
def test_only_the_files_are_served(server: Server, name: str) -> None:
    reply = httpx.get(f"{server.url}/playground/{name}")
    assert reply.status_code == 404 and "error" in reply.json()


def test_the_page_has_no_inline_code_and_refers_to_itself_only(server: Server) -> None:
    class Page(HTMLParser):
        tags: list[tuple[str, dict[str, str | None]]] = []  # noqa: RUF012 - one instance

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append((tag, dict(attrs)))

    page = Page()
    page.feed(httpx.get(f"{server.url}/").text)
    for tag, attrs in page.tags:
        assert not any(name == "style" or name.startswith("on") for name in attrs), (tag, attrs)
        assert tag != "style" and (tag != "script" or attrs.get("src"))
        for name in ("src", "href"):
            if attrs.get(name):
                assert re.fullmatch(r"playground/[\w.-]+|docs|#[\w-]*", attrs[name] or ""), attrs
    linked = {attrs.get("href") or attrs.get("src") for tag, attrs in page.tags if tag in ("link", "script")}
    for name in linked:
        assert httpx.get(f"{server.url}/{name}").status_code == 200, name


def test_info_tells_what_is_served(server: Server) -> None:
    info = httpx.get(f"{server.url}/playground/info").json()
    assert info["model"] == "m1-nano" and info["parameters"] == 3_020_160 and info["active_parameters"] == 857_472
    assert [layer["kind"] for layer in info["layers"]] == ["lightning", "softmax"] * 2
    assert info["num_experts"] == 8 and info["experts_per_token"] == 2 and info["max_model_len"] == 4096
    assert "count letters" in info["abilities"] and info["needs_key"] is False
    assert info["examples"] == list(ANSWERS)


def test_examples_are_answered_right(server: Server) -> None:
    for question, answer in ANSWERS.items():
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["message"]["content"] == answer


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: install the package chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'minimax-m1[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page of its own, with what it asked for and what its console said."""

    def __init__(self, browser: "Browser", server: Server, **options: Any) -> None:
        self.server = server
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.expected_errors: str | None = None  # a pattern of what a test provokes
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console", lambda line: self.errors.append(line.text) if line.type in ("error", "warning") else None
        )

    def open(self) -> "Page":
        self.page.goto(self.server.url)
        self.page.wait_for_selector("html[data-ready]")
        return self.page

    def say(self, text: str) -> None:
        """Ask, and wait for the whole answer."""
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        self.answered()

    def answered(self) -> None:
        self.page.locator(".answer.last:not(.running)").wait_for()  # `wait_for_selector` would hold the node for ever

    @property
    def answer(self) -> str:
        return self.page.inner_text(".answer:last-of-type .markdown")

    def chat_bodies(self) -> list[dict[str, Any]]:
        sent = [request for request in self.requests if request.url.endswith("/v1/chat/completions")]
        return [json.loads(request.post_data or "") for request in sent]

    def fake(self, *chunks: dict[str, Any], done: bool = True) -> None:
        """Let the next answers be these chunks."""
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if done else "")
        self.handle(lambda route: route.fulfill(body=body, content_type="text/event-stream"))

    def handle(self, handler: "Callable[[Route], Any]") -> None:
        """Let this handle the requests for answers from now on."""
        self.page.unroute("**/v1/chat/completions")
        self.page.route("**/v1/chat/completions", handler)

    def close(self) -> None:
        """Leave; every request went to the server, and the console is as quiet as expected."""
        self.context.close()
        hosts = {request.url.split("/")[2] for request in self.requests if request.url.startswith(("http", "ws"))}
        assert hosts <= {self.server.url.split("/")[2]}, hosts
        expected = self.expected_errors
        unexpected = [error for error in self.errors if expected is None or not re.search(expected, error)]
        assert not unexpected, unexpected


@contextlib.contextmanager
def visiting(browser: "Browser", server: Server, **options: Any) -> Iterator[Visit]:
    """Give a page, for which Playwright's context has these options; see `Visit.close` for what its end asserts."""
    visit = Visit(browser, server, **options)
    try:
        yield visit
    except BaseException:
        visit.context.close()
        raise
    visit.close()


@pytest.fixture
def visit(browser: "Browser", server: Server) -> Iterator[Visit]:
    with visiting(browser, server) as visit:
        yield visit


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def text_answer(text: str) -> list[dict[str, Any]]:
    return [delta(content=text[i : i + 997]) for i in range(0, len(text), 997)] + [delta("stop")]


WATCH_THINKING = """
window.seen = [];
new MutationObserver(() => {
  const answer = document.querySelector(".answer.running");
  const text = answer?.querySelector(".thinking-text").textContent;
  if (text) window.seen.push({
    length: text.length,
    isOpen: answer.querySelector("details").open,
    label: answer.querySelector("summary").textContent,
    content: answer.querySelector(".markdown").textContent,
  });
}).observe(document, { subtree: true, childList: true, characterData: true });
"""


def test_an_example_thinks_in_sight_and_is_right(visit: Visit) -> None:
    visit.page.add_init_script(WATCH_THINKING)
    for _ in range(4):  # a browser that gets no processor for half a second shows the answer at once
        page = visit.open()
        assert "count letters" in page.inner_text("#welcome")
        page.click(f".example:has-text('{ADDITION}')")
        visit.answered()
        assert visit.answer == ADDED
        assert not page.is_visible("#welcome")
        seen = [moment for moment in page.evaluate("seen") if not moment["content"]]
        assert all(moment["isOpen"] for moment in seen)
        if came_in_pieces := len({moment["length"] for moment in seen}) >= 2:
            break
    assert came_in_pieces
    assert re.fullmatch(r"Thinking [\d.]+ m?s, \d+ tokens?", seen[len(seen) // 2]["label"])
    page.wait_for_selector(".answer details:not([open])")  # once the answer is there
    label = re.fullmatch(r"Thought for .*s, (\d+) tokens", page.inner_text(".answer summary"))
    body = {"messages": [{"role": "user", "content": ADDITION}], "temperature": 0}
    reply = httpx.post(f"{visit.server.url}/v1/chat/completions", json=body, timeout=60).json()
    usage = reply["usage"]
    assert label is not None and int(label[1]) == usage["completion_tokens_details"]["reasoning_tokens"]
    page.click(".answer summary")
    assert page.inner_text(".answer .thinking-text").strip() == reply["choices"][0]["message"]["reasoning"].strip()
    stats = page.inner_text(".answer .stats")
    assert f"{usage['completion_tokens']} tokens" in stats and "tokens/s" in stats and "FLOP" in stats
    assert f"{usage['total_tokens']} of 4,096 tokens" in page.inner_text("#context")
    sent = visit.chat_bodies()[0]
    assert sent["temperature"] == 0 and sent["routing_log"] == "tokens" and sent["thinking_token_budget"] == -1


def never_ending(route: "Route") -> None:
    """Let the model write to the end of the context."""
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "ignore_eos": True}))


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stop_ends_the_generation(visit: Visit, by: str) -> None:
    visit.handle(never_ending)
    page = visit.open()
    page.fill("#input", ADDITION)
    page.press("#input", "Enter")
    page.wait_for_selector(f".answer .markdown:has-text('{ADDED}')")
    assert visit.server.metric("vllm:num_requests_running") == 1
    if by == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    visit.answered()
    for _ in range(100):
        if visit.server.metric("vllm:num_requests_running") == 0:
            break
        page.wait_for_timeout(20)
    assert visit.server.metric("vllm:num_requests_running") == 0
    assert page.inner_text(".answer .note") == "Stopped."
    assert page.inner_text(".answer .markdown").startswith(ADDED[:5])  # what came is kept
    assert page.is_visible("#send") and not page.is_visible("#stop")
    page.unroute("**/v1/chat/completions")
    page.click(".answer [data-action=regenerate]")
    visit.answered()
    assert visit.answer == ADDED


def test_regenerate_and_edit(visit: Visit) -> None:
    page = visit.open()
    visit.say("What is 12 + 30?")
    assert visit.answer == "The answer is 42."
    page.click(".answer [data-action=regenerate]")
    page.wait_for_selector(".answer.running", state="attached")
    visit.answered()
    assert visit.answer == "The answer is 42." and page.locator(".turn").count() == 2
    visit.say("What is 5 + 6?")
    assert page.locator(".turn").count() == 4
    page.click(".user.last [data-action=edit]")
    assert page.input_value(".edit textarea") == "What is 5 + 6?"
    page.keyboard.press("Escape")
    assert page.locator(".edit").count() == 0 and page.inner_text(".user.last .bubble") == "What is 5 + 6?"
    page.click(".user.last [data-action=edit]")
    page.fill(".edit textarea", "What is 7 + 8?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".user.last .bubble:has-text('What is 7 + 8?')")
    visit.answered()
    assert visit.answer == "The answer is 15." and page.locator(".turn").count() == 4
    contents = [message["content"] for message in visit.chat_bodies()[-1]["messages"]]
    assert contents == ["What is 12 + 30?", "The answer is 42.", "What is 7 + 8?"]


def test_conversations_are_kept_until_they_are_deleted(visit: Visit) -> None:
    page = visit.open()
    visit.say("What is 12 + 30?")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert visit.answer == "The answer is 42." and page.is_visible(".answer [data-action=experts]")
    page.click("#new-conversation")
    assert page.is_visible("#welcome") and page.locator(".turn").count() == 0
    visit.say("What is 5 + 6?")
    assert page.locator("#conversations li").count() == 2
    page.click("#conversations li:has-text('12 + 30') .conversation")
    assert visit.answer == "The answer is 42."
    page.hover("#conversations li:has-text('12 + 30')")
    page.click("#conversations li:has-text('12 + 30') [data-action=delete]")
    assert page.is_visible("#welcome") and page.locator("#conversations li").count() == 1
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#delete-all")
    assert page.locator("#conversations li").count() == 0
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('conversation'))") == []


def test_controls_reach_the_request_and_are_kept(visit: Visit) -> None:
    page = visit.open()
    page.click("#controls-toggle")
    values = {"top_k": "5", "max_tokens": "60", "seed": "7", "system": "Be brief."}
    for name, value in values.items():
        page.fill(f"#set-{name}", value)
    page.fill("[data-field=temperature] .beside", "0.3")
    page.press("[data-field=temperature] .beside", "Enter")
    page.select_option("#set-thinking", "limit")
    page.fill("#set-thinking_budget", "20")
    page.fill("[data-field=expert_threshold] .beside", "0.5")
    page.press("[data-field=expert_threshold] .beside", "Tab")
    page.fill("#set-seed", "7.5")
    assert "whole number" in page.inner_text("#set-seed-error")
    page.fill("#set-seed", "7")
    assert page.inner_text("#set-seed-error") == ""
    visit.say("What is 12 + 30?")
    sent = visit.chat_bodies()[-1]
    expected = {"temperature": 0.3, "top_k": 5, "max_tokens": 60, "seed": 7, "expert_threshold": 0.5}
    assert expected.items() <= sent.items() and sent["thinking_token_budget"] == 20
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.inner_text(".answer summary").endswith("20 tokens")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert "seed 7" in page.inner_text("#chips").lower() and page.input_value("#set-top_k") == "5"
    page.click("#controls-toggle")
    page.click("#reset")
    assert page.inner_text("#chips") == "" and page.input_value("#set-seed") == ""
    assert not page.is_visible("#set-thinking_budget")


def test_a_schema_gives_json(visit: Visit) -> None:
    page = visit.open()
    page.click("#controls-toggle")
    page.fill("#set-schema", "[1]")
    assert "object" in page.inner_text("#set-schema-error")
    page.click("[data-example=schema]")
    visit.say("What is 12 + 30?")
    assert json.loads(page.inner_text(".answer .markdown pre")).keys() == {"result"}


def test_wrong_tools_are_told_at_once_and_not_sent(visit: Visit) -> None:
    page = visit.open()
    page.click("#controls-toggle")
    for text, told in {
        '[{"type": "function",\n  oops}]': "line 2",
        '[{"function": {"description": "?"}}]': "Tool 1 has no “name”",
        "7": "The tool is not an object",
        '[{"name": "a"}, {"name": "a"}]': "Two tools are named a",
        '{"name": "a", "parameters": []}': "“parameters”",
    }.items():
        page.fill("#set-tools", text)
        assert told in page.inner_text("#set-tools-error")
        assert page.get_attribute("#set-tools", "aria-invalid") == "true"
    page.click("[data-close=controls]")
    page.fill("#input", "Hello")
    page.press("#input", "Enter")
    assert page.evaluate("document.activeElement.id") == "set-tools"  # the controls are open again
    assert visit.chat_bodies() == [] and page.input_value("#input") == "Hello"


def test_a_tool_is_called_and_its_result_goes_back(visit: Visit) -> None:
    page = visit.open()
    page.click("#controls-toggle")
    page.click("[data-example=tools]")
    page.select_option("#set-tool_choice", "get_weather")
    page.select_option("#set-thinking", "off")  # m1-nano knows of no tools, and would wonder for long
    page.fill("#set-max_tokens", "100")
    visit.say("What is the weather in Paris?")
    call = page.locator(".call")
    assert call.locator("header").inner_text() == "get_weather"
    assert json.loads(call.locator("pre").inner_text()).keys() == {"city"}
    page.select_option("#set-tool_choice", "auto")
    call.locator("textarea").fill('{"sky": "clear"}')
    page.click("[data-action=send-results]")
    page.wait_for_selector(".answer >> nth=1")
    visit.answered()
    assert page.inner_text(".call-result") == '{"sky": "clear"}'
    assert page.locator(".call textarea, [data-action=send-results]").count() == 0
    user, assistant, result = visit.chat_bodies()[-1]["messages"]
    assert user["role"] == "user" and assistant["tool_calls"][0]["function"]["name"] == "get_weather"
    assert result == {"role": "tool", "tool_call_id": assistant["tool_calls"][0]["id"], "content": '{"sky": "clear"}'}


def test_parallel_calls_and_a_person_who_moves_on(visit: Visit) -> None:
    calls = [
        {
            "index": i,
            "id": f"call-{i}",
            "type": "function",
            "function": {"name": "look_up", "arguments": f'{{"x": {i}}}'},
        }
        for i in range(2)
    ]
    visit.fake(delta(content="Let me see."), *(delta(tool_calls=[call]) for call in calls), delta("tool_calls"))
    page = visit.open()
    visit.say("Two things, please")
    assert page.locator(".call").count() == 2
    page.locator(".call textarea").nth(1).fill("second")
    visit.fake(*text_answer("Done."))
    page.click("[data-action=send-results]")
    page.wait_for_selector(".answer:nth-of-type(3):not(.running)")
    sent = visit.chat_bodies()[-1]["messages"]
    assert [(m["tool_call_id"], m["content"]) for m in sent[-2:]] == [("call-0", ""), ("call-1", "second")]
    visit.fake(delta(tool_calls=[{**calls[0], "id": "call-2"}]), delta("tool_calls"))
    visit.say("Again")
    visit.fake(*text_answer("All right."))
    visit.say("Never mind")  # the calls stay without results, so the history leaves them out
    sent = visit.chat_bodies()[-1]["messages"]
    assert [m["content"] for m in sent[-2:]] == ["Again", "Never mind"]
    assert page.locator("[data-action=send-results]:visible").count() == 0


def test_below_a_path_of_a_proxy(visit: Visit) -> None:
    page = visit.page
    page.route("**/inner/m1/**", lambda route: route.continue_(url=route.request.url.replace("/inner/m1/", "/")))
    page.goto(f"{visit.server.url}/inner/m1/")
    page.wait_for_selector("html[data-ready]")
    visit.say(ADDITION)
    assert visit.answer == ADDED
    asked = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(asked) > 10 and [url for url in asked if "/inner/m1/" not in url] == []


# ---- experts -------------------------------------------------------------------------------------------------------


def ask_for_routing(visit: Visit) -> dict[str, Any]:
    """Ask the example, open the view of its experts, and return the routing log that the server sent."""
    bodies = []

    def record(route: "Route") -> None:
        reply = route.fetch()
        bodies.append(reply.text())
        route.fulfill(response=reply)

    visit.handle(record)
    visit.say(ADDITION)
    visit.page.click("[data-action=experts]")
    chunks = [json.loads(line[6:]) for line in bodies[0].split("\n") if line.startswith("data: {")]
    return next(chunk["routing"][0] for chunk in chunks if "routing" in chunk)


def test_the_heatmap_has_the_counts_of_the_api(visit: Visit) -> None:
    page = visit.open()
    routing = ask_for_routing(visit)
    rows = page.evaluate(
        """() => [...document.querySelectorAll(".heat tbody tr")].map((row) => ({
          kind: row.querySelector("th").className,
          cells: [...row.querySelectorAll("td.cell")].map((cell) => ({ ...cell.dataset, label: cell.ariaLabel })),
          balance: row.querySelector(".balance").textContent,
        }))"""
    )
    assert [row["kind"] for row in rows] == ["lightning", "softmax"] * 2
    for row, layer in zip(rows, routing["layers"], strict=True):
        counts = dict(zip(layer["experts"], layer["counts"], strict=True))
        weights = dict(zip(layer["experts"], layer["mean_weights"], strict=True))
        assert [int(cell["count"]) for cell in row["cells"]] == [counts.get(e, 0) for e in range(8)]
        assert [float(cell["weight"]) for cell in row["cells"]] == [weights.get(e, 0) for e in range(8)]
        assert float(row["balance"]) == pytest.approx(layer["load_balance_entropy"], abs=0.005)
        assert sum(counts.values()) == 2 * routing["num_tokens"]  # m1-nano uses two experts a token
    used = next(cell for cell in rows[0]["cells"] if cell["count"] != "0")
    assert f"{used['count']} token" in used["label"] and "mean weight" in used["label"]
    shown = page.inner_text(f"td[data-layer='0'][data-expert='{used['expert']}']")
    assert float(shown.rstrip("%")) == pytest.approx(100 * int(used["count"]) / routing["num_tokens"], abs=0.5)
    page.check("input[value=weight]")
    shown = page.inner_text(f"td[data-layer='0'][data-expert='{used['expert']}']")
    assert float(shown) == pytest.approx(float(used["weight"]), abs=0.005)


def test_token_by_token(visit: Visit) -> None:
    page = visit.open()
    tokens = ask_for_routing(visit)["tokens"]
    shown = page.locator(".token").all_inner_texts()
    assert "".join(shown).replace("⏎", "\n") == "".join(token["text"] for token in tokens)
    assert "<think>" in "".join(shown) and ADDED[:8] in "".join(shown)
    page.hover(".token >> nth=9")
    lit = page.evaluate("[...document.querySelectorAll('.cell.lit')].map((c) => [+c.dataset.layer, +c.dataset.expert])")
    expected = {(layer, expert) for layer, ids in enumerate(tokens[9]["experts"]) for expert in ids if expert >= 0}
    assert {tuple(cell) for cell in lit} == expected
    routes = page.evaluate(
        """[...document.querySelectorAll(".routes li")]
        .map((item) => [...item.querySelectorAll(".chip")].map((chip) => +chip.textContent))"""
    )
    assert routes == tokens[9]["experts"]
    expert = tokens[9]["experts"][1][0]
    page.click(f"td[data-layer='1'][data-expert='{expert}']")
    matches = page.evaluate("[...document.querySelectorAll('.token.match')].map((token) => +token.dataset.i)")
    assert matches == [i for i, token in enumerate(tokens) if expert in token["experts"][1]]
    assert page.input_value(".token-head select") == "1"
    page.mouse.move(5, 5)
    assert f"worked on {len(matches)} of {len(tokens)} tokens" in page.inner_text(".detail")
    page.click(f"td[data-layer='1'][data-expert='{expert}']")
    assert page.locator(".token.match").count() == 0


def test_the_open_view_follows_the_conversation(visit: Visit) -> None:
    page = visit.open()
    visit.say("What is 12 + 30?")
    page.click("[data-action=experts]")
    assert page.inner_text(".experts-question") == "What is 12 + 30?"
    visit.say("What is 5 + 6?")
    page.wait_for_selector(".experts-question:has-text('What is 5 + 6?')")
    assert "The answer is 11." in "".join(page.locator(".token").all_inner_texts())
    page.click("#new-conversation")
    assert not page.is_visible("#experts")


def test_an_expert_threshold_is_seen_in_the_heatmap(visit: Visit) -> None:
    page = visit.open()
    page.click("#controls-toggle")
    page.fill("[data-field=expert_threshold] .beside", "0.05")
    page.press("[data-field=expert_threshold] .beside", "Enter")
    routing = ask_for_routing(visit)
    total = page.evaluate("[...document.querySelectorAll('.cell')].reduce((sum, cell) => sum + +cell.dataset.count, 0)")
    assert total == 4 * routing["num_tokens"]  # one expert in each of four layers


def large_model(layers: int, experts: int, num_tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the info and a routing log of a model of this size."""
    rng = random.Random(0)
    tokens = [
        {"text": f" w{i}", "experts": [rng.sample(range(experts), 2) for _ in range(layers)]} for i in range(num_tokens)
    ]
    rows = []
    for layer in range(layers):
        used = Counter(expert for token in tokens for expert in token["experts"][layer])
        counts = [used[expert] for expert in range(experts)]
        rows.append(
            {"layer": layer, "experts": list(range(experts)), "counts": counts, "mean_weights": [0.5] * experts}
            | {"load_balance_entropy": 0.9}
        )
    info = {"model": "large", "version": "0", "parameters": 456_089_655_296, "active_parameters": 45_940_000_000}
    info |= {"layers": [{"index": i, "kind": "softmax" if i % 8 == 7 else "lightning"} for i in range(layers)]}
    info |= {"num_experts": experts, "experts_per_token": 2, "max_model_len": 1_000_000, "needs_key": False}
    info |= {"abilities": None, "examples": ["Hello"], "currency": "credits"}
    info["defaults"] = {"temperature": 1, "top_p": 0.95, "top_k": 0, "max_tokens": None, "thinking_budget": 40_000}
    return info, {"num_tokens": num_tokens, "num_experts": experts, "layers": rows, "tokens": tokens}


@pytest.mark.parametrize(("layers", "experts", "num_tokens"), [(80, 32, 2500), (2, 4, 1)])
@pytest.mark.parametrize("width", [360, 1280])
def test_experts_of_small_and_large_models(
    browser: "Browser", server: Server, layers: int, experts: int, num_tokens: int, width: int
) -> None:
    with visiting(browser, server, viewport={"width": width, "height": 740}) as visit:
        info, routing = large_model(layers, experts, num_tokens)
        visit.page.route("**/playground/info", lambda route: route.fulfill(json=info))
        visit.fake(*text_answer("Hello."), {"choices": [], "routing": [routing]})
        page = visit.open()
        assert page.locator(".example").all_inner_texts() == ["Hello"]
        visit.say("Hello")
        assert visit.chat_bodies()[0]["thinking_token_budget"] == 40_000
        page.click("[data-action=experts]")
        assert page.locator(".cell").count() == layers * experts
        assert page.locator(".token").count() == min(num_tokens, 2000)
        if num_tokens > 2000:
            page.click("text=Show 500 more of 2,500")
            assert page.locator(".token").count() == num_tokens and not page.is_visible(".token-section > .button")
        page.locator(".token").last.click()
        assert page.locator(".cell.lit").count() == 2 * layers
        body = page.evaluate(
            "(({ scrollWidth, clientWidth }) => [scrollWidth, clientWidth])(document.getElementById('experts-body'))"
        )
        assert body[0] <= body[1]


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_quota_says_when_to_come_again(visit: Visit) -> None:
    visit.expected_errors = "429"
    told = {"error": {"message": "tokens_per_minute: 2000 are used up", "type": "rate_limit_error"}}
    visit.handle(lambda route: route.fulfill(status=429, headers={"Retry-After": "3"}, json=told))
    page = visit.open()
    visit.say(ADDITION)
    assert "tokens_per_minute: 2000 are used up" in page.inner_text(".answer .error")
    assert "wait 3 s" in page.inner_text(".answer .error")
    page.wait_for_selector("text=wait 2 s")
    page.unroute("**/v1/chat/completions")
    page.click("[data-action=retry]")
    page.wait_for_selector(".answer .markdown p")
    visit.answered()
    assert visit.answer == ADDED and page.locator(".error:visible").count() == 0


def test_a_missing_key_is_asked_for(browser: "Browser", tmp_path: Path) -> None:
    with (
        running_server("--api-key", "sk-right", usage_db=tmp_path / "usage.sqlite") as server,
        visiting(browser, server) as visit,
    ):
        visit.expected_errors = "401"
        page = visit.open()
        page.fill("#welcome .key-form input", "sk-wrong")
        page.keyboard.press("Enter")
        visit.say(ADDITION)
        assert "the key is missing or wrong" in page.inner_text(".answer .error")
        page.click("#usage-open")
        page.wait_for_selector("#usage .error:has-text('key')")
        page.keyboard.press("Escape")
        page.fill(".answer .key-form input", "sk-right")
        page.keyboard.press("Enter")
        page.locator(".answer .markdown p").wait_for()
        visit.answered()
        assert visit.answer == ADDED and page.input_value("#set-key") == "sk-right"
        assert "sk-right" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        page.wait_for_selector("html[data-ready]")
        visit.say("What is 12 + 30?")  # the tab still has it
        assert visit.answer == "The answer is 42."


@pytest.mark.parametrize("ending", ["connection", "event"])
def test_a_break_in_mid_stream_keeps_what_came(visit: Visit, ending: str) -> None:
    last = [{"error": {"message": "the engine has stopped", "type": "server_error"}}] if ending == "event" else []
    visit.fake(delta(reasoning_content="Hm."), delta(content="So far **so go"), *last, done=False)
    page = visit.open()
    visit.say("Hello")
    assert "So far" in visit.answer
    error = page.inner_text(".answer .error")
    assert "What came is kept." in error
    assert ("the engine has stopped" if ending == "event" else "ended before it was complete") in error
    page.reload()
    page.wait_for_selector(".answer .error:visible")
    assert "So far" in visit.answer


def test_a_server_that_is_away(visit: Visit) -> None:
    visit.expected_errors = "Failed to load resource|ERR_"
    page = visit.open()
    visit.handle(lambda route: route.abort())
    visit.say(ADDITION)
    assert "cannot be reached" in page.inner_text(".answer .error")
    page.route("**/playground/info", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("text=No answer from the server")


def test_what_the_server_refuses_is_shown(visit: Visit) -> None:
    visit.expected_errors = "400"
    page = visit.open()
    page.click("#controls-toggle")
    page.fill("#set-schema", '{"type": "number of apples"}')
    visit.say("Hello")
    shown = page.inner_text(".answer .error")
    assert "apples" in shown or "schema" in shown


# ---- hostile and huge texts ----------------------------------------------------------------------------------------

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    '"><svg onload=window.pwned=1>',
    "[click](javascript:window.pwned=1)",
    "[click](JaVaScRiPt:window.pwned=1)",
    "[click](java\tscript:alert(1))",
    "[click](data:text/html,<script>window.pwned=1</script>)",
    "[click](//evil.example/x)",
    "<javascript:window.pwned=1>",
    "![x](https://evil.example/pixel.png)",
    '[a](https://ok.example/" onmouseover="window.pwned=1)',
    "```html\n<script>window.pwned = 1</script>\n```",
    '```"><img src=x onerror=window.pwned=1>\nx\n```',
    "| <img src=x onerror=window.pwned=1> |\n|---|\n| <b onclick=window.pwned=1>x</b> |",
    "- <iframe src=javascript:window.pwned=1>\n  > <style>*{display:none}</style>",
    "&lt;script&gt;&#106;avascript:",
    "\u202e\u0000\ufeff<think></think><end_of_sentence>",
]
RENDER = """async ([text, pieces]) => {
  const { MarkdownStream, renderMarkdown } = await import("/playground/markdown.js");
  const box = document.createElement("div");
  document.body.append(box);
  if (pieces) {
    const stream = new MarkdownStream(box);
    for (const piece of pieces) stream.push(piece);
    stream.finish();
  } else renderMarkdown(text, box);
  const all = [...box.querySelectorAll("*")];
  const result = {
    text: box.textContent, html: box.innerHTML, pwned: window.pwned ?? null,
    tags: [...new Set(all.map((node) => node.localName))],
    attributes: [...new Set(all.flatMap((node) => node.getAttributeNames()))],
    links: all.filter((node) => node.localName === "a").map((node) => [node.protocol, node.rel]),
  };
  box.remove();
  return result;
}"""
TAGS = set("p h2 h3 h4 h5 h6 ul ol li blockquote hr a em strong del table thead tbody tr th td".split())
TAGS |= set("pre code div span button svg use".split())  # of a block of code
ATTRIBUTES = set(
    "class href target rel type tabindex role aria-label aria-hidden start data-action data-language".split()
)


def test_hostile_text_stays_text(visit: Visit) -> None:
    page = visit.open()
    for text in HOSTILE:
        for pieces in (None, list(text)):
            result = page.evaluate(RENDER, [text, pieces])
            assert set(result["tags"]) <= TAGS and set(result["attributes"]) <= ATTRIBUTES and result["pwned"] is None
            for protocol, rel in result["links"]:
                assert protocol in ("http:", "https:", "mailto:") and "noopener" in rel
            for markup in re.findall(r"^<\w[^>]*>", text):
                assert markup in result["text"]


def test_hostile_conversation(visit: Visit) -> None:
    visit.fake(delta(reasoning_content=HOSTILE[1]), *text_answer("\n\n".join(HOSTILE)))
    page = visit.open()
    visit.say(HOSTILE[0] + HOSTILE[1])
    assert page.inner_text(".bubble") == HOSTILE[0] + HOSTILE[1]
    assert page.locator(".turns :is(script, img, iframe, style)").count() == 0
    assert page.evaluate("window.pwned ?? null") is None
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.inner_text("#conversations .conversation").startswith("<script>")


def test_an_inline_script_does_not_run(visit: Visit) -> None:
    visit.expected_errors = "Content Security Policy"
    page = visit.open()
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), { textContent: 'pwned = 1' }))")
    assert page.evaluate("window.pwned ?? null") is None
    assert visit.errors


SAMPLE = """# A *title* with `code`

A paragraph with **strong**, *em*, _em_, ~~gone~~, `a*b`, (https://example.org/x_y(z)).
And [a **link**](https://a.example "t"). It goes on here: 3*4*5, snake_case_name, 2 * 3, a\\*b, **2**.

1. one
   - inner `code`
   - inner two

     more of it
2. two
3) other

- loose

- list
  1. a
  2. b

> quoted
> - with a list
>
> and more

| a | b \\| c |
|:--|--:|
| 1 | `x|y` |
| 2 |

```python
def f(x):
    return "```" + x

```
after
***
- - -
~~~
open fence with `ticks`
"""


def test_markdown_in_any_pieces_is_the_same(visit: Visit) -> None:
    page = visit.open()
    whole = page.evaluate(RENDER, [SAMPLE, None])
    assert "https://example.org/x_y(z)" in re.findall(r'href="(.*?)"', whole["html"])
    assert {"h2", "em", "strong", "del", "code", "a", "ol", "ul", "blockquote", "table", "pre", "hr"} <= set(
        whole["tags"]
    )
    assert "3*4*5, snake_case_name, 2 * 3, a*b" in whole["text"] and '<ol start="3">' not in whole["html"]
    assert "b | c" in whole["text"] and 'return "```" + x\n' in whole["text"]
    rng = random.Random(0)
    cuttings = [list(SAMPLE), SAMPLE.splitlines(keepends=True)]
    for size in (3, 7, 40):
        places = sorted(rng.sample(range(len(SAMPLE)), len(SAMPLE) // size))
        cuttings.append([SAMPLE[a:b] for a, b in zip([0, *places], [*places, None], strict=True)])
    for pieces in cuttings:
        assert page.evaluate(RENDER, [SAMPLE, pieces])["html"] == whole["html"]


def test_any_markdown_in_any_pieces_is_the_same(visit: Visit) -> None:
    parts = "a|b c|**|*|_|`|``|```|```\n|\n|\n\n|- |  - |1. |   |> |# |---\n|~~|~~~\n|\\|[|](|](https://a.b)|![|)|\t|<b>".split(
        "|"
    )
    parts += ["|", "| a | b |\n", "|---|---|\n", "<https://a.b>", "(https://c.d/e_f*g(h))", "2*3", " * "]
    rng = random.Random(0)
    page = visit.open()
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randint(1, 30)))
        places = sorted(rng.sample(range(len(text)), rng.randint(0, len(text) - 1)))
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]
        assert page.evaluate(RENDER, [text, pieces])["html"] == page.evaluate(RENDER, [text, None])["html"], text


def test_plain_text_is_preserved(visit: Visit) -> None:
    page = visit.open()
    rng = random.Random(0)
    alphabet = string.ascii_letters + string.digits + " .,;:!?'\"()=+%/äß漢字🙂\n"
    for _ in range(150):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 120))).strip()
        text = re.sub(r"\n\s*(?=\n)|(?m:^ *(?:\d{1,9}[.)]|[+])(?= |$))", "x", text)  # no empty lines, no lists
        assert page.evaluate(RENDER, [text, None])["text"] == text
        assert page.evaluate(RENDER, [text, list(text)])["text"] == text


# Repeated, these take a parser that is not linear minutes.
LABYRINTHS = [
    *(
        "[",
        "[a](",
        "](",
        "*a ",
        "**a *b ",
        "`a``",
        "> ",
        "- ",
        " - a\n",
        "|a",
        "|-|-|\n",
        "<http://a",
        "http://%h",
        "\\",
    ),
    *("_a_b", "1. ", "```\n", "# ", "a\n", "[x] ", "~~a", "![", "\n\n- a\n\n", "word ", "(" * 50 + "a"),
    *("http://a" + "." * 500, "[a](http://b " + " " * 500),
]


def test_no_text_takes_long(visit: Visit) -> None:
    page = visit.open()
    took = {}
    for unit in LABYRINTHS:
        took[unit] = page.evaluate(
            """async (text) => {
              const { renderMarkdown } = await import("/playground/markdown.js");
              const start = performance.now();
              renderMarkdown(text, document.createElement("div"));
              return performance.now() - start;
            }""",
            unit * (100_000 // len(unit)),
        )
    assert max(took.values()) < 3000, took  # ms; most take some 50 here


def test_a_huge_answer_does_not_block_the_page(visit: Visit) -> None:
    paragraph = "Some words, **strong** and `code`, " * 20 + "\n\n"
    visit.fake(*text_answer(paragraph * 600 + "```\n" + "x = 1\n" * 20_000 + "```\n\nThe end."))
    page = visit.open()
    page.evaluate(
        """() => {
          window.longest = 0;
          let last = performance.now();
          setInterval(() => {
            window.longest = Math.max(window.longest, performance.now() - last);
            last = performance.now();
          }, 20);
        }"""
    )
    visit.say("Much, please")
    assert visit.answer.endswith("The end.")
    assert page.evaluate("window.longest") < 5000  # ms; a page that redraws all of it at every piece takes minutes
    assert (
        page.evaluate(
            "(({ scrollTop, scrollHeight, clientHeight }) => scrollHeight - scrollTop - clientHeight)(scroller)"
        )
        < 2
    )


def test_the_page_follows_the_answer_unless_somebody_reads(browser: "Browser", server: Server) -> None:
    with visiting(browser, server, viewport={"width": 500, "height": 360}) as visit:
        visit.handle(never_ending)
        page = visit.open()
        page.fill("#input", ADDITION)
        page.press("#input", "Enter")
        left = "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop"
        while page.evaluate("scroller.scrollHeight - scroller.clientHeight") < 300:
            page.wait_for_timeout(20)
        page.wait_for_timeout(100)
        assert page.evaluate(left) < 2 and not page.is_visible("#jump")
        page.hover("#turns")
        page.mouse.wheel(0, -150)
        page.locator("#jump").wait_for()
        page.wait_for_timeout(500)  # wheels scroll smoothly
        top, height = page.evaluate("[scroller.scrollTop, scroller.scrollHeight]")
        while page.evaluate("scroller.scrollHeight") < height + 100:
            page.wait_for_timeout(20)
        assert page.evaluate("scroller.scrollTop") == top
        page.click("#jump")
        page.wait_for_timeout(200)
        assert page.evaluate(left) < 2 and page.locator(".answer.running").count() == 1
        page.click("#stop")
        visit.answered()


def test_nothing_is_left_behind(visit: Visit) -> None:
    """Conversations that are gone leave no listeners and no nodes."""
    routing = large_model(4, 8, 40)[1]
    visit.fake(delta(reasoning_content="Hm."), *text_answer(SAMPLE), {"choices": [], "routing": [routing]})
    page = visit.open()
    tools = visit.context.new_cdp_session(page)
    tools.send("Performance.enable")

    def count() -> tuple[float, float]:
        page.click("#new-conversation")
        page.evaluate("Object.keys(localStorage).forEach((key) => localStorage.removeItem(key))")
        page.click("#new-conversation")
        page.wait_for_timeout(1300)  # the fold's last timer
        tools.send("HeapProfiler.collectGarbage")
        metrics = {m["name"]: m["value"] for m in tools.send("Performance.getMetrics")["metrics"]}
        return metrics["JSEventListeners"], metrics["Nodes"]

    def talk() -> None:
        for _ in range(3):
            visit.say("Hello")
            page.click("[data-action=experts] >> nth=-1")

    talk()
    before = count()
    for _ in range(3):
        talk()
    after = count()
    assert after[0] <= before[0] + 5 and after[1] <= before[1] * 1.1 + 50, (before, after)


# ---- reaching everything -------------------------------------------------------------------------------------------


def test_keyboard_alone(visit: Visit) -> None:
    page = visit.open()
    keys = page.keyboard
    focused: Callable[[str], bool] = lambda selector: page.evaluate(f"document.activeElement.matches({selector!r})")  # noqa: E731
    assert focused("#input")
    keys.type("What is 12 + 30?")
    keys.press("Shift+Enter")
    keys.type("Please.")
    assert page.input_value("#input") == "What is 12 + 30?\nPlease."
    keys.press("Control+a")
    keys.type("What is 12 + 30?")
    keys.press("Enter")
    visit.answered()
    assert focused("#input") and page.inner_text("#announcer") == "The answer is 42."
    for _ in range(3):  # back from the input: experts, regenerate, copy; the code has nothing
        keys.press("Shift+Tab")
    page.focus("[data-action=experts]")
    keys.press("Enter")
    assert focused("#experts [data-close]")
    page.focus(".cell[tabindex='0']")
    for key in ("ArrowRight", "ArrowDown", "End"):
        keys.press(key)
    assert focused(".cell[data-layer='1'][data-expert='7']")
    assert "Layer 1, expert 7" in page.inner_text(".tip")
    keys.press("Home")
    keys.press("Enter")
    assert page.get_attribute(".cell[data-layer='1'][data-expert='0']", "aria-selected") == "true"
    page.focus(".tokens")
    keys.press("ArrowRight")
    assert page.get_attribute(".tokens", "aria-activedescendant") == "token-1"
    assert "token 2 of" in page.inner_text(".detail")
    page.focus("[data-close=experts]")
    keys.press("Enter")
    assert focused("[data-action=experts]")  # where it came from
    keys.press("/")
    assert focused("#input") and page.input_value("#input") == ""
    page.focus("#theme-toggle")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_skip_link_comes_first(browser: "Browser", server: Server) -> None:
    with visiting(browser, server, viewport=PHONE) as visit:  # where the input has no focus from the start
        page = visit.open()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the message box"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "input"


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r, g, b].map((v, i) => (v * a + [R, G, B][i] * (255 - a)) / 255);
  const behind = (node) => {
    if (!node) return rgba(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    const own = rgba(getComputedStyle(node).backgroundColor);
    return own[3] === 255 ? own.slice(0, 3) : over(own, behind(node.parentElement));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim()) continue;
    if (!node.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    if (node.closest(".visually-hidden, :disabled, option, .dense, [hidden], noscript")) continue;
    const back = behind(node);
    const [a, b] = [light(over(rgba(getComputedStyle(node).color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, node.className + " " + walker.currentNode.data.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: "Browser", server: Server, scheme: str) -> None:
    with visiting(browser, server, color_scheme=scheme) as visit:
        page = visit.open()
        shots = [page.evaluate(CONTRAST)]
        page.click("#controls-toggle")
        visit.say(ADDITION)
        shots.append(page.evaluate(CONTRAST))
        page.click("[data-action=experts]")
        shots.append(page.evaluate(CONTRAST))
        page.check("input[value=weight]")
        page.click(".token >> nth=5")
        shots.append(page.evaluate(CONTRAST))
        visit.fake(*text_answer(SAMPLE), {"error": {"message": "no"}}, done=False)
        visit.say("Hello")
        page.click("#usage-open")
        page.wait_for_selector("#usage table")
        shots.append(page.evaluate(CONTRAST))
        assert sum(map(len, shots)) > 300
        low = {what: round(ratio, 2) for shot in shots for ratio, what in shot if ratio < AA}
        assert not low


def test_colours_follow_the_system_until_one_is_chosen(browser: "Browser", server: Server) -> None:
    with visiting(browser, server, color_scheme="dark") as visit:
        page = visit.open()
        back = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(back)
        page.emulate_media(color_scheme="light")
        light = page.evaluate(back)
        assert light != dark
        page.click("#theme-toggle")
        assert page.get_attribute("html", "data-theme") == "light" and page.evaluate(back) == light
        page.click("#theme-toggle")
        assert page.evaluate(back) == dark
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.evaluate(back) == dark
        page.click("#theme-toggle")
        assert page.evaluate(back) == light and page.get_attribute("html", "data-theme") is None


OVERFLOW = """() => {
  const parts = document.querySelectorAll("html, .scroller, .panel-body, .main, .topbar, .composer-area");
  const wide = [...parts].filter((node) => node.checkVisibility() && node.scrollWidth > node.clientWidth);
  const scrolls = ".heat-scroll, .table-scroll, pre, .visually-hidden";
  const outside = [...document.querySelectorAll(".main *")].filter((node) => {
    if (!node.checkVisibility() || node.closest(scrolls)) return false;
    const { left, right, width } = node.getBoundingClientRect();
    return width > 0 && (right > innerWidth + 0.5 || left < -0.5);
  });
  return [...wide, ...outside].map((node) => node.cloneNode().outerHTML);
}"""


@pytest.mark.parametrize("width", [360, 400])
def test_phone(browser: "Browser", server: Server, width: int) -> None:
    with visiting(browser, server, viewport={"width": width, "height": 740}, is_mobile=True, has_touch=True) as visit:
        page = visit.open()
        assert not page.is_visible("#sidebar") and page.evaluate(OVERFLOW) == []
        page.tap(".example >> nth=2")
        visit.answered()
        assert page.evaluate(OVERFLOW) == []
        page.tap("#controls-toggle")
        assert (
            page.evaluate("document.getElementById('main').inert") is True
        )  # the drawer has everything else behind it
        page.tap("[data-example=tools]")
        assert page.evaluate(OVERFLOW) == []
        page.fill("#set-tools", "")
        page.tap("#controls [data-close]")
        assert page.evaluate("document.getElementById('main').inert") is False
        page.tap("[data-action=experts]")
        page.tap(".token >> nth=4")
        assert page.locator(".cell.lit").count() > 0 and page.evaluate(OVERFLOW) == []
        page.keyboard.press("Escape")
        page.tap("#sidebar-toggle")
        assert page.is_visible("#sidebar")
        page.locator("#backdrop").click(position={"x": width - 5, "y": 300})
        assert not page.is_visible("#sidebar")
        visit.fake(
            *text_answer(
                SAMPLE + "~~~\n" + "W" * 500 + "\n\n| a | b |\n|--|--|\n| " + "cell " * 40 + "| " + "x" * 200 + " |\n"
            )
        )
        visit.say("W" * 300)
        assert page.evaluate(OVERFLOW) == []
        small = page.evaluate(
            """[...document.querySelectorAll("button, summary, select")].filter((node) => node.checkVisibility())
            .map((node) => [node.getBoundingClientRect(), node.outerHTML.slice(0, 60)])
            .filter(([box]) => box.height < 24 || box.width < 24).map(([, html]) => html)"""
        )
        assert small == []  # WCAG's least size of a target


def test_reduced_motion(browser: "Browser", server: Server) -> None:
    with visiting(browser, server, reduced_motion="reduce") as visit:
        page = visit.open()
        visit.say(ADDITION)
        moving = page.evaluate(
            "[...document.querySelectorAll('*')].filter((n) => getComputedStyle(n).animationName !== 'none').length"
        )
        assert moving == 0


def test_usage_is_that_of_the_api(visit: Visit) -> None:
    page = visit.open()
    visit.say(ADDITION)
    page.click("#usage-open")
    page.wait_for_selector("#usage tbody tr")
    row = page.locator("#usage tbody tr").last
    usage = httpx.get(f"{visit.server.url}/v1/usage", params={"by": "day"}).json()["data"][-1]
    cells = row.locator("td").all_inner_texts()
    assert row.locator("th").inner_text().strip() == usage["day"]
    assert cells[:5] == [
        f"{usage[name]:,}"
        for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    ]
    page.select_option("#usage select", "key")
    page.wait_for_selector("#usage tbody th:has-text('anonymous')")
    page.keyboard.press("Escape")
    assert not page.is_visible("#usage")


if sys.platform == "win32":  # pragma: no cover - the server's fixture sends SIGTERM
    pytestmark = pytest.mark.skip(reason="the server's fixture needs signals")
