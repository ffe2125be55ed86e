"""The proxy's app: behind the gate, before a server that can't be wrapped from within. One exchange at a time.

The body that the gate has read is parsed, and what is sent on is written anew from it; so the server behind never reads
bytes that were not read here. Guarantee, as of the engine plugin: each prompt of an audited request is begun in the
journal before the server sees it, and its event is written before the last byte of the answer leaves. A client that
goes closes the connection to the server, and its event says `aborted`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from contextlib import AsyncExitStack
from typing import Any, Final

import orjson
import structlog

from collector.audit import Blocked, EngineRequest, Unaudited
from collector.auditor import Auditor
from collector.context import Exchange, exchange
from collector.proxy_config import ProxyConfig
from collector.proxy_prompts import requests
from collector.proxy_relay import Relay, answer_json
from collector.proxy_routes import APIS
from collector.proxy_upstream import Upstream, UpstreamFailed
from collector.requests import Refusal
from collector.trace import traceparent
from collector.weights import Model

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_INLINE_BYTES_MAX: Final = 65_536
_TRACESTATE_BYTES_MAX: Final = 512
_WITH_USAGE: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
_LOADS: Final = {
    "/api/generate": "prompt",
    "/api/chat": "messages",
    "/api/embed": "input",
    "/api/embeddings": "prompt",
    "/v1/completions": "prompt",
}
"""Where an empty field has Ollama load or unload a model, and nothing else."""
_STREAMED: Final = {"accept": "text/event-stream, application/x-ndjson, application/json"}


class Proxy:
    """The ASGI app. `upstream`: makes the client of the server behind, in the event loop. `auditor`: the process's."""

    def __init__(
        self, config: ProxyConfig, *, upstream: Callable[[], Upstream], auditor: Callable[[], Auditor]
    ) -> None:
        self._config, self._make, self._auditor = config, upstream, auditor
        self._upstream: Upstream | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection that the gate has let through."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        upstream = self._reach()
        upstream.refresh()
        at_hand = exchange.get()
        if at_hand is None:
            await self._harmless(upstream, str(scope["path"]), send)
            return
        raw = (await receive()).get("body", b"")
        await _until_gone(self._audited(upstream, at_hand, scope, raw, send), receive)

    def _reach(self) -> Upstream:
        if self._upstream is None:
            self._upstream = self._make()
        return self._upstream

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._reach().list_models()
        except UpstreamFailed:
            log.warning("the server behind does not answer yet; the proxy starts all the same")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._reach().close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _harmless(self, upstream: Upstream, path: str, send: Send) -> None:
        """Lists of models are passed on; health is whether there is one."""
        try:
            if path == "/health":
                await upstream.check()
                raw = b'{"status":"ok"}'
            else:
                raw = orjson.dumps(orjson.loads(await upstream.get(path)))
        except UpstreamFailed as failure:
            await answer_json(send, failure.status, Refusal(failure.status, failure.reason, str(failure)).body())
        except ValueError:
            await answer_json(send, 502, Refusal(502, "upstream_garbled", str(UpstreamFailed(502, ""))).body())
        else:
            await answer_json(send, 200, raw)

    async def _audited(self, upstream: Upstream, at_hand: Exchange, scope: Scope, raw: bytes, send: Send) -> None:
        path, auditor = str(scope["path"]), self._auditor()
        relay = Relay(auditor, APIS.get(path, "vectors"), send)
        try:
            body = _parsed(raw)
            await self._permit(upstream, path, body)
            asked = _written(self._asked(path, body, relay))
            prompts = await self._requests(auditor, at_hand, body, large=len(raw) > _INLINE_BYTES_MAX)
            self._begin(at_hand, upstream.model(body.get("model")), prompts, relay)
            async with AsyncExitStack() as stack, asyncio.timeout(self._config.answer_timeout_s):
                answer = await upstream.ask(stack, "POST", path, asked, _headers(scope))
                await relay.pass_on(answer)
        except Refusal as refusal:
            auditor.reject(at_hand, reason=refusal.reason, http_status=refusal.status)
            await answer_json(send, refusal.status, refusal.body())
        except Blocked:
            await relay.refuse(Refusal(403, "blocked", "This request was blocked by policy."), "another prompt blocked")
        except UpstreamFailed as failure:
            await relay.fail(failure)
        except TimeoutError:
            await relay.fail(UpstreamFailed(504, "upstream_slow"))
        except Unaudited as refused:
            await relay.refuse(Refusal(503, "unaudited", str(refused)), "unaudited")
        except Exception as error:  # noqa: BLE001 - a trace in the server's log may quote what was asked
            _tell("the proxy failed, a request is refused", error)
            await relay.refuse(Refusal(500, "proxy_failed", "The request could not be answered."), "proxy failed")
        finally:
            relay.drop()

    async def _permit(self, upstream: Upstream, path: str, body: dict[str, Any]) -> None:
        """Raises Refusal for what Ollama does beside inference on this host, UpstreamFailed where it can't be asked."""
        if self._config.kind != "ollama" or APIS.get(path) == "management":
            return
        if not self._config.allow_remote_models:
            place = await upstream.place(body.get("model"))
            if place == "elsewhere":
                raise Refusal(403, "remote_model", "This model is served from another host, which is not allowed here.")
            if place == "nowhere":
                raise Refusal(404, "unlisted_model", "The model server has no model of this name: ask for its list.")
            if _searches(body.get("tools")):
                raise Refusal(403, "web_search", "Searching the web by the model server is not allowed here.")
        if path in _LOADS and not body.get(_LOADS[path]) and not self._config.allow_load:
            raise Refusal(403, "model_load", "Loading and unloading models is not open to clients here.")

    def _asked(self, path: str, body: dict[str, Any], relay: Relay) -> dict[str, Any]:
        """The body as it is sent on: streams of the OpenAI API are asked for their token counts."""
        options = body.get("stream_options") or {}
        asks = self._config.ask_usage and path in _WITH_USAGE and body.get("stream") is True
        if not asks or not isinstance(options, dict) or options.get("include_usage"):
            return body
        relay.hides_usage = True
        return {**body, "stream_options": {**options, "include_usage": True}}

    async def _requests(
        self, auditor: Auditor, at_hand: Exchange, body: dict[str, Any], *, large: bool
    ) -> list[EngineRequest]:
        """One for each prompt in the body; none for management. A large body is read on a thread."""
        if at_hand.operation == "management":
            return []
        found = requests(at_hand.operation, body, native=at_hand.route.startswith("POST /api/"))
        return await auditor.threads.run(list, found) if large else list(found)

    def _begin(self, at_hand: Exchange, model: Model, prompts: Iterable[EngineRequest], relay: Relay) -> None:
        """Begin each prompt in the journal. Raises Blocked once all of them are begun, Unaudited."""
        auditor, blocked = self._auditor(), False
        if at_hand.operation == "management":
            auditor.reject(at_hand, reason="management", http_status=200, status="ok")
            return
        for asked in prompts:
            try:
                request = asked._replace(model_version=model.version, weights_digest=model.digest)
                relay.audits.append(auditor.open(request))
            except Blocked:
                blocked = True
        if blocked:
            raise Blocked


