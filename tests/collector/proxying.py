"""What the proxy's tests share: servers on loopback in threads of their own, a publisher that remembers, a guard."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from collector.auditor import Auditor
from collector.doors import Identity
from collector.event import AuditEvent, Rejection, decode, encode, from_timestamp_us
from collector.guards.config import GuardsConfig
from collector.guards.protocol import Judgement, Probe
from collector.guards.secrets import SecretsConfig
from collector.guards.stack import GuardStack
from collector.identity import KeyRing, Pseudonyms, new_api_key
from collector.journal import JournalFull
from collector.proxy_config import ProxyConfig
from collector.proxy_server import Site
from collector.routes import GateConfig
from collector.tickets import Counters
from collector.uuid7 import uuid7

BLANK: dict[str, Any] = {"prompt_hash": "", "guardrail_results": [], "response_tokens": 0, "blocked": False}


class Recorder:
    """Stands in for the publisher: makes real events, keeps them encoded, and the order of what happened."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []
        self.order: list[str] = []
        self.counters = Counters()
        self.full = self.full_at_end = False
        self.begun = 0

    def begin(self, *, key: str, known: Any) -> dict[str, Any]:
        """A request begun."""
        if self.full:
            raise JournalFull
        self.begun += 1
        self.order.append("begin")
        return dict(known)

    def finish(self, ticket: Any, **fields: Any) -> None:
        """A request finished."""
        if self.full_at_end:
            raise JournalFull
        self._keep(AuditEvent, BLANK | ticket | fields)
        self.order.append("event")

    def reject(self, *, key: str, **fields: Any) -> None:
        """One rejection."""
        if self.full:
            raise JournalFull
        self._keep(Rejection, BLANK | fields)

    def stop(self, _timeout_s: float = 10) -> bool:
        """The end."""
        return True

    def _keep(self, shape: type[AuditEvent], fields: dict[str, Any]) -> None:
        stamp = {
            "schema_version": "1.0",
            "event_id": uuid7(),
            "timestamp": from_timestamp_us(1_795_176_000_000_000),
            "collector_id": "test",
            "boot": "b",
            "seq": len(self.events),
        }
        event = decode(encode(shape(**stamp, **fields)))
        assert isinstance(event, AuditEvent)
        self.events.append(event)


class Switch:
    """A guard that blocks texts with `blockme`; on answers only where they are among its stages."""

    name, version = "secrets", "test"
    labels = frozenset({"switch"})
    probes = (Probe("blockme", "input", block=True), Probe("fine", "input", block=False))

    def __init__(self, stages: frozenset[Any]) -> None:
        self.stages = stages
        self.saw: list[tuple[str, str]] = []
        self.bad = "blockme"

    def judge(self, text: str, stage: str, context: object = None) -> Judgement:
        """The judgement."""
        self.saw.append((stage, text))
        bad = self.bad in text
        return Judgement(0.9 if bad else 0.1, "switch" if bad else "", bad)


UPSTREAM_KEY = "upstream-secret"
INPUT = frozenset({"input", "tool", "retrieved"})
BOTH = INPUT | {"output"}


class Front:
    """One proxy before `upstream`, its events and its guard."""

    def __init__(
        self,
        upstream: str,
        *,
        stages: frozenset[Any] = INPUT,
        gate: GateConfig | None = None,
        secret: str = UPSTREAM_KEY,
        **settings: Any,
    ) -> None:
        self.publisher, self.guard = Recorder(), Switch(stages)
        self.key, key_id, table = new_api_key(user="alice")
        policy = SecretsConfig(stages=stages or INPUT)
        config = GuardsConfig(order=("secrets",) if stages else (), secrets=policy, cache_entries=0)
        guards = GuardStack(config, guards={"secrets": self.guard})
        self.guard.saw.clear()
        identity = Identity(keys=KeyRing({key_id: table}), pseudonyms={"default": Pseudonyms(bytes(range(32)))})
        auditor = Auditor(
            self.publisher,  # type: ignore[arg-type]  # the recorder has what the auditor calls
            guards,
            identity,
            gate or GateConfig(),
            model_version="proxy@test",
        )
        self.site = Site(lambda: auditor, ProxyConfig(upstream=upstream, port=0, **settings), secret=secret)
        self.url = ""
        self.clients: list[Any] = []
        """To be closed at the end."""

    @property
    def events(self) -> list[AuditEvent]:
        """What was written."""
        return self.publisher.events

    @property
    def headers(self) -> dict[str, str]:
        """A good key."""
        return {"authorization": f"Bearer {self.key}"}

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def told(self) -> list[tuple[str, str, int]]:
        """Status, reason and HTTP status of each event."""
        return [(event.status, event.reason, event.http_status) for event in self.events]


class Running:
    """A server in a thread of its own."""

    def __init__(self, make: Callable[[], uvicorn.Server]) -> None:
        self.port = 0
        self._make = make
        self._server: uvicorn.Server | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20), "the server did not start"

    async def _run(self) -> None:
        self._server = server = self._make()
        serving = asyncio.ensure_future(server.serve())
        while not server.started and not serving.done():  # noqa: ASYNC110 - the server gives no event for it
            await asyncio.sleep(0.005)
        if server.started:
            self.port = server.servers[0].sockets[0].getsockname()[1]
            self._ready.set()
        await serving

    def stop(self) -> None:
        """End it and wait."""
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(30)


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens on yet."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        yield int(free.getsockname()[1])


@contextmanager
def running(app: Any, *, port: int = 0) -> Iterator[str]:
    """An ASGI app on a port; its URL."""
    config = {"host": "127.0.0.1", "port": port, "log_level": "critical", "lifespan": "off", "http": "h11"}
    server = Running(lambda: uvicorn.Server(uvicorn.Config(app, **config)))
    yield f"http://127.0.0.1:{server.port}"
    server.stop()


@contextmanager
def fronting(upstream: str, **settings: Any) -> Iterator[Front]:
    """A proxy on a port."""
    front = Front(upstream, **settings)
    server = Running(front.site.server)
    front.url = f"http://127.0.0.1:{server.port}"
    yield front
    for client in front.clients:
        client.close()
    server.stop()


class Raw:
    """An upstream that answers every request with the same bytes, then as it is told. `seen`: requests that came."""

    def __init__(self, answer: bytes, *, hang_s: float = 0.0) -> None:
        self.answer, self.hang_s = answer, hang_s
        self.seen = 0
        self.closed = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            # What is not read when the connection is closed resets it, and the answer may be lost.
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            if b"GET " not in head:
                self.seen += 1
            writer.write(self.answer)
            await writer.drain()
            if self.hang_s:
                await asyncio.wait_for(reader.read(-1), self.hang_s)
                self.closed += 1
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@contextmanager
def serving_raw(raw: Raw) -> Iterator[str]:
    """The upstream on a port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(raw.handle, "127.0.0.1", 0), loop).result(10)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def answer_of(body: Any, *, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    """An HTTP/1.1 answer with a length."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{more}content-length: {len(raw)}\r\n\r\n".encode() + raw
