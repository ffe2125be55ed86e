"""The server behind the proxy: one fixed address, asked by one HTTP client. The only file here that imports httpx.

What may go wrong has one exception with an HTTP status and a fixed word. No redirect is followed, no proxy of the
environment is used, no request is sent twice, and of the client's headers only `accept` of a known kind and the trace
context go on.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, Final, Literal

import httpx
import orjson

from collector.proxy_config import ProxyConfig
from collector.weights import Model

_ANSWER_TYPES: Final = frozenset({"application/json", "application/x-ndjson", "text/event-stream"})
Place = Literal["here", "elsewhere", "nowhere"]
UNKNOWN: Final = Model("unknown@unknown")


class UpstreamFailed(Exception):
    """The server behind did not answer as it must: 502 or 504, a fixed word, a sentence for the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__("The model server did not answer." if status == 504 else "The model server failed.")
        self.status, self.reason = status, reason


class Answer:
    """The server's answer: its status and type at once, its body as it comes."""

    def __init__(self, response: httpx.Response, bytes_max: int) -> None:
        self._response, self._bytes_max = response, bytes_max
        self.status = response.status_code
        self.retry_after = response.headers.get("retry-after", "")
        self.type = response.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body's bytes. Raises UpstreamFailed."""
        size = 0
        with _told:
            async for piece in self._response.aiter_raw():
                size += len(piece)
                if size > self._bytes_max:
                    raise UpstreamFailed(502, "upstream_too_large")
                yield piece

    async def whole(self) -> bytes:
        """The whole body. Raises UpstreamFailed."""
        return b"".join([piece async for piece in self.pieces()])


class _Told:
    """Turns the client's errors into ours. None of their messages is kept: they may quote what was received."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            connecting = isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
            status, reason = (502, "upstream_away") if connecting else (504, "upstream_slow")
            raise UpstreamFailed(status, reason) from None
        if isinstance(error, httpx.ConnectError):
            raise UpstreamFailed(502, "upstream_away") from None
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL | httpx.StreamError):
            raise UpstreamFailed(502, "upstream_broke") from None


_told = _Told()


class Upstream:
    """One server. `open` in the event loop that asks; `close` at its end."""

    def __init__(self, config: ProxyConfig, secret: str) -> None:
        self._config, self._client = config, _client(config, secret)
        self._models: Mapping[str, Model] = {}
        self._remote: frozenset[str] = frozenset()
        self._listing: asyncio.Task[None] | None = None
        self._listed_s = 0.0

    async def close(self) -> None:
        """Close all connections."""
        if self._listing is not None:
            self._listing.cancel()
        await self._client.aclose()

    async def ask(
        self, stack: AsyncExitStack, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        """Send one request; `stack` closes its connection. Raises UpstreamFailed."""
        with _told:
            asked = self._client.stream(method, path, content=body, headers=headers)
            response = await stack.enter_async_context(asked)
        if 300 <= response.status_code < 400 or response.status_code < 200:
            raise UpstreamFailed(502, "upstream_redirects")
        answer = Answer(response, self._config.answer_bytes_max)
        plain = response.headers.get("content-encoding", "identity") == "identity"
        good = 400 <= answer.status < 600 or (answer.status == 200 and answer.type in _ANSWER_TYPES)
        if not plain or not good:
            raise UpstreamFailed(502, "upstream_garbled")
        return answer

    async def get(self, path: str) -> bytes:
        """The JSON that a GET gives. Raises UpstreamFailed."""
        async with AsyncExitStack() as stack:
            answer = await self.ask(stack, "GET", path, None, {})
            if answer.status != 200 or answer.type != "application/json":
                raise UpstreamFailed(502, "upstream_refused")
            return await answer.whole()

    # -- models

    async def list_models(self) -> None:
        """Ask which models there are. Raises UpstreamFailed; what was known before stays."""
        ollama = self._config.kind == "ollama"
        raw = await self.get("/api/tags" if ollama else "/v1/models")
        try:
            listed = orjson.loads(raw)["models" if ollama else "data"] or ()
            entries = [entry for entry in listed if isinstance(entry, dict)][:10_000]
        except (ValueError, KeyError, TypeError):
            raise UpstreamFailed(502, "upstream_garbled") from None
        self._remote = frozenset(
            _folded(str(entry.get("name")))
            for entry in entries
            if entry.get("remote_host") or entry.get("remote_model")
        )
        self._models = dict(map(_tagged if ollama else _named, entries))

    def refresh(self, every_s: float = 10) -> "asyncio.Task[None]":
        """List the models again, in the background, where the list is old; the listing under way or the last one."""
        now_s = asyncio.get_running_loop().time()
        if self._listing is None or (self._listing.done() and now_s - self._listed_s > every_s):
            self._listed_s = now_s
            self._listing = asyncio.ensure_future(self.list_models())
            self._listing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._listing

    async def check(self) -> None:
        """Raises UpstreamFailed where the server does not answer. However many ask, it is asked once a second."""
        await asyncio.shield(self.refresh(1))

    def model(self, name: object) -> Model:
        """The model of that name as the server lists it; a name that it does not list is the client's own text."""
        asked = _folded(str(name)) if self._config.kind == "ollama" else str(name)
        return self._models.get(asked, UNKNOWN)

    async def place(self, name: object) -> Place:
        """Where Ollama would work the prompt. What it does not list it has not, or has by an alias of another host's.

        A name not known yet is asked for again, once a second. Raises UpstreamFailed where it does not answer.
        """
        asked = _folded(str(name))
        if asked.endswith((":cloud", "-cloud")):
            return "elsewhere"
        if asked not in self._models:
            await self.check()
        if asked in self._remote:
            return "elsewhere"
        return "here" if asked in self._models else "nowhere"


