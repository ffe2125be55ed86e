"""The proxy before a server that speaks OpenAI's API: counts, streams, faults of the server, clients that go."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from collector.routes import GateConfig
from tests.collector.proxying import BOTH, Front, Raw, answer_of, fronting, running, serving_raw

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**BODY, "stream": True}
SSE = "text/event-stream"
WITHHELD = "This answer was withheld by policy."


class Server:
    """A small server of OpenAI's API. Its answer is `words`, one a chunk; `usage`: whether it gives counts."""

    def __init__(self) -> None:
        self.words = ["one ", "two ", "three"]
        self.usage, self.pause_s, self.gone = True, 0.0, 0
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["path"] == "/v1/models":
            await self._whole(send, {"object": "list", "data": [{"id": "m", "object": "model"}]})
            return
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        doing = asyncio.ensure_future(self._answer(scope["path"], body, send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        self.gone += not doing.done()
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)

    async def _answer(self, path: str, body: dict[str, Any], send: Any) -> None:
        head = {"id": "c1", "created": 1, "model": "m"}
        prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [1]
        counts = {"prompt_tokens": 7 * len(prompts), "completion_tokens": 3 * len(prompts), "total_tokens": 10}
        usage = {"usage": counts} if self.usage else {}
        if path == "/v1/embeddings":
            await self._whole(send, {"data": [{"embedding": [0.5], "index": 0}], **usage})
        elif not body.get("stream"):
            text = "".join(self.words)
            part = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
            choices = [{"index": index, **part, "finish_reason": "stop"} for index in range(body.get("n") or 1)]
            await self._whole(send, {**head, "object": "chat.completion", "choices": choices, **usage})
        else:
            await send(_start(b"text/event-stream; charset=utf-8"))
            for word in self.words:
                await self._event(send, {**head, "choices": [{"index": 0, "delta": {"content": word}}]})
                await asyncio.sleep(self.pause_s)
            await self._event(send, {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            if usage and (body.get("stream_options") or {}).get("include_usage"):
                await self._event(send, {**head, "choices": [], **usage})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _event(self, send: Any, frame: dict[str, Any]) -> None:
        await send({"type": "http.response.body", "body": f"data: {json.dumps(frame)}\n\n".encode(), "more_body": True})

    async def _whole(self, send: Any, body: dict[str, Any]) -> None:
        await send(_start(b"application/json"))
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def _start(kind: bytes) -> dict[str, Any]:
    headers = [(b"content-type", kind), (b"server", b"banner/1.2"), (b"x-powered-by", b"banner/1.2")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Server, str]]:
    """One server for all tests."""
    app = Server()
    with running(app) as url:
        yield app, url


@pytest.fixture
def upstream(shared: tuple[Server, str]) -> tuple[Server, str]:
    """The server, as new."""
    shared[0].__init__()  # type: ignore[misc]
    return shared


@pytest.fixture
def front(upstream: tuple[Server, str]) -> Iterator[Front]:
    """A proxy with a guard on prompts."""
    with fronting(upstream[1]) as made:
        yield made


def post(front: Front, body: dict[str, Any], path: str = CHAT, **options: Any) -> httpx.Response:
    """One request with a good key."""
    return httpx.post(f"{front.url}{path}", json=body, headers=front.headers, timeout=30, **options)


def test_the_official_client_works_and_sees_no_banner(upstream: tuple[Server, str], front: Front) -> None:
    """Whole and streamed chats, completions, embeddings, models."""
    with OpenAI(base_url=f"{front.url}/v1", api_key=front.key, max_retries=0) as client:
        assert client.chat.completions.create(**BODY).choices[0].message.content == "one two three"
        parts = list(client.chat.completions.create(**STREAM))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "one two three"
        assert client.completions.create(model="m", prompt="hi").choices[0].text == "one two three"
        assert client.embeddings.create(model="m", input="hi", encoding_format="float").data[0].embedding == [0.5]
        assert [model.id for model in client.models.list()] == ["m"]
        raw = client.chat.completions.with_raw_response.create(**BODY)
    assert {"server", "x-powered-by"}.isdisjoint(raw.headers)
    assert raw.headers["inferwatch-request-id"] == front.events[-1].http_request_id
    found = [(e.operation, e.stream, e.finish_reason, e.prompt_tokens, e.response_tokens) for e in front.events]
    assert found == [
        ("chat", False, "stop", 7, 3),
        ("chat", True, "length", 7, 3),
        ("completion", False, "stop", 7, 3),
        ("embedding", False, "", 7, 3),
        ("chat", False, "stop", 7, 3),
    ]
    assert {(event.model_version, event.tokens_from, event.status) for event in front.events} == {
        ("m@unknown", "usage", "ok")
    }


@pytest.mark.parametrize("ask", [True, False])
def test_counts_come_from_usage_and_else_from_chunks(upstream: tuple[Server, str], *, ask: bool) -> None:
    """The event says which; a client that did not ask for counts does not see them."""
    with fronting(upstream[1], ask_usage=ask) as front:
        assert "usage" not in post(front, STREAM).text
        assert '"usage"' in post(front, {**STREAM, "stream_options": {"include_usage": True}}).text
        upstream[0].usage = False
        post(front, STREAM)
        post(front, BODY)
    first = ("usage", 7) if ask else ("chunks", 0)
    assert [(e.tokens_from, e.prompt_tokens) for e in front.events] == [
        first, ("usage", 7), ("chunks", 0), ("unknown", 0)
    ]  # fmt: skip
    assert [event.response_tokens for event in front.events] == [3, 3, 3, 1]


def test_several_prompts_are_several_events_that_share_the_counts(upstream: tuple[Server, str], front: Front) -> None:
    """As many events as prompts, each with its own hash; the server's counts are shared out and add up."""
    post(front, {"model": "m", "prompt": ["a", "b", "c"], "max_tokens": 5, "n": 2}, "/v1/completions")
    assert len({event.prompt_hash for event in front.events}) == 3
    assert [(e.tokens_from, e.prompt_tokens, e.response_tokens, e.n) for e in front.events] == [("shared", 7, 3, 2)] * 3
    assert len({event.http_request_id for event in front.events}) == 1
    assert post(front, {"model": "m", "prompt": ["a", "blockme"]}, "/v1/completions").status_code == 403
    assert front.told()[3:] == [("blocked_input", "guard", 403), ("aborted", "another prompt blocked", 403)]
    assert len(upstream[0].bodies) == 1


@pytest.mark.parametrize(("asked", "told"), [(131_072, 131_072), (100.0, 100), (-1, 0), (None, 0), (10**30, 2**53)])
def test_an_event_says_how_many_tokens_were_asked_for(front: Front, asked: float | None, told: int) -> None:
    """However many."""
    assert post(front, {**BODY, "max_tokens": asked}).status_code == 200
    assert front.events[0].max_tokens == told


def test_a_pipelined_request_is_nobody_elses(front: Front) -> None:
    """The list of models, asked within a chat's answer, is the list, and no event of who chatted."""
    head = f"HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.key}\r\n"
    raw = json.dumps(BODY)
    sent = f"POST {CHAT} {head}content-length: {len(raw)}\r\n\r\n{raw}GET /v1/models {head}connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", front.port), 10) as to:
        to.sendall(sent.encode())
        answer = b"".join(iter(lambda: to.recv(65_536), b""))
    assert (answer.count(b"HTTP/1.1 200 "), b'"object":"list"' in answer) == (2, True)
    assert front.told() == [("ok", "", 200)]


