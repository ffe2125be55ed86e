"""Streams that are judged while they go out: what leaves when, and how a late block ends them."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from collector.routes import GateConfig
from tests.collector.proxying import Front, Raw, answer_of, fronting, serving_raw

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True}
SSE, LINES = "text/event-stream", "application/x-ndjson"
OUTPUT = frozenset({"output"})
GOOD = [f"word {number} " for number in range(120)]
LATE = [*GOOD[:60], "bad ", "wo", "rd ", *GOOD[60:]]
WITHHELD = "This answer was withheld by policy."


def chat(words: list[str], field: str = "content") -> bytes:
    """A stream of OpenAI's chat."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({field: word} for word in words)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    return b"".join(f"data: {json.dumps({'id': 'c', 'choices': [one]})}\n\n".encode() for one in choices) + (
        b"data: [DONE]\n\n"
    )


def two(words: list[str]) -> bytes:
    """A stream of two choices that come in turn."""
    frames = [
        {"id": "c", "choices": [{"index": place % 2, "delta": {"content": word}}]} for place, word in enumerate(words)
    ]
    ends = [{"id": "c", "choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]} for index in (0, 1)]
    return b"".join(f"data: {json.dumps(frame)}\n\n".encode() for frame in [*frames, *ends]) + b"data: [DONE]\n\n"


def tool(words: list[str]) -> bytes:
    """A tool call whose arguments come in pieces."""
    first = {"index": 0, "id": "t", "function": {"name": "send", "arguments": ""}}
    calls = [first, *({"index": 0, "function": {"arguments": word}} for word in words)]
    frames = [{"id": "c", "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]} for call in calls]
    frames.append({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    return b"".join(f"data: {json.dumps(frame)}\n\n".encode() for frame in frames) + b"data: [DONE]\n\n"


def responses(words: list[str]) -> bytes:
    """A stream of OpenAI's responses, which says all of it again at the end."""
    text = "".join(words)
    frames: list[dict[str, Any]] = [{"type": "response.output_text.delta", "delta": word} for word in words]
    frames.append({"type": "response.output_text.done", "text": text})
    done = {"status": "completed", "output": [{"content": [{"text": text}]}]}
    frames.append({"type": "response.completed", "response": done})
    return b"".join(f"event: {frame['type']}\ndata: {json.dumps(frame)}\n\n".encode() for frame in frames)


def ollama(words: list[str]) -> bytes:
    """A stream of Ollama's chat."""
    frames: list[dict[str, Any]] = [{"message": {"content": word}, "done": False} for word in words]
    frames.append({"message": {"content": ""}, "done": True, "done_reason": "stop", "eval_count": 3})
    return b"".join(json.dumps(frame).encode() + b"\n" for frame in frames)


STREAMS: dict[str, tuple[Any, str, str]] = {
    "chat": (chat, CHAT, SSE),
    "reasoning": (lambda words: chat(words, "reasoning_content"), CHAT, SSE),
    "two choices": (two, CHAT, SSE),
    "tool call": (tool, CHAT, SSE),
    "responses": (responses, "/v1/responses", SSE),
    "ollama": (ollama, "/api/chat", LINES),
}


class Slow(Raw):
    """A server whose answer comes a few frames at a time."""

    async def handle(self, reader: Any, writer: Any) -> None:
        """One connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        pieces = self.answer.split(b"\n\n") if b"event-stream" in self.answer else self.answer.split(b"\n")
        end = b"\n\n" if b"event-stream" in self.answer else b"\n"
        for place in range(0, len(pieces), 5) if b"GET " not in head else ():
            more = end if place + 5 < len(pieces) else b""
            writer.write(end.join(pieces[place : place + 5]) + more)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            # On a busy machine what comes quickly is read at once; a pause parts what comes before it from the rest.
            await asyncio.sleep(0.15 if len(pieces) // 3 <= place < len(pieces) // 3 + 5 else 0.003)
            if writer.is_closing():
                break
        self.closed += 1
        writer.close()


@contextmanager
def judged(raw: bytes, kind: str, *, window_chars: int = 32, **gate: Any) -> Iterator[Front]:
    """A proxy with a guard on answers that judges in windows, before a server that answers with `raw`."""
    server = "ollama" if kind == LINES else "openai"
    settings = GateConfig(**{"hold_back_chars": 64, **gate})
    with (
        serving_raw(Slow(answer_of(raw, kind=kind))) as url,
        fronting(url, kind=server, stages=OUTPUT, gate=settings, allow_remote_models=True) as front,
    ):
        front.guard.bad = "bad word"
        front.guard.window_chars = window_chars  # type: ignore[attr-defined]  # it becomes one that judges in pieces
        yield front


def asked(front: Front, path: str) -> str:
    """The answer to a streaming request."""
    body = {**BODY, "input": "hello"} if path == "/v1/responses" else BODY
    return httpx.post(f"{front.url}{path}", json=body, headers=front.headers).text


@pytest.mark.parametrize("name", STREAMS)
def test_a_good_stream_passes_byte_for_byte(name: str) -> None:
    """Judged in windows that overlap, then handed on as it came; the event has one verdict."""
    make, path, kind = STREAMS[name]
    with judged(make(GOOD), kind) as front:
        assert asked(front, path) == make(GOOD).decode()
        (event,) = front.events
        assert (event.status, event.released_chars) == ("ok", 0)
        assert [(r.stage, r.decision) for r in event.guardrail_results] == [("output", "allow")]
        windows = [text for stage, text in front.guard.saw if stage == "output"]
        assert len(windows) > 3


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "two choices"])
def test_a_late_block_ends_the_stream_before_the_first_bad_character(name: str) -> None:
    """What had left is counted in the event; of what was blocked, in pieces, nothing has."""
    make, path, kind = STREAMS[name]
    with judged(make(LATE), kind) as front:
        got = asked(front, path)
        (event,) = front.events
        assert (event.status, event.http_status, event.blocked) == ("blocked_output", 200, True)
        assert [(r.stage, r.decision) for r in event.guardrail_results] == [("output", "block")]
        assert "content_filter" in got
        assert '"bad ' not in got
        assert "word 119" not in got


def test_what_had_left_is_counted() -> None:
    """The pieces come one by one; most of those before the block are out, none after."""
    with judged(chat(LATE), SSE) as front:
        got = asked(front, CHAT)
        frames = [json.loads(line[6:]) for line in got.splitlines() if line.startswith("data: {")]
        out = "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames[:-1])
        (event,) = front.events
        assert "".join(LATE).startswith(out)
        assert event.released_chars == len(out) > 100
        assert (event.finish_reason, frames[-1]["choices"][0]["finish_reason"]) == ("content_filter",) * 2
        assert frames[-1]["choices"][0]["delta"]["content"] == WITHHELD
        assert event.tokens_from == "chunks"


@pytest.mark.parametrize(("window_chars", "gate"), [(0, {}), (32, {"hold_back_chars": 0})])
def test_a_guard_that_needs_the_whole_answer_gets_it(window_chars: int, gate: dict[str, int]) -> None:
    """Nothing leaves before the end then, and nothing at all of what is blocked."""
    with judged(chat(LATE), SSE, window_chars=window_chars, **gate) as front:
        got = asked(front, CHAT)
        assert ("word" in got, WITHHELD in got) == (False, True)
        assert [text for stage, text in front.guard.saw if stage == "output"] == ["".join(LATE)]
        assert front.events[0].released_chars == 0


def test_a_guard_that_only_watches_holds_nothing_up() -> None:
    """In shadow mode the stream goes as it comes, and the whole answer is judged at its end."""
    with judged(chat(LATE), SSE) as front:
        auditor = front.site.auditor()
        (post,) = auditor.guards._posts
        shadow = post.policy.model_copy(update={"mode": "shadow"})
        auditor.guards._posts = (post._replace(policy=shadow),)
        auditor.guards._chosen.clear()
        assert asked(front, CHAT) == chat(LATE).decode()
        (event,) = front.events
        assert (event.status, event.guardrail_results[0].decision) == ("ok", "shadow")


def test_a_client_that_leaves_takes_no_verdict_with_it() -> None:
    """What was judged until then is in the event of the aborted stream."""
    with judged(chat(GOOD * 40), SSE) as front:
        with httpx.stream("POST", f"{front.url}{CHAT}", json=BODY, headers=front.headers) as answer:
            next(piece for piece in answer.iter_raw() if b"word" in piece)
        end_s = time.monotonic() + 10
        while not front.events:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        (event,) = front.events
        assert (event.status, event.reason) == ("aborted", "client gone")
        assert [(r.stage, r.decision) for r in event.guardrail_results] == [("output", "allow")]


def test_a_guard_that_fails_on_a_window_ends_the_stream() -> None:
    """`on_error` decides there and then."""
    with judged(chat(GOOD), SSE) as front:

        def fails(text: str, stage: str, context: object = None) -> Any:
            raise ValueError(text)

        front.guard.judge = fails  # type: ignore[method-assign]  # from here on it is broken
        got = asked(front, CHAT)
        (event,) = front.events
        assert (event.status, event.guardrail_results[0].error) == ("blocked_output", "ValueError")
        assert "word 119" not in got
