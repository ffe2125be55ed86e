"""Clients of the proxy that come in crowds, do not read, or ask what costs the server behind."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from collector import proxy_prompts
from tests.collector.proxying import Front, fronting, running

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
FRAME = {"choices": [{"index": 0, "delta": {"content": "word " * 2_000}}]}


class Server:
    """A server of OpenAI's API whose streams are as long as the client reads. `rows`: what was asked."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        self.rows.append(f"{scope['method']} {scope['path']}")
        chat = scope["path"] == CHAT
        kind = b"text/event-stream" if chat else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for _ in range(5_000 if chat else 0):
            frame = f"data: {json.dumps(FRAME)}\n\n".encode()
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if chat else b'{"data": []}'})


@pytest.fixture
def upstream() -> Iterator[tuple[Server, str]]:
    """One server for each test."""
    app = Server()
    with running(app) as url:
        yield app, url


def until(reached: Callable[[], object]) -> None:
    """Waits 20 s at most."""
    end_s = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def connect(front: Front, raw: bytes = b"") -> socket.socket:
    """A client that has sent this and reads nothing yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    client.connect(("127.0.0.1", front.port))
    client.sendall(raw)
    return client


def test_a_request_of_one_client_too_many_is_refused_with_its_event(upstream: tuple[Server, str]) -> None:
    """With a key or without; once the others have gone, it is answered."""
    with fronting(upstream[1], connections_max=3) as front, ExitStack() as crowd:
        for _ in range(3):
            crowd.enter_context(connect(front))
        for headers in (front.headers, {}):
            answer = httpx.post(f"{front.url}/v1/embeddings", json={"model": "m", "input": "x"}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
            assert answer.headers["connection"] == "close"
        assert front.told() == [("rejected", "busy", 503)] * 2
        assert {event.route for event in front.events} == {"POST /v1/embeddings"}
        crowd.close()
        until(lambda: httpx.get(f"{front.url}/v1/models", headers=front.headers).status_code == 200)


def test_of_a_crowd_no_more_connections_are_held_than_can_be_refused(
    upstream: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection beyond that is closed before it has asked for anything."""
    monkeypatch.setattr("collector.proxy_server._REFUSED_AT_ONCE", 2)
    with fronting(upstream[1], connections_max=1) as front, ExitStack() as crowd:
        clients = [crowd.enter_context(connect(front)) for _ in range(6)]
        for client in clients:
            client.settimeout(0.3)
        assert [closed(client) for client in clients] == [False] * 3 + [True] * 3
        assert front.events == []


def closed(client: socket.socket) -> bool:
    """Whether the server has ended the connection."""
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_a_client_that_does_not_read_is_cut_off(upstream: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection would be held for ever: no time-out of an answer ends what can't be written."""
    monkeypatch.setattr("collector.proxy_server._STALL_TIMEOUT_S", 0.5)
    raw = json.dumps({**BODY, "stream": True})
    with fronting(upstream[1]) as front:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.key}\r\n"
        with connect(front, f"{head}content-length: {len(raw)}\r\n\r\n{raw}".encode()):
            until(lambda: front.events)
            assert front.told() == [("aborted", "client gone", 0)]
            server = front.site._server
            assert server is not None
            until(lambda: not server.server_state.connections and not server.server_state.tasks)


def test_a_client_that_reads_slowly_gets_it_all(upstream: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The time runs anew whenever it has read."""
    monkeypatch.setattr("collector.proxy_server._STALL_TIMEOUT_S", 2)
    raw = json.dumps({**BODY, "stream": True})
    with fronting(upstream[1], answer_bytes_max=1_000_000) as front:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.key}\r\nconnection: close\r\n"
        with connect(front, f"{head}content-length: {len(raw)}\r\n\r\n{raw}".encode()) as client:
            got = 0
            while piece := client.recv(65_536):
                got += len(piece)
                time.sleep(0.01)
        assert got > 900_000
        assert front.told() == [("error", "upstream_too_large", 502)]


def test_asking_for_health_costs_the_server_behind_one_request_a_second(upstream: tuple[Server, str]) -> None:
    """It needs no key, so anybody may ask."""
    with fronting(upstream[1]) as front, httpx.Client(base_url=front.url) as client:
        began_s, before = time.monotonic(), len(upstream[0].rows)
        assert {client.get("/health").status_code for _ in range(60)} == {200}
        assert len(upstream[0].rows) - before <= time.monotonic() - began_s + 2
    with fronting("http://127.0.0.1:1") as front:
        assert [httpx.get(f"{front.url}/health").status_code for _ in range(3)] == [502] * 3


def test_a_large_body_is_read_on_a_thread(upstream: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile others are answered."""
    threads: list[str] = []

    def read(*args: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        return proxy_prompts.read(*args)

    monkeypatch.setattr("collector.proxy.requests", lambda operation, body, native: map(read, [operation], [body]))
    with fronting(upstream[1]) as front:
        for words in (1, 20_000):
            body = {"model": "m", "input": "word " * words}
            httpx.post(f"{front.url}/v1/embeddings", json=body, headers=front.headers)
    assert [name == "inferwatch-judge" for name in threads] == [False, True]
