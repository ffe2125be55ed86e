"""Receivers for the tests: a webhook endpoint that checks signatures with the official library, and a syslog server."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from standardwebhooks import Webhook

SECRETS = ("whsec_" + "QUJD" * 10, "whsec_" + "REVG" * 12)


@dataclass
class Hook:
    """What arrived, each verified, and what to answer next: a status, or a function of the request."""

    url: str = ""
    messages: list[tuple[str, Any]] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    answers: list[int | tuple[int, dict[str, str]] | Callable[[web.Request], Any]] = field(default_factory=list)
    secrets: tuple[str, ...] = SECRETS


@asynccontextmanager
async def hook_server(tls: ssl.SSLContext | None = None, secrets: tuple[str, ...] = SECRETS) -> AsyncIterator[Hook]:
    """Serves on a free loopback port."""
    hook = Hook(secrets=secrets)

    async def take(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        verified = [Webhook(secret).verify(body, dict(request.headers)) for secret in hook.secrets]
        hook.messages.append((request.headers["webhook-id"], verified[0]))
        hook.stamps.append(int(request.headers["webhook-timestamp"]))
        answer = hook.answers.pop(0) if hook.answers else 204
        if callable(answer):
            return await answer(request)
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        return web.Response(status=status, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    hook.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}/hook/token-in-path"
    try:
        yield hook
    finally:
        await runner.cleanup()


async def arrived(given: Callable[[], list[Any]], count: int) -> list[Any]:
    """What `given` gives once there are `count`; a receiver may lag behind its kernel. Raises TimeoutError."""
    async with asyncio.timeout(5):
        while len(given()) < count:  # noqa: ASYNC110  # what is waited for may be lines in a file
            await asyncio.sleep(0.01)
    return given()


@dataclass
class Collected:
    """Messages of a syslog server, without their frames, and the connections they came by."""

    port: int = 0
    messages: list[bytes] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: connections are accepted but not read."""


@asynccontextmanager
async def syslog_server(tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[Collected]:
    """Reads octet-counted frames."""
    collected = Collected()
    collected.reading.set()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        collected.writers.append(writer)
        try:
            while True:
                await collected.reading.wait()
                length = int(await reader.readuntil(b" "))
                collected.messages.append(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", port, ssl=tls, limit=1 << 20)
    collected.port = server.sockets[0].getsockname()[1]
    try:
        yield collected
    finally:
        server.close()
        for writer in collected.writers:
            writer.transport.abort()


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for 127.0.0.1 signed by itself: its file, to be trusted, and a server's context."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", str(key), "-out", str(cert)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context
