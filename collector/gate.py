"""The gate: an ASGI middleware outside everything the server has. Nobody gets in without a key, and no refusal is lost.

A request passes when its path is spelled exactly as in the table of routes, its key is known, and its body is one JSON
object that can be read in only one way. The gate judges the prompts in the body off the event loop, tells the engine
plugin who asks and what the guards said by a context variable, and hands the app the same bytes it has read.

Guarantee: each audited HTTP request has at least one event under its `http_request_id`: those of its engine requests,
or one rejection, written before the answer leaves. Where no event can be written, the answer is 503.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, Final, TypeVar

import structlog

from collector import guard_api
from collector.audit import Unaudited
from collector.auditor import Auditor
from collector.context import NOBODY, Exchange, exchange
from collector.deadlines import Deadlines
from collector.judging import Crowded
from collector.media import items
from collector.prompt import TURNS_MAX, Body, PromptView, TooMany, check_lists, views
from collector.prompt_words import TooDeep
from collector.requests import CLOSE, Refusal, admit, caller_of, check_fields, parse, path_of, read_body, stranger
from collector.routes import VLLM, Route, RouteTable
from collector.trace import trace_id
from collector.uuid7 import uuid7

log = structlog.get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")
Reader = Callable[[str, Body], tuple[PromptView, ...]]

REQUEST_ID_HEADER: Final = b"inferwatch-request-id"
_RENDERING: Final = frozenset({"tokenize", "render"})
"""What harmless routes do that read prompts. They fetch the media in them, as the engine's own routes do."""
_INLINE_BYTES_MAX: Final = 65_536
"""Bodies up to this are read and, where no guard judges them, hashed on the event loop: some 10 µs a KB, while handing
over to a thread and back costs 50 to 100 µs each time, and the interpreter lets one of them run anyway."""


