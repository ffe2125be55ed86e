"""Reads one HTTP request strictly: its path, its key, its body. What can be read in two ways is refused.

Pure functions of the ASGI scope, but for `read_body`. Raises `Refusal`, whose words never quote the request.
"""

import hmac
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

from collector.auditor import Auditor
from collector.context import Caller, Exchange
from collector.identity import NotKnown, Principal
from collector.limits import LimitReached

_SINGLE: Final = frozenset(
    {b"authorization", b"x-api-key", b"x-session-id", b"x-user-id", b"content-type", b"content-length", b"host"}
)
"""Headers of which a request has at most one: of two, this gate and the next server might each take another."""
CLOSE: Final = ((b"connection", b"close"),)
"""The answer's header that ends the connection."""
_SECRET: Final = re.compile(rb"[!-+\--~]{1,8192}")
"""Visible ASCII without a comma."""
_CACHES: Final = ("kv_transfer_params", "ec_transfer_params")
NO_BODY: Final[Mapping[str, object]] = {}


class Refusal(Exception):
    """A request that does not pass: its HTTP status, a fixed word for the event, a sentence for the client."""

    def __init__(
        self, status: int, reason: str, sentence: str, headers: tuple[tuple[bytes, bytes], ...] = (), *, code: str = ""
    ) -> None:
        """`code`: what the client is told instead of the reason."""
        super().__init__(sentence)
        self.status, self.reason, self.sentence, self.headers = status, reason, sentence, headers
        self.code = code or reason

    def body(self) -> bytes:
        """The answer, in the shape of OpenAI's errors."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )
        kind = "server_error" if self.status >= 500 else kind
        error = {"message": self.sentence, "type": kind, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()


def path_of(scope: Mapping[str, Any]) -> str:
    """The path as the client spelled it; empty, so in no table, where it is encoded or not the one the app sees."""
    path, raw = str(scope["path"]), scope.get("raw_path")
    if raw is not None and raw.partition(b"?")[0] != path.encode("utf-8", "surrogatepass"):
        return ""
    return path


def stranger(scope: Mapping[str, Any], auditor: Auditor) -> Caller:
    """A caller of whom only the address is known."""
    return auditor.caller(auditor.gate.tenant, address=_address(scope))


def _address(scope: Mapping[str, Any]) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def caller_of(
    scope: Mapping[str, Any], auditor: Auditor, at_hand: Exchange, body: Mapping[str, object] = NO_BODY
) -> Caller:
    """Who asks, by the one API key, token or trusted proxy; `at_hand.principal` is set, so doors are asked once.

    Raises `Refusal`: 401 for who is not known, 400 where headers are doubled or have two meanings. A key with
    `on_behalf` names the user it speaks for by the header `x-user-id` or the body's `user`; with any other key it is
    the key's own user, whatever the request says. The session is that of token or proxy, else `x-session-id` or the
    body's `session_id`.
    """
    headers = _headers(scope, auditor.identity.headers)
    principal = at_hand.principal
    if principal is None:
        try:
            principal = auditor.identity.principal(headers, _secret(headers), scope)
        except NotKnown as refused:
            if refused.principal is not None:
                at_hand.caller = _caller(scope, auditor, refused.principal, refused.principal.user, "")
            raise _not_known(refused.reason) from None
        at_hand.principal = principal
    user = principal.user
    if principal.on_behalf:
        user = _header_text(headers, b"x-user-id") or _string(body, "user") or user
    session = principal.session or _header_text(headers, b"x-session-id") or _string(body, "session_id")
    return _caller(scope, auditor, principal, user, session)


def _caller(scope: Mapping[str, Any], auditor: Auditor, principal: Principal, user: str, session: str) -> Caller:
    return auditor.caller(
        principal.tenant,
        key_id=principal.key_id,
        user=user,
        session=session,
        address=principal.address or _address(scope),
    )


def _not_known(reason: str) -> Refusal:
    """The same answer for all: who tries keys learns nothing of them. What it was is in the event."""
    said = "A valid API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
    return Refusal(401, reason, said, ((b"www-authenticate", b"Bearer"),), code="invalid_api_key")


def admit(auditor: Auditor, at_hand: Exchange) -> None:
    """Count the request against the limits of its key. Raises `Refusal`: 429, or 503 where no more keys are counted."""
    if at_hand.principal is None:
        return
    try:
        at_hand.lease = auditor.identity.admit(at_hand.principal)
    except LimitReached as reached:
        status = 503 if reached.reason == "limits_full" else 429
        after = (b"retry-after", str(reached.retry_after_s).encode())
        raise Refusal(status, reached.reason, reached.sentence, (after,)) from None


def _header_text(headers: Mapping[bytes, bytes], name: bytes) -> str:
    """A name as the body would spell it too."""
    return headers.get(name, b"").decode("utf-8", "surrogateescape")


def _headers(scope: Mapping[str, Any], more: frozenset[bytes]) -> dict[bytes, bytes]:
    """The headers of interest. Raises `Refusal` where one comes twice."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in _SINGLE or name in more:
            if name in found:
                raise Refusal(400, "doubled_header", "A header that may come once came twice.")
            found[name] = value
        elif name == b"transfer-encoding":
            found[name] = value
    if b"transfer-encoding" in found and b"content-length" in found:
        # RFC 9112, 6.1: whoever stands before us may have taken the other one, so the connection ends here.
        raise Refusal(400, "two_lengths", "The request says its length in two ways.", CLOSE)
    return found