def test_a_stream_passes_as_it_comes(upstream: tuple[Server, str], front: Front) -> None:
    """The first words are there long before the last; the event times both."""
    upstream[0].pause_s = 0.3
    with httpx.stream("POST", f"{front.url}{CHAT}", json=STREAM, headers=front.headers, timeout=30) as answer:
        began_s, arrived = time.monotonic(), []
        for piece in answer.iter_raw():
            arrived += [time.monotonic() - began_s] * piece.count(b'"content"')
    assert len(arrived) == 3
    assert arrived[2] - arrived[0] > 0.4
    (event,) = front.events
    assert event.ttft_ms is not None
    assert event.ms_per_output_token is not None
    assert event.ttft_ms < event.latency_ms - 500
    assert event.ms_per_output_token > 200


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_client_that_goes_closes_the_servers_connection(
    upstream: tuple[Server, str], front: Front, body: dict[str, Any]
) -> None:
    """The server stops working, and the event says aborted with what was made until then."""
    upstream[0].pause_s, upstream[0].words = 0.1, ["word "] * 200
    if body is BODY:
        upstream[0].__class__ = Slow
    with socket.create_connection(("127.0.0.1", int(front.url.rpartition(":")[2]))) as client:
        raw = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.key}\r\ncontent-length: {len(raw)}"
        client.sendall(f"{head}\r\n\r\n".encode() + raw)
        end_s = time.monotonic() + 20
        while not upstream[0].bodies:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        if body is STREAM:
            client.recv(10)
            time.sleep(0.3)
    while not (front.events and upstream[0].gone):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    upstream[0].__class__ = Server
    assert front.told() == [("aborted", "client gone", 0)]
    assert upstream[0].gone == 1
    assert front.events[0].tokens_from == "chunks"
    assert (front.events[0].response_tokens > 0) == (body is STREAM)