class Gate:
    """`app` behind the gate.

    `auditor`: gives the process's auditor for a scope of the app; blocking, called once, off the event loop, at the
    server's start or, where the server has no lifespan, at the first request. What it raises stops the server's start.
    `stop`: called at the end of the server, blocking. `routes`: the table of the server behind. `read`: gives the
    prompts of a body by the route's operation; what it refuses as a `Refusal` does not pass.
    `selftest`: awaited once the auditor is there, before anything is answered: sends a request through what is behind
    the gate and sees that it has its event. What it raises stops the server's start too.
    `crowded`: whether the server has more clients than it takes at once; then a request is refused.
    """

    def __init__(
        self,
        app: App,
        *,
        auditor: Callable[[Scope], Auditor],
        stop: Callable[[], None],
        routes: RouteTable = VLLM,
        read: Reader = views,
        selftest: Callable[[Scope, Auditor], Awaitable[None]] | None = None,
        crowded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app, self._open, self._stop, self._selftest = app, auditor, stop, selftest
        self._routes, self._read, self._crowded = routes, read, crowded
        self._auditor: Auditor | None = None
        self._opening = asyncio.Lock()
        self._buffered_bytes = 0
        self._body_deadlines = Deadlines(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = [await receive()]
        try:
            await self._ready(scope)
        except Exception as error:  # noqa: BLE001 - whatever it is, the server must not start
            _tell("the gate can't open, the server does not start", error)
            await send({"type": "lifespan.startup.failed", "message": f"inferwatch: {error}"})
            return

        async def told() -> Message:
            return first.pop() if first else await receive()

        async def answered(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                await asyncio.to_thread(self._stop)
            await send(message)

        await self._app(scope, told, answered)

    async def _ready(self, scope: Scope) -> Auditor:
        async with self._opening:
            if self._auditor is None:
                auditor = await asyncio.to_thread(self._open, scope)
                _tell_unknown_routes(scope, self._routes)
                if self._selftest is not None:
                    await self._selftest(scope, auditor)
                self._body_deadlines = Deadlines(auditor.gate.body_timeout_s)
                self._auditor = auditor
        return self._auditor

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            auditor = self._auditor or await self._ready(scope)
        except Exception as error:  # noqa: BLE001 - without an auditor nothing is answered
            _tell("the gate is not open, a request is refused", error)
            await _refuse(send, _unavailable(), "")
            return
        at_hand = Exchange(uuid7(), NOBODY, trace_id=trace_id(scope["headers"]))
        try:
            await self._answer(auditor, scope, receive, send, at_hand)
        finally:
            if at_hand.lease is not None:
                at_hand.lease.release()

    async def _answer(self, auditor: Auditor, scope: Scope, receive: Receive, send: Send, at_hand: Exchange) -> None:
        """Let the app answer, or refuse."""
        try:
            route, body = await self._enter(auditor, scope, receive, at_hand)
        except Refusal as refusal:
            refusal = _audited(auditor, scope, at_hand, refusal)
            await _refuse(send, refusal, at_hand.http_request_id)
            return
        if route.handling == "own":
            await _say(send, HTTPStatus.OK, body or b"", at_hand.http_request_id)
            return
        replayed = receive if body is None else _replay(body, receive, at_hand)
        if at_hand.chunks_removed and body is not None:
            scope = _sized(scope, len(body))
        if route.handling == "audited":
            await self._pass(auditor, at_hand, scope, replayed, send)
        else:
            # A server that begins a request within the answer of the last one on the connection hands its context on.
            exchange.set(None)
            await self._app(scope, replayed, send)

    async def _enter(
        self, auditor: Auditor, scope: Scope, receive: Receive, at_hand: Exchange
    ) -> tuple[Route, bytes | None]:
        """The route, and the body where there may be one; of a route of ours the answer. Raises `Refusal`, whatever
        goes wrong.
        """
        try:
            route = self._admit(auditor, scope, at_hand)
            body = await self._body(auditor, scope, receive, at_hand) if scope["method"] == "POST" else None
            at_hand.started_s = auditor.clock_s()
            if route.handling == "audited":
                body = await self._judge(auditor, scope, route, at_hand, body or b"")
            elif route.handling == "own":
                body = await guard_api.answer(auditor, scope, at_hand, body or b"")
            elif route.operation in _RENDERING:
                body = body or b""
                await self._media(auditor, at_hand, await _worked(auditor, body, parse, body), body)
        except Refusal:
            raise
        except TooDeep:
            raise Refusal(400, "too_deep", "The request's body is nested too deeply.") from None
        except TooMany:
            raise Refusal(400, "too_many", f"A request has at most {TURNS_MAX} messages, prompts and chunks.") from None
        except Crowded as error:
            raise Refusal(503, "busy", str(error)) from None
        except asyncio.CancelledError:
            with contextlib.suppress(Unaudited):
                _settle(auditor, at_hand, "client_gone", 0)
            raise
        except Exception as error:  # noqa: BLE001 - a fault of ours must not let a request in
            _tell("the gate failed, a request is refused", error)
            raise Refusal(500, "gate_failed", "The request could not be checked, so it is not answered.") from None
        finally:
            self._buffered_bytes -= at_hand.body_bytes
        return route, body

    def _admit(self, auditor: Auditor, scope: Scope, at_hand: Exchange) -> Route:
        """Who asks for what. The key comes first: strangers do not learn which routes there are."""
        path, gate = path_of(scope), auditor.gate
        route, at_hand.route = self._routes.find(scope["method"], path), self._routes.label(scope["method"], path)
        if self._crowded():
            raise Refusal(503, "busy", "Too many clients are connected. Try again later.", CLOSE)
        if scope["method"] == "GET" and path in gate.open_routes:
            return route or Route("refused", "")
        at_hand.caller = caller_of(scope, auditor, at_hand)
        admit(auditor, at_hand)
        if route is None or route.handling == "refused":
            reason = "unlisted_route" if at_hand.route == "unlisted" else "refused_route"
            raise Refusal(404, reason, "There is no such route here.")
        at_hand.operation = route.operation
        return route

    async def _body(self, auditor: Auditor, scope: Scope, receive: Receive, at_hand: Exchange) -> bytes:
        """The whole body, within the bounds of one, of its key's and of all requests not judged yet."""
        gate = auditor.gate
        of_key = at_hand.lease.body_bytes_max if at_hand.lease is not None else 0
        bytes_max = min(gate.body_bytes_max, of_key or gate.body_bytes_max)

        def count(size: int) -> None:
            at_hand.body_bytes += size
            self._buffered_bytes += size
            if self._buffered_bytes > gate.buffered_bytes_max:
                raise Refusal(503, "busy", "Too many requests are being read. Try again later.")

        try:
            return await self._body_deadlines.within(read_body(scope, receive, bytes_max, count))
        except TimeoutError:
            raise Refusal(408, "slow_body", "The request's body did not arrive in time.") from None

    async def _media(
        self, auditor: Auditor, at_hand: Exchange, body: Body, raw: bytes, prompts: tuple[PromptView, ...] = ()
    ) -> None:
        """What the body holds beside text, by the tenant's policy. Raises `Refusal`."""
        found = await _worked(auditor, raw, items, body)
        if found:
            asked = prompts[0].prompt if prompts else ""
            judging = auditor.threads.admit(auditor.judge_media, found, at_hand.caller, at_hand.route, asked)
            at_hand.media, at_hand.media_verdicts, passes = await judging
            if not passes:
                raise Refusal(403, "media", "Images, sound and films are not allowed in prompts here.")

    async def _judge(self, auditor: Auditor, scope: Scope, route: Route, at_hand: Exchange, raw: bytes) -> bytes:
        """Read the body, learn who is spoken for, and judge what it says. Returns it, without what was taken out."""
        body = await _worked(auditor, raw, parse, raw)
        if "user" in body or "session_id" in body:
            at_hand.caller = caller_of(scope, auditor, at_hand, body)
        check_fields(body, kv_transfer=auditor.gate.kv_transfer)
        check_lists(body)
        prompts = await _worked(auditor, raw, self._read, route.operation, body)
        if sum(len(view.turns) for view in prompts) > TURNS_MAX:
            raise TooMany
        await self._media(auditor, at_hand, body, raw, prompts)
        caller = at_hand.caller
        if auditor.drops(caller, at_hand.route):
            await auditor.threads.admit(auditor.sift, route.operation, body, at_hand, prompts)
            if at_hand.chunks_removed:
                raw, prompts = _written(body), self._read(route.operation, body)

        def judge(found: tuple[PromptView, ...]) -> list[Any]:
            return [auditor.judge(view, caller, at_hand.route) for view in found]

        inline = len(raw) <= _INLINE_BYTES_MAX and not auditor.judges_prompts
        at_hand.prompts = judge(prompts) if inline else await auditor.threads.admit(judge, prompts)
        return raw

    async def _pass(self, auditor: Auditor, at_hand: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer, and see that the request has its event before the answer is complete."""

        replaced = False

        async def answered(message: Message) -> None:
            nonlocal replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                if message["status"] >= HTTPStatus.BAD_REQUEST:
                    try:
                        _settle(auditor, at_hand, "server_refused", message["status"])
                    except Unaudited:
                        replaced = True
                        await _refuse(send, _unavailable(), at_hand.http_request_id)
                        return
                message = {**message, "headers": [*message.get("headers", ()), _id_header(at_hand)]}
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                _settle(auditor, at_hand, "no_engine_request", HTTPStatus.OK)
            await send(message)

        token = exchange.set(at_hand)
        try:
            await self._app(scope, receive, answered)
        except Exception:
            with contextlib.suppress(Unaudited):
                _settle(auditor, at_hand, "server_failed", HTTPStatus.INTERNAL_SERVER_ERROR)
            raise
        finally:
            exchange.reset(token)
            with contextlib.suppress(Unaudited):
                _settle(auditor, at_hand, "client_gone", 0)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """No websocket route is audited yet, so each is refused."""
        auditor = self._auditor or await self._ready(scope)
        at_hand = Exchange(uuid7(), NOBODY)
        await receive()
        refusal = Refusal(404, "websocket", "")
        try:
            at_hand.caller = caller_of(scope, auditor, at_hand)
        except Refusal as earlier:
            refusal = earlier
        _audited(auditor, scope, at_hand, refusal)
        await send({"type": "websocket.close", "code": 1008})


async def _worked(auditor: Auditor, raw: bytes, work: Callable[..., T], *arguments: object) -> T:
    """What `work` gives, which reads a body; where that is large, a thread does it."""
    return work(*arguments) if len(raw) <= _INLINE_BYTES_MAX else await auditor.threads.admit(work, *arguments)


def _settle(auditor: Auditor, at_hand: Exchange, reason: str, http_status: int) -> None:
    """A rejection where the request has no event yet."""
    if at_hand.engine_requests:
        return
    if at_hand.client_gone or not http_status:
        auditor.reject(at_hand, reason="client_gone", http_status=0, status="aborted")
    else:
        auditor.reject(at_hand, reason=reason, http_status=http_status)


def _audited(auditor: Auditor, scope: Scope, at_hand: Exchange, refusal: Refusal) -> Refusal:
    """The refusal once its event is written; 503 where it can't be."""
    if at_hand.caller is NOBODY:
        at_hand.caller = stranger(scope, auditor)
    try:
        auditor.reject(at_hand, reason=refusal.reason, http_status=refusal.status)
    except Unaudited:
        return _unavailable()
    return refusal


def _unavailable() -> Refusal:
    return Refusal(503, "unaudited", str(Unaudited()))


async def _refuse(send: Send, refusal: Refusal, request_id: str) -> None:
    """The refusal in the shape of OpenAI's errors."""
    await _say(send, refusal.status, refusal.body(), request_id, refusal.headers)


async def _say(
    send: Send, status: int, body: bytes, request_id: str, more: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """An answer of the gate's own: JSON."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (REQUEST_ID_HEADER, request_id.encode()),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _written(body: Mapping[str, object]) -> bytes:
    """The body without what was taken out of it. Raises `Refusal` for numbers that are none."""
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError:
        raise Refusal(400, "bad_json", "The request's body can't be sent on.") from None


def _sized(scope: Scope, length: int) -> Scope:
    """The scope of a request whose body is another one now."""
    kept = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}


def _replay(body: bytes, receive: Receive, at_hand: Exchange) -> Receive:
    """The body as one message, then what the connection says: that the client has gone."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        if waiting:
            return waiting.pop()
        message = await receive()
        at_hand.client_gone = at_hand.client_gone or message["type"] == "http.disconnect"
        return message

    return replayed


def _id_header(at_hand: Exchange) -> tuple[bytes, bytes]:
    return REQUEST_ID_HEADER, at_hand.http_request_id.encode()


def _tell(what: str, error: Exception) -> None:
    """Log a failure by the class of its error: message and trace may quote what a client sent."""
    log.error(what, error=type(error).__name__)


def _tell_unknown_routes(scope: Scope, table: RouteTable) -> None:
    """Say once which routes of this server the table has never heard of."""
    routes = getattr(scope.get("app"), "routes", ())
    rows = [f"{method} {route.path}" for route in routes for method in getattr(route, "methods", None) or ()]
    if new := table.unknown(rows):
        log.warning("this server has routes that inferwatch does not know; they are refused", routes=new)
