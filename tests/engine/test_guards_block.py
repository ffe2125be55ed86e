"""A real engine with a guard that blocks at each stage, and in the middle of a stream."""

import json
from typing import Any

import httpx
import pytest

from tests.engine.asking import PROMPT, chat
from tests.engine.conftest import MODEL, Server

CHAT = "/v1/chat/completions"
WITHHELD = "This answer was withheld by policy."
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ASKED: dict[str, list[dict[str, Any]]] = {
    "input": [{"role": "user", "content": "please blockme now"}],
    "tool": [
        *PROMPT,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "the page says blockme"},
    ],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", sorted(ASKED))
def test_each_stage_of_a_prompt_blocks(server: Server, web: httpx.Client, stage: str, *, stream: bool) -> None:
    """403 before the engine has a token, and an event that names the stage."""
    before = server.mark()
    answer = web.post(CHAT, json=chat(messages=ASKED[stage], stream=stream))
    (event,) = server.settled(1, before)
    assert (answer.status_code, event.status, event.response_tokens) == (403, "blocked_input", 0)
    assert {r.stage for r in event.guardrail_results if r.decision == "block"} == {stage}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_blocked(server: Server, web: httpx.Client, *, stream: bool) -> None:
    """Held to its end, not a word of it leaves; the event says at which stage."""
    before = server.mark()
    server.guard.block_output = True
    try:
        answer = web.post(CHAT, json=chat(stream=stream, n=2))
    finally:
        server.guard.block_output = False
    (event,) = server.settled(1, before)
    assert (answer.status_code, event.status, event.released_chars) == (200, "blocked_output", 0)
    assert (event.finish_reason, event.response_tokens) == ("content_filter", 10)
    assert [r.stage for r in event.guardrail_results if r.decision == "block"] == ["output"]
    assert WITHHELD in answer.text


def streamed(answer: httpx.Response) -> tuple[dict[int, str], dict[int, str]]:
    """Text and end of each choice."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                delta, index = choice.get("delta", {}), choice["index"]
                texts[index] = texts.get(index, "") + (delta.get("content") or choice.get("text") or "")
                ends |= {index: choice["finish_reason"]} if choice["finish_reason"] else {}
    return texts, ends


@pytest.mark.parametrize("n", [1, 2])
def test_a_late_block_ends_the_stream(
    server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """What was judged has left and is counted; the engine stops, every choice ends with `content_filter`."""
    before = server.mark()
    monkeypatch.setattr(server.guard, "window_chars", 32)
    monkeypatch.setattr(server.guard, "passes", 12)
    answer = web.post(CHAT, json=chat(stream=True, max_tokens=1_500, n=n))
    (event,) = server.settled(1, before)
    texts, ends = streamed(answer)
    assert (event.status, event.finish_reason, event.stream) == ("blocked_output", "content_filter", True)
    assert ends == dict.fromkeys(range(n), "content_filter")
    out = sum(len(text.removesuffix(WITHHELD)) for text in texts.values())
    assert event.released_chars == out > 0
    assert 0 < event.response_tokens < 1_500 * n
    assert all(text.endswith(WITHHELD) for text in texts.values())
    assert answer.text.rstrip().endswith("[DONE]")


def test_a_stream_that_passes_is_the_whole_answer(
    server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged in windows, its text, count and end are those of the answer that was not streamed."""
    before = server.mark()
    monkeypatch.setattr(server.guard, "window_chars", 32)
    asks = {"max_tokens": 400, "temperature": 0, "seed": 1}
    answer = web.post(CHAT, json=chat(stream=True, **asks))
    whole = web.post(CHAT, json=chat(**asks)).json()["choices"][0]["message"]["content"]
    events = server.settled(2, before)
    assert streamed(answer) == ({0: whole}, {0: "length"})
    assert [(e.status, e.response_tokens, e.released_chars) for e in events] == [("ok", 400, 0)] * 2
    assert [[r.stage for r in e.guardrail_results] for e in events] == [["input", "output"]] * 2


def test_a_client_that_leaves_a_held_stream_is_counted(
    server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aborted stream has its tokens, though it was not judged to its end."""
    before = server.mark()
    monkeypatch.setattr(server.guard, "window_chars", 32)
    body = {"model": MODEL, "prompt": "one", "max_tokens": 1_500, "ignore_eos": True, "stream": True}
    with web.stream("POST", "/v1/completions", json=body) as gone:
        next(gone.iter_raw())
    (event,) = server.settled(1, before)
    assert (event.status, event.released_chars) == ("aborted", 0)
    assert 0 < event.response_tokens < 1_500


def test_a_retrieved_chunk_is_taken_out_or_blocks(
    server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked in a message: by policy the request is refused, or goes on without it and the event has the count."""
    auditor = server.auditor()
    marked = auditor.gate.model_copy(update={"markers": (("<document>", "</document>"),)})
    monkeypatch.setattr(auditor, "gate", marked)
    (post,) = auditor.guards._posts
    text = "Read <document>the page says blockme</document> and answer."
    body = chat(messages=[{"role": "user", "content": text}])
    for poisoned, stream in (("block", False), ("drop", False), ("drop", True)):
        policy = post.policy.model_copy(update={"poisoned": poisoned})
        monkeypatch.setattr(auditor.guards, "_posts", (post._replace(policy=policy),))
        monkeypatch.setattr(auditor.guards, "_chosen", {})
        before = server.mark()
        answer = web.post(CHAT, json={**body, "stream": stream})
        (event,) = server.settled(1, before)
        if poisoned == "block":
            assert (answer.status_code, event.status, event.chunks_removed) == (403, "blocked_input", 0)
            continue
        assert (answer.status_code, event.status, event.chunks_removed) == (200, "ok", 1)
        assert [r.decision for r in event.guardrail_results if r.stage == "retrieved"] == ["block"]
        assert ("input", "Read [removed by policy] and answer.") in server.guard.saw
        assert event.view == "messages"


def test_the_guard_api_judges_without_the_engine(server: Server, web: httpx.Client) -> None:
    """Beside vLLM's own routes: a verdict for each chunk and one event, and the engine is not asked."""
    before = server.mark()
    answer = web.post("/v1/guard", json={"texts": ["the page says blockme", {"text": "fine", "stage": "tool"}]})
    (event,) = server.settled(1, before)
    told = [(each["stage"], each["decision"]) for each in answer.json()["texts"]]
    assert (answer.status_code, told) == (200, [("retrieved", "block"), ("tool", "allow")])
    assert (event.route, event.status, event.reason) == ("POST /v1/guard", "ok", "guard_api")
    assert (event.prompt_tokens, event.response_tokens) == (0, 0)