class Slow(Server):
    """Never answers."""

    async def _answer(self, path: str, body: dict[str, Any], send: Any) -> None:
        await asyncio.sleep(60)


def test_a_stream_that_never_ends_is_cut(upstream: tuple[Server, str]) -> None:
    """By the time for one answer."""
    upstream[0].words, upstream[0].pause_s = ["word "] * 1000, 0.05
    with fronting(upstream[1], answer_timeout_s=0.5) as front:
        assert "upstream_slow" in post(front, STREAM).text
        assert front.told() == [("error", "upstream_slow", 504)]


def test_a_server_that_is_not_there_is_a_502(front: Front) -> None:
    """Health says so too; nothing waits."""
    with fronting("http://127.0.0.1:1") as alone:
        assert post(alone, BODY).status_code == 502
        assert alone.told() == [("error", "upstream_away", 502)]
        assert httpx.get(f"{alone.url}/health").status_code == 502
        assert httpx.get(f"{alone.url}/v1/models", headers=alone.headers).status_code == 502
    assert httpx.get(f"{front.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_where_no_event_can_be_written_the_answer_does_not_leave(
    upstream: tuple[Server, str], front: Front, body: dict[str, Any]
) -> None:
    """A full journal before the server is asked, and one that fills up meanwhile."""
    front.publisher.full = True
    assert post(front, body).status_code == 503
    assert upstream[0].bodies == []
    front.publisher.full, front.publisher.full_at_end = False, True
    got = post(front, body)
    assert "can't be audited" in got.text
    assert "[DONE]" not in got.text
    assert got.status_code == (200 if body is STREAM else 503)


ASKED: dict[str, dict[str, Any]] = {
    CHAT: BODY,
    "/v1/completions": {"model": "m", "prompt": "hello"},
    "/v1/responses": {"model": "m", "input": "hello"},
    "/v1/messages": {"model": "m", "max_tokens": 9, "messages": BODY["messages"]},
}
ENDED = {"index": 0, "finish_reason": "stop"}
WHOLE: dict[str, dict[str, Any]] = {
    CHAT: {"id": "1", "choices": [{**ENDED, "message": {"content": "bad word"}}]},
    "/v1/completions": {"id": "1", "choices": [{**ENDED, "text": "bad word"}]},
    "/v1/responses": {"id": "r", "status": "completed", "output": [{"content": [{"text": "bad word"}]}]},
    "/v1/messages": {"id": "m", "content": [{"type": "text", "text": "bad word"}], "stop_reason": "end_turn"},
}
SAYS = "response.output_text.delta"
STREAMED: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"choices": [{"index": 0, "delta": {"content": "bad "}}]},
        {"choices": [{**ENDED, "delta": {"content": "word"}}]},
    ],
    "/v1/completions": [{"choices": [{"index": 0, "text": "bad "}]}, {"choices": [{**ENDED, "text": "word"}]}],
    "/v1/responses": [
        {"type": SAYS, "delta": "bad "},
        {"type": SAYS, "delta": "word"},
        {"type": "response.completed", "response": {"status": "completed"}},
    ],
    "/v1/messages": [
        {"type": "content_block_delta", "delta": {"text": "bad "}},
        {"type": "content_block_delta", "delta": {"text": "word"}},
        {"type": "message_stop"},
    ],
}