def _secret(headers: Mapping[bytes, bytes]) -> bytes:
    """The API key or token as it was sent; empty for none. Raises `Refusal` where it can be read in two ways.

    One space after `Bearer`, then visible ASCII without a comma: two headers that a proxy joined are not one key.
    """
    # Blanks round a field's value are not part of it (RFC 9110, 5.5), but not every server takes them off.
    scheme, _, bearer = headers.get(b"authorization", b"").strip(b" \t").partition(b" ")
    bearer = bearer if scheme.lower() == b"bearer" else b""
    other = headers.get(b"x-api-key", b"").strip(b" \t")
    if (bearer and not _SECRET.fullmatch(bearer)) or (other and not _SECRET.fullmatch(other)):
        raise Refusal(400, "malformed_key", "The API key has characters that no key has.")
    if bearer and other and not hmac.compare_digest(bearer, other):
        raise Refusal(401, "two_keys", "Two different API keys were sent.")
    return bearer or other


def _string(body: Mapping[str, object], name: str) -> str:
    value = body.get(name)
    return value if isinstance(value, str) else ""


async def read_body(
    scope: Mapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    bytes_max: int,
    count: Callable[[int], None],
) -> bytes:
    """The whole body; `count` is told the size of each piece. Raises `Refusal`: too large, or the client has gone."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > bytes_max):
        raise _too_large(bytes_max)
    body = bytearray()  # a piece of one byte takes 40 as an object of its own
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(499, "client_gone", "The client has gone.")
        piece = message.get("body", b"")
        if len(body) + len(piece) > bytes_max:
            raise _too_large(bytes_max)
        count(len(piece))
        body += piece
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(bytes_max: int) -> Refusal:
    return Refusal(413, "body_too_large", f"The request's body is larger than the {bytes_max} bytes allowed here.")


class _Doubled(ValueError):
    """An object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Doubled
    return found


_decoder: Final = json.JSONDecoder(object_pairs_hook=_unique)


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body: UTF-8, no key twice, nothing after it. Raises `Refusal`."""
    try:
        body = _decoder.decode(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise Refusal(400, "not_utf8", "The request's body is not valid UTF-8.") from None
    except _Doubled:
        raise Refusal(400, "doubled_key", "The request's body has a JSON object with the same key twice.") from None
    except (ValueError, RecursionError):
        raise Refusal(400, "bad_json", "The request's body is not valid JSON.") from None
    if not isinstance(body, dict):
        raise Refusal(400, "not_an_object", "The request's body must be a JSON object.")
    return body


def check_fields(body: Mapping[str, object], *, kv_transfer: bool) -> None:
    """Raises `Refusal` for a body that asks for more than its own prompt: an answer that a refused road would fetch,
    another's earlier conversation, or, unless `kv_transfer`, what another engine has cached of any prompt.
    """
    if body.get("background"):
        raise Refusal(400, "background", "Background responses are not served here: send the request without it.")
    if body.get("previous_response_id") or body.get("conversation"):
        raise Refusal(400, "stateful", "Earlier responses are not kept here: send the whole conversation.")
    if not kv_transfer and _names_caches(body, 4):
        raise Refusal(400, "kv_transfer", "Caches of other engines are not open to clients here.")


def _names_caches(value: Mapping[str, object], depth: int) -> bool:
    """Whether an object, or one within it, names caches of other engines."""
    if any(value.get(name) for name in _CACHES):
        return True
    return depth > 0 and any(_names_caches(entry, depth - 1) for entry in value.values() if isinstance(entry, dict))