def _searches(tools: object) -> bool:
    """Whether a tool is one that Ollama works itself, by a service on the net, and not the client."""
    kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return any(str(kind).strip().casefold().startswith("web_search") for kind in kinds)


def _tell(what: str, error: Exception) -> None:
    """Log a failure by the class of its error: message and trace may quote what a client sent."""
    log.error(what, error=type(error).__name__)


async def _until_gone(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do the work, or give it up when the client has gone."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        doing.cancel()
        watching.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)
    if not doing.cancelled():
        doing.result()


def _parsed(raw: bytes) -> dict[str, Any]:
    """The body. Raises Refusal for numbers and characters that parsers read differently."""
    try:
        body = orjson.loads(raw)
    except ValueError:
        raise Refusal(400, "bad_json", "The request's body can't be sent on.") from None
    return dict(body)


def _written(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError:  # too deep for it, though nothing that a guard reads is
        raise Refusal(400, "too_deep", "The request's body is nested too deeply.") from None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _headers(scope: Scope) -> dict[str, str]:
    """What goes on of the client's headers: the trace context alone."""
    parent = traceparent(scope["headers"])
    states = [value for name, value in scope["headers"] if name == b"tracestate"]
    headers = {"content-type": "application/json", **_STREAMED}
    if parent:
        headers["traceparent"] = parent.decode("ascii")
    if parent and len(states) == 1 and len(states[0]) <= _TRACESTATE_BYTES_MAX and states[0].isascii():
        headers["tracestate"] = states[0].decode("ascii")
    return headers