def events(path: str) -> bytes:
    """A stream of an API."""
    frames = [f"data: {json.dumps(frame)}\n\n" for frame in STREAMED[path]]
    return "".join([*frames, "data: [DONE]\n\n"] if "choices" in STREAMED[path][0] else frames).encode()


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("path", sorted(ASKED))
def test_a_blocked_answer_is_withheld_in_the_shape_of_each_api(path: str, *, hold: bool) -> None:
    """Not a word of it goes out, unless streams are not held: then its end is another."""
    for stream, raw in ((False, answer_of(WHOLE[path])), (True, answer_of(events(path), kind=SSE))):
        gate = GateConfig(hold_streams=hold)
        with serving_raw(Raw(raw)) as url, fronting(url, stages=frozenset({"output"}), gate=gate) as front:
            front.guard.bad = "bad word"
            got = post(front, {**ASKED[path], "stream": stream}, path)
            assert (got.status_code, front.told()) == (200, [("blocked_output", "", 200)])
            if not stream or hold:
                assert (WITHHELD in got.text, "bad" in got.text) == (True, False)
            assert "content_filter" in got.text or '"refusal"' in got.text
            assert ("[DONE]" in got.text) == (stream and path in (CHAT, "/v1/completions"))


def test_tool_calls_and_reasoning_are_answers_too() -> None:
    """Every string that is no label is judged, its pieces put together."""
    call = b'{"index":0,"function":{"name":"run","arguments":"bad w"}}'
    more = b'{"index":0,"function":{"arguments":"ord"}}'
    frames = b"".join(
        b'data: {"choices":[{"index":0,"delta":{"reasoning":"hm","tool_calls":[' + part + b"]}}]}\n\n"
        for part in (call, more)
    )
    ends = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}\n\ndata: [DONE]\n\n'
    with serving_raw(Raw(answer_of(frames + ends, kind=SSE))) as url, fronting(url, stages=BOTH) as front:
        front.guard.bad = "bad word"
        assert WITHHELD in post(front, STREAM).text
        assert [text for stage, text in front.guard.saw if stage == "output"][-3:] == ["hmhm", "run", "bad word"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/responses", {"model": "m", "input": "hi", "previous_response_id": "r"}, "stateful"),
        (CHAT, {**BODY, "seed": 10**400}, "bad_json"),
        (CHAT, {**BODY, "user": "\ud800"}, "bad_json"),
        ("/v1/completions", {"model": "m", "prompt": [1, 2, 3]}, "unreadable"),
        ("/v1/rerank", {"model": "m", "query": "blockme", "documents": ["a"]}, "guard"),
        ("/v1/score", {"model": "m", "text_1": "a", "text_2": ["b", "blockme"]}, "guard"),
        (CHAT, {**BODY, "prompt_extra": "blockme"}, "guard"),
        *((CHAT, {**BODY, field: "blockme"}, "guard") for field in ("system", "prompt", "input", "template", "query")),
        ("/v1/messages", {**BODY, "documents": ["blockme"]}, "guard"),
        ("/v1/completions", {"model": "m", "prompt": "fine", "messages": [{"content": "blockme"}]}, "guard"),
        ("/v1/embeddings", {"model": "m", "input": "fine", "prompt": "blockme"}, "guard"),
        ("/v1/embeddings", {"model": "m", "input": "blockme", **BODY}, "guard"),
        *((CHAT, {**BODY, "stream": odd}, "odd_type") for odd in (1, "true", [])),
        (CHAT, {**STREAM, "stream_options": "x"}, "odd_type"),
        *((CHAT, {**BODY, "n": odd}, "odd_type") for odd in ("2", 2.5, True)),
        (CHAT, {**BODY, "max_tokens": "100"}, "odd_type"),
    ],
)
def test_what_can_not_be_read_in_one_way_is_refused(
    upstream: tuple[Server, str], front: Front, path: str, body: dict[str, Any], reason: str
) -> None:
    """And never reaches the server."""
    raw = json.dumps(body).replace(str(10**400), "1e400")
    got = httpx.post(f"{front.url}{path}", content=raw, headers=front.headers)
    assert (got.status_code, upstream[0].bodies) == (403 if reason in ("unreadable", "guard") else 400, [])
    assert front.told()[0][1] == reason
