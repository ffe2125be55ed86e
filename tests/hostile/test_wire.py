"""Hostile HTTP over real sockets: nothing reaches the app, or the server behind, without a key or without an event."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from collector.audit import EngineRequest
from collector.context import exchange
from collector.gate import Gate
from tests.collector.proxying import Front, Running, fronting, running
from tests.hostile.wire import Case, cases, mutations, send_all

ANSWERED = re.compile(rb"inferwatch-request-id: ([0-9a-f-]{36})")
SEED = 20_261_129


class App:
    """The server behind the gate. `reached`: request id and API key of each request that came in."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.reached: list[tuple[str, str]] = []
        self.unaudited: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request: an engine request, where it is audited."""
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        at_hand = exchange.get()
        if at_hand is None:
            self.unaudited.append(f"{scope['method']} {scope['path']}")
        else:
            await receive()
            self.reached.append((at_hand.http_request_id, at_hand.caller.key_id))
            self.front.site.auditor().open(EngineRequest("generate", "hello")).close("ok", http_status=200)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


class Behind:
    """The server behind the proxy. `reached`: the requests that came in, but for lists of models."""

    def __init__(self) -> None:
        self.reached: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        names = [name for name, _ in scope["headers"]]
        body: dict[str, Any] = {"data": []}
        if scope["path"] != "/v1/models":
            assert len(names) == len(set(names))
            self.reached.append(json.loads((await receive())["body"]))
            body = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}]}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@contextmanager
def gated(parser: str) -> Iterator[tuple[Front, App, int]]:
    """The real gate before an app that counts, served as vLLM serves it."""
    front = Front("http://127.0.0.1:1")
    app = App(front)
    gate = Gate(app, auditor=lambda _: front.site._opened(), stop=lambda: None)
    config = {"host": "127.0.0.1", "port": 0, "log_level": "critical", "lifespan": "on", "http": parser}
    server = Running(lambda: uvicorn.Server(uvicorn.Config(gate, **config)))
    yield front, app, server.port
    server.stop()


def judge(front: Front, sent: list[Case], answers: list[bytes], reached: int, keys: set[str]) -> None:
    """What holds whatever was sent: each answer of the gate has its event, and whoever got in had a key."""
    answered = {found.decode() for answer in answers for found in ANSWERED.findall(answer)}
    told = {event.http_request_id for event in front.events}
    worked = [event for event in front.events if event.status in ("ok", "aborted", "error", "blocked_input")]
    assert answered <= told
    assert all(event.key_id for event in worked)
    assert keys <= {event.key_id for event in worked}
    assert reached <= len(worked)
    unkeyed = [case.name for case, answer in zip(sent, answers, strict=True) if not case.keyed and b"{}" in answer]
    open_to_all = ("health", "HTTP/0.9", "GET with")
    assert [name for name in unkeyed if not any(part in name for part in open_to_all)] == []


def wait_for_quiet(front: Front) -> None:
    """Until no event has come for a moment."""
    before = -1
    while before != len(front.events):
        before = len(front.events)
        time.sleep(0.3)


@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_nothing_reaches_the_app_behind_the_gate_without_a_key_or_an_event(parser: str) -> None:
    """Smuggling, odd paths, doubled keys, upgrades, broken chunks: by both parsers that vLLM may be served with."""
    if parser == "httptools":
        pytest.importorskip("httptools")
    with gated(parser) as (front, app, port):
        sent = list(cases(front.key))
        answers = asyncio.run(send_all(port, sent))
        wait_for_quiet(front)
        judge(front, sent, answers, len(app.reached), {key for _, key in app.reached})
        assert {request_id for request_id, _ in app.reached} <= {event.http_request_id for event in front.events}
        assert set(app.unaudited) <= {"GET /health"}  # open by default
        print(f"{parser}: {len(sent)} cases, {len(app.reached)} reached the app, {len(front.events)} events")
        assert len(app.reached) > 5  # the good ones among them


def test_nothing_reaches_the_server_behind_the_proxy_without_a_key_or_an_event() -> None:
    """The same, before a server that counts; what is no HTTP at all has its event too."""
    behind = Behind()
    with running(behind) as url, fronting(url) as front:
        sent = list(cases(front.key))
        answers = asyncio.run(send_all(front.port, sent))
        wait_for_quiet(front)
        judge(front, sent, answers, len(behind.reached), set())
        print(f"{len(sent)} cases, {len(behind.reached)} reached the server, {len(front.events)} events")
        assert 5 < len(behind.reached) <= front.publisher.begun
        assert "bad_http" in {event.reason for event in front.events}
        assert all(body["model"] == "m" for body in behind.reached)


@pytest.mark.parametrize("count", [300, pytest.param(6_000, marks=pytest.mark.soak)])
def test_mutations_of_a_good_request_do_not_get_in_either(count: int) -> None:
    """Random damage, by the seed printed."""
    print(f"seed {SEED}")
    behind = Behind()
    with gated("h11") as (front, app, port), running(behind) as url, fronting(url) as second:
        doors: list[tuple[Front, int, list[Any]]] = [(front, port, app.reached), (second, second.port, behind.reached)]
        for site, at, reached in doors:
            sent = list(mutations(site.key, SEED, count))
            answers = asyncio.run(send_all(at, sent))
            wait_for_quiet(site)
            judge(site, sent, answers, len(reached), set())
            assert set(app.unaudited) <= {"GET /health"}
            print(f"{len(sent)} mutations, {len(reached)} got in, {len(site.events)} events")


def test_a_client_that_dawdles_over_the_head_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a request is closed, and so is one whose second request stops half way."""
    monkeypatch.setattr("collector.proxy_server._HEAD_TIMEOUT_S", 0.4)

    async def dawdle(port: int, first: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first + b"POST /v1/chat")
        answer = await asyncio.wait_for(reader.read(-1), 10)
        writer.close()
        return answer

    behind = Behind()
    with running(behind) as url, fronting(url) as front:
        good = next(cases(front.key)).raw
        assert asyncio.run(dawdle(front.port, b"")) == b""
        assert asyncio.run(dawdle(front.port, good)).startswith(b"HTTP/1.1 200")