def _client(config: ProxyConfig, secret: str) -> httpx.AsyncClient:
    headers = {"user-agent": "inferwatch", "accept-encoding": "identity", "accept": "application/json"}
    if secret:
        headers["authorization"] = f"Bearer {secret}"
    verify: ssl.SSLContext | bool = True
    if config.upstream_ca_file is not None:
        verify = ssl.create_default_context(cafile=str(config.upstream_ca_file))
    return httpx.AsyncClient(
        base_url=config.upstream,
        headers=headers,
        timeout=httpx.Timeout(
            config.silence_timeout_s, connect=config.connect_timeout_s, pool=config.connect_timeout_s
        ),
        limits=httpx.Limits(max_connections=config.connections_max, max_keepalive_connections=64, keepalive_expiry=4),
        follow_redirects=False,
        trust_env=False,
        verify=verify,
    )


def _folded(name: str) -> str:
    """Ollama takes names in any case, with blanks, a scheme and `:local`, and `llama3` for its library's latest."""
    folded = "".join(name.split()).casefold().rpartition("://")[2].removesuffix(":local")
    folded = folded.removeprefix("registry.ollama.ai/").removeprefix("library/")
    return folded if ":" in folded.rpartition("/")[2] else f"{folded}:latest"


def _tagged(entry: Mapping[str, Any]) -> tuple[str, Model]:
    name, digest = str(entry.get("name") or entry.get("model"))[:200], str(entry.get("digest", ""))
    digest = digest.removeprefix("sha256:")
    good = len(digest) == 64 and all(digit in "0123456789abcdef" for digit in digest)
    return _folded(name), Model(f"{name}@{digest[:16]}", f"sha256:{digest}") if good else Model(f"{name}@unknown")


def _named(entry: Mapping[str, Any]) -> tuple[str, Model]:
    name = str(entry.get("id"))
    # A path would tell of the host; its last part names the model well enough.
    return name, Model(f"{name.rstrip('/').rpartition('/')[2] if name.startswith('/') else name[:200]}@unknown"[:256])
