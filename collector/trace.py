"""The W3C trace context of a request: the id under which spans, metrics and the audit event of one request meet.

Format: W3C Trace Context, `traceparent` (version-traceid-parentid-flags). Whatever is not exactly that is ignored, as
the standard asks; so nothing but 32 hex digits that a client chose can get from this header into an event.
"""

import re
from collections.abc import Iterable
from typing import Final

_TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?", re.DOTALL)
_HEADER: Final = b"traceparent"
_BYTES_MAX: Final = 512


def traceparent(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The one well-formed `traceparent` among the headers; empty for none, for two, and for a malformed one."""
    found = [value for name, value in headers if name.lower() == _HEADER]
    if len(found) != 1 or len(found[0]) > _BYTES_MAX:
        return b""
    match = _TRACEPARENT.fullmatch(found[0])
    if match is None:
        return b""
    version, trace, parent, more = match.groups()
    if version == b"ff" or (version == b"00" and more) or not trace.strip(b"0") or not parent.strip(b"0"):
        return b""
    return found[0]


def trace_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The trace id, 32 hex digits; empty where there is none."""
    return traceparent(headers)[3:35].decode("ascii")
