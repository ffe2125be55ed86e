"""The proxy as a server: uvicorn with h11, stricter than it comes. The only file that imports uvicorn.

What h11 can't read as one HTTP/1.1 request is refused and the connection closed; since no app ever sees it, its event
is written from here. A client that takes too long to send a request's head, or to read what it has asked for, is cut
off.
"""

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from collector.audit import Unaudited
from collector.auditor import Auditor
from collector.config import CollectorConfig
from collector.context import Exchange
from collector.gate import Gate
from collector.kafka import KafkaConfig
from collector.proxy import Proxy
from collector.proxy_config import ProxyConfig
from collector.proxy_prompts import read
from collector.proxy_routes import table
from collector.proxy_upstream import Upstream
from collector.secret_file import read_secret
from collector.startup import open_auditor
from collector.uuid7 import uuid7
from collector.weights import Model

log = structlog.get_logger(__name__)

_HEAD_TIMEOUT_S: Final = 10.0
_HEAD_BYTES_MAX: Final = 32_768
_STALL_TIMEOUT_S: Final = 60.0
_REFUSED_AT_ONCE: Final = 64
"""Clients over `connections_max` whose requests are still read, so that each refusal has its event."""


class StrictH11(H11Protocol):
    """One connection. `unread`: told the address of a client whose request could not be read."""

    def __init__(self, *args: Any, unread: Callable[[str], None], connections_max: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._unread, self._connections_max = unread, connections_max
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there; its first request must come in time, and where it is one too many, it asks for nothing."""
        super().connection_made(transport)
        if len(self.connections) > self._connections_max + _REFUSED_AT_ONCE:
            transport.abort()
        self._watch()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to: it has only so long."""
        super().pause_writing()
        self._stall = self.loop.call_later(_STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes came: a request that is in the middle of its head has only so long."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """An answer is out: the next request's head, where it has begun, has only so long."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        for timer in (self._deadline, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What h11 refuses."""
        self._unread(str(self.client[0]) if self.client else "")
        super().send_400_response(msg)

    def _watch(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_TIMEOUT_S, self._late)
        elif not waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _tell(what: str, error: Exception) -> None:
    log.error(what, error=type(error).__name__)


class Site:
    """One proxy: the gate, the app, and the auditor that both share once the server has started."""

    def __init__(self, open_: Callable[[], Auditor], config: ProxyConfig, *, secret: str = "") -> None:
        self.config, self._open = config, open_
        self._auditor: Auditor | None = None
        proxy = Proxy(config, upstream=lambda: Upstream(config, secret), auditor=self.auditor)
        routes = table(config.kind, config.open_management)
        self._gate = Gate(
            proxy,
            auditor=lambda _: self._opened(),
            stop=self._stop,
            routes=routes,
            read=read,
            crowded=self._crowded,
        )
        self._server: uvicorn.Server | None = None

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI app. What it fails with is named, not shown: the server's own trace may quote what was sent."""
        try:
            await self._gate(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - as said
            _tell("a connection failed", error)

    def auditor(self) -> Auditor:
        """The process's auditor. Raises Unaudited before the start and after the end."""
        if self._auditor is None:
            raise Unaudited
        return self._auditor

    def _opened(self) -> Auditor:
        self._auditor = self._open()
        return self._auditor

    def _stop(self) -> None:
        auditor, self._auditor = self._auditor, None
        if auditor is not None:
            auditor.stop()

    def _unread(self, address: str) -> None:
        """The event of a request that was no HTTP."""
        with contextlib.suppress(Unaudited):  # told in the log where it failed
            auditor = self.auditor()
            caller = auditor.caller(auditor.gate.tenant, address=address)
            auditor.reject(Exchange(uuid7(), caller), reason="bad_http", http_status=400)

    def _crowded(self) -> bool:
        return self._server is not None and len(self._server.server_state.connections) > self.config.connections_max

    def server(self) -> uvicorn.Server:
        """The server, ready to run."""
        # uvicorn calls it to make a protocol, and wants a class by its types alone.
        config = self.config
        protocol = cast(Any, partial(StrictH11, unread=self._unread, connections_max=config.connections_max))
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                host=config.host,
                port=config.port,
                http=protocol,
                ws="none",
                interface="asgi3",
                lifespan="on",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=10,
                timeout_graceful_shutdown=20,
                h11_max_incomplete_event_size=_HEAD_BYTES_MAX,
                ssl_certfile=config.tls_cert_file,
                ssl_keyfile=config.tls_key_file,
            )
        )
        return self._server


def site(kafka: KafkaConfig, config: CollectorConfig, proxy: ProxyConfig, *, config_digest: str = "") -> Site:
    """The proxy of a configuration. Raises KeyProblem; the server's start raises what `open_auditor` does."""
    model = Model(f"{proxy.kind}@proxy")
    return Site(
        lambda: open_auditor(kafka, config, model, config_digest=config_digest),
        proxy,
        secret=read_secret(proxy.upstream_key_file, "the upstream's key"),
    )
