"""What the proxy takes for a model's words where an answer is no plain text."""

import json
from typing import Any

import pytest

from collector.proxy_answers import Seen
from tests.collector.proxying import Raw, answer_of, fronting, serving_raw
from tests.collector.test_proxy_openai import ASKED, CHAT, ENDED, SSE, post
from tests.collector.test_proxy_upstream_faults import GOOD


def used(arguments: object) -> dict[str, Any]:
    """An answer of Anthropic's that calls a tool."""
    return {"content": [{"type": "tool_use", "id": "t", "name": "f", "input": arguments}], "stop_reason": "tool_use"}


def nested(depth: int) -> Any:
    """Objects in objects."""
    deep: Any = "bad word"
    for _ in range(depth):
        deep = {"a": deep}
    return deep


SAID: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"an argument called {name}": ("/v1/messages", used({name: "bad word"}))
        for name in ("user", "id", "status", "metadata", "error", "model", "instructions", "tools", "a name")
    },
    "the name of an argument": ("/v1/messages", used({"bad word": None})),
    "a name within arguments": ("/v1/messages", used([{"a": [{"bad word": 1}]}])),
    "a deep argument": ("/v1/messages", used(nested(60))),
    "arguments that are an object": (
        CHAT,
        {
            "choices": [
                {**ENDED, "message": {"tool_calls": [{"function": {"name": "f", "arguments": {"user": "bad word"}}}]}}
            ]
        },
    ),
    "an error beside choices": (CHAT, {**GOOD, "error": {"message": "bad word"}}),
    "an error that is a text": (CHAT, {**GOOD, "error": "bad word"}),
    "a note": (
        CHAT,
        {
            "choices": [
                {
                    **ENDED,
                    "message": {
                        "content": "x",
                        "annotations": [{"type": "url_citation", "url_citation": {"title": "bad word"}}],
                    },
                }
            ]
        },
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_model_says_in_structure_is_judged(name: str) -> None:
    """What an API calls a label is none within the arguments of a tool, nor is an error or a note."""
    path, answer = SAID[name]
    seen = Seen("chat" if path == CHAT else "messages", keep_text=True)
    assert seen.see(answer)
    assert any("bad word" in text for text in seen.texts())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_blocked_for_what_an_argument_says(*, stream: bool) -> None:
    """Whole and as a stream."""
    raw = sent(used({"user": "bad word"}), stream=stream)
    with serving_raw(Raw(raw)) as url, fronting(url, stages=frozenset({"output"})) as front:
        front.guard.bad = "bad word"
        got = post(front, {**ASKED["/v1/messages"], "stream": stream}, "/v1/messages")
        assert (got.status_code, "bad word" in got.text) == (200, False)
        assert front.told() == [("blocked_output", "", 200)]


def sent(answer: dict[str, Any], *, stream: bool) -> bytes:
    """As a server sends it."""
    return answer_of(f"data: {json.dumps(answer)}\n\n".encode(), kind=SSE) if stream else answer_of(answer)


def test_a_number_among_arguments_is_judged_with_its_name() -> None:
    """A card's number need not be a text, and a name beside a value tells what it is."""
    seen = Seen("messages", keep_text=True)
    assert seen.see(used({"card": 4111111111111111, "password": "q7Rt", "ok": True}))
    assert seen.texts() == ["f", '{"card":4111111111111111,"password":"q7Rt","ok":true}']


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("answer", [{"choices": [nested(40)]}, used(nested(300))])
def test_what_is_nested_too_deeply_does_not_leave(answer: dict[str, Any], *, stream: bool) -> None:
    """What no guard can read is not let out."""
    path = CHAT if "choices" in answer else "/v1/messages"
    with serving_raw(Raw(sent(answer, stream=stream))) as url, fronting(url, stages=frozenset({"output"})) as front:
        got = post(front, {**ASKED[path], "stream": stream}, path)
        assert (got.status_code, "bad word" in got.text) == (502, False)
        assert front.told() == [("error", "upstream_garbled", 502)]
