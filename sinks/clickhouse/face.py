"""The read-only HTTP face of chDB: enough of ClickHouse's HTTP protocol for clickhouse-connect and for clickhouse-go,
which Grafana's data source uses. It runs inside the process that owns the folder, as chDB allows no other.

Without a password only this machine is answered, and only by its own names, so that no web page can reach it by
rebinding a name. What a query may do is judged in `readonly.py`.
"""

import asyncio
import hmac
import ipaddress
import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self
from urllib.parse import parse_qsl
from uuid import uuid4

import orjson
import structlog
from aiohttp import web

from sinks.clickhouse.clients import StoreError, one_line
from sinks.clickhouse.readonly import Answer, Forbidden, ReadOnlyEngine
from sinks.config import FaceConfig, StoreConfig

log = structlog.get_logger(__name__)

_NOT_SETTINGS: Final = frozenset({
    "query", "database", "default_format", "session_id", "session_timeout", "session_check", "query_id", "quota_key",
    "compress", "decompress", "user", "password", "client_protocol_version", "role", "stacktrace", "buffer_size",
    "enable_http_compression", "http_zlib_compression_level", "wait_end_of_query", "network_compression_method",
    "send_progress_in_http_headers", "http_headers_progress_interval_ms",
    "cancel_http_readonly_queries_on_client_close",
})  # fmt: skip
"""Parameters of the protocol that are understood or may be ignored; every other one is a setting."""
_STATUS: Final = {60: 404, 81: 404, 159: 408, 164: 403, 202: 503, 241: 400, 396: 400, 497: 403, 516: 403}
_CONTENT_TYPE: Final = {
    "JSON": "application/json",
    "JSONCompact": "application/json",
    "CSV": "text/csv; charset=UTF-8",
    "TabSeparated": "text/tab-separated-values; charset=UTF-8",
}
_CODE: Final = re.compile(r"Code: (\d+)")
_HELLO: Final = "SELECT displayName(), version(), revision(), timezone()"
"""What clickhouse-go asks first."""
_HELLO_PROTOCOL: Final = 54454
_NAMES_HERE: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Face:
    """Serves the face. Use as `async with Face(config) as face: face.url`."""

    def __init__(self, config: StoreConfig) -> None:
        """Raises `StoreError`: no chDB, no password file, or an address beyond this machine without a password."""
        self.url = ""
        self._config = config.face
        self._app = face_app(config)
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        """Listens. Raises `StoreError` where the port is taken."""
        host, port = self._config.host, self._config.port
        self._runner = web.AppRunner(self._app, access_log=None, handle_signals=False)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise StoreError(f"store.face can't listen on {host}:{port}: {error.strerror}") from None
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stops listening once the queries that run have ended; their time is limited."""
        if self._runner is not None:
            await self._runner.cleanup()


def face_app(config: StoreConfig) -> web.Application:
    """The face as an application, to be served or mounted. Raises `StoreError` as `Face` does."""
    handlers = _Handlers(config, ReadOnlyEngine(config), _password(config.face))
    app = web.Application(client_max_size=config.face.body_max_kb * 1024)
    app.router.add_get("/ping", handlers.ping)
    app.router.add_get("/", handlers.answer)
    app.router.add_post("/", handlers.answer)
    app.on_cleanup.append(handlers.drain)
    return app


def _password(config: FaceConfig) -> bytes:
    if config.password_file is None:
        if config.host not in ("127.0.0.1", "::1", "localhost"):
            raise StoreError(f"store.face.host {config.host} is not this machine alone: set store.face.password_file")
        return b""
    try:
        password = config.password_file.read_bytes().strip()
    except OSError as error:
        raise StoreError(f"store.face.password_file {config.password_file} can't be read: {error.strerror}") from None
    if not password:
        raise StoreError(f"store.face.password_file {config.password_file} is empty")
    return password


class _Handlers:
    def __init__(self, config: StoreConfig, engine: ReadOnlyEngine, password: bytes) -> None:
        self._config = config.face
        self._engine = engine
        self._password = password
        self._threads = ThreadPoolExecutor(config.face.parallel, "face")
        self._running = 0

    async def ping(self, _request: web.Request) -> web.Response:
        return web.Response(text="Ok.\n")

    async def drain(self, _app: web.Application) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    async def answer(self, request: web.Request) -> web.Response:
        """One query. Every answer carries the query's id; errors carry ClickHouse's code, as its clients expect."""
        headers = {"X-ClickHouse-Server-Display-Name": "inferwatch", "X-ClickHouse-Timezone": "UTC"}
        try:
            given = await _given(request)
            headers["X-ClickHouse-Query-Id"] = re.sub(r"[^\w-]", "", given.get("query_id", ""))[:64] or str(uuid4())
            return await self._answer(request, given, headers)
        except UnicodeDecodeError:
            return _error(headers, 36, "the request is no UTF-8, and this face only reads")
        except Forbidden as error:
            return _error(headers, error.code, str(error))
        except (web.HTTPException, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001  # the engine raises RuntimeError and errors of its own
            return _engine_error(headers, error)

    async def _answer(self, request: web.Request, given: Mapping[str, str], headers: Mapping[str, str]) -> web.Response:
        if not self._admitted(request, given):
            raise Forbidden("Authentication failed: wrong user or password, or not from this machine", 516)
        sql = given["query"].strip()
        if not sql:
            return web.Response(text="Ok.\n", headers=headers)
        if given.get("compress") == "1":
            raise Forbidden("compress=1 is not spoken here: choose gzip or no compression", 48)
        if sql == _HELLO and _number(given.get("client_protocol_version")) >= _HELLO_PROTOCOL:
            version = await self._run("SELECT version()", "TSVRaw", {}, {})
            return web.Response(body=_hello(version.body.decode().strip()), headers=headers)
        answer = await self._run(
            sql,
            given.get("default_format") or request.headers.get("X-ClickHouse-Format") or "TabSeparated",
            {name[6:]: value for name, value in given.items() if name.startswith("param_")},
            {n: v for n, v in given.items() if n not in _NOT_SETTINGS and not n.startswith("param_")},
        )
        return _response(headers, answer)

    async def _run(self, sql: str, fmt: str, parameters: Mapping[str, str], wished: Mapping[str, str]) -> Answer:
        """In a thread. A client that goes away leaves its query running; it still counts until its time is up."""
        if self._running >= self._config.parallel + self._config.waiting_max:
            raise Forbidden("too many queries wait: try again", 202)
        self._running += 1
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, self._engine.run, sql, fmt, parameters, wished
        )
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def _done(self, future: asyncio.Future[Answer]) -> None:
        self._running -= 1
        if not future.cancelled():
            future.exception()

    def _admitted(self, request: web.Request, given: Mapping[str, str]) -> bool:
        user = request.headers.get("X-ClickHouse-User", given.get("user", "default"))
        password = request.headers.get("X-ClickHouse-Key", given.get("password", ""))
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                user, _, password = b64decode(credentials, validate=True).decode().partition(":")
            except (Base64Error, UnicodeDecodeError):
                return False
        known = hmac.compare_digest(user.encode(errors="replace"), self._config.user.encode())
        right = hmac.compare_digest(password.encode(errors="replace"), self._password)
        return known and right and (bool(self._password) or _from_here(request))


def _from_here(request: web.Request) -> bool:
    """The peer is on this machine and calls it by its own name."""
    host = re.sub(r":\d+$", "", request.host)
    try:
        return host in _NAMES_HERE and ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False


async def _given(request: web.Request) -> dict[str, str]:
    """The parameters, from the URL and from a form, and the whole query text under `query`."""
    given = dict(parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True, errors="strict"))
    body = ""
    if request.content_type.startswith("multipart/"):
        form = await request.post()
        given |= {name: value for name, value in form.items() if isinstance(value, str)}
    else:
        body = (await request.read()).decode()
    given["query"] = "\n".join(part for part in (given.get("query", ""), body) if part.strip())
    return given


def _response(headers: Mapping[str, str], answer: Answer) -> web.Response:
    summary = {
        "read_rows": str(answer.read_rows),
        "read_bytes": str(answer.read_bytes),
        "elapsed_ns": str(answer.elapsed_ns),
    }
    return web.Response(
        body=answer.body,
        headers={
            **headers,
            "X-ClickHouse-Format": answer.format,
            "X-ClickHouse-Summary": orjson.dumps(summary).decode(),
            "Content-Type": _CONTENT_TYPE.get(answer.format, "application/octet-stream"),
            "X-Content-Type-Options": "nosniff",
        },
    )


def _engine_error(headers: Mapping[str, str], error: Exception) -> web.Response:
    text = one_line(error, 1000)
    found = _CODE.search(text)
    if found is None:
        log.error("query failed in the face", error=type(error).__name__)
        return _error(headers, 1002, type(error).__name__)
    return _error(headers, int(found.group(1)), text[found.end() :].removeprefix(". DB::Exception:").strip())


def _error(headers: Mapping[str, str], code: int, message: str) -> web.Response:
    return web.Response(
        status=_STATUS.get(code, 400 if code < 1000 else 500),
        text=f"Code: {code}. DB::Exception: {message}\n",
        headers={**headers, "X-ClickHouse-Exception-Code": str(code)},
    )


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else 0


def _hello(version: str) -> bytes:
    """The one answer that clickhouse-go reads with its own protocol revision: a Native block with block info.

    Reporting revision 0 makes it read all later answers as plain Native, which is what chDB writes. Layout: the block
    info, two varints for columns and rows, then name, type, a byte for custom serialisation, and data of each column.
    """

    def text(value: str) -> bytes:
        raw = value.encode()[:127]
        return bytes([len(raw)]) + raw

    def column(name: str, kind: str, value: bytes) -> bytes:
        return text(name) + text(kind) + b"\0" + value

    info = b"\x01\x00\x02\xff\xff\xff\xff\x00"
    return (
        info
        + b"\x04\x01"
        + column("displayName()", "String", text("inferwatch"))
        + column("version()", "String", text(version))
        + column("revision()", "UInt32", bytes(4))
        + column("timezone()", "String", text("UTC"))
    )
