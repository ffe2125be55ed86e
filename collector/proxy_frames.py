"""Cuts a stream into its frames as they come: server-sent events, or lines of NDJSON. Pure.

A frame is handed on as the very bytes that came, once it is whole, with what it says beside it. SSE as in the WHATWG
HTML standard, section 9.2, of which inference servers use `event`, `data` and comments; lines end with LF or CRLF. What
a client would read there and this does not, behind a CR alone or a byte order mark, is garbled.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import orjson

_ORDER_MARK: Final = b"\xef\xbb\xbf"


class Garbled(ValueError):
    """A frame is not what its type promises. The message never quotes it."""


class Frame(NamedTuple):
    """One whole frame."""

    raw: bytes
    said: dict[str, Any] | None
    """None for a comment, an empty event and the end."""
    last: bool = False
    """OpenAI's `[DONE]`."""


class Frames:
    """Give it pieces of a body; it gives frames. Holds at most one incomplete frame."""

    def __init__(self, content_type: str) -> None:
        self._events = content_type == "text/event-stream"
        self._rest = b""
        self._event: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """The frames that are whole now. Raises Garbled."""
        *lines, rest = piece.split(b"\n")
        if lines:
            lines[0] = self._rest + lines[0]
            self._rest = rest
        else:
            self._rest += rest
        for line in lines:
            yield from self._line(line + b"\n")

    def end(self) -> Iterator[Frame]:
        """What is left once the body has ended. Raises Garbled: half a frame."""
        rest, self._rest = self._rest, b""
        if rest.strip():
            yield from self._line(rest + b"\n")
        if self._event:
            yield from self._line(b"\n")

    def _line(self, line: bytes) -> Iterator[Frame]:
        if not self._events:
            if line.strip():
                yield Frame(line, _object(line))
            return
        if b"\r" in line[:-2] or line.startswith(_ORDER_MARK):
            raise Garbled("a line does not end or begin as it must")
        self._event.append(line)
        if line.strip(b"\r\n"):
            return
        event, self._event = self._event, []
        data = b"\n".join(entry[5:].strip() for entry in event if entry.startswith(b"data:"))
        raw = b"".join(event)
        if not data:
            yield Frame(raw, None)
        elif data == b"[DONE]":
            yield Frame(raw, None, last=True)
        else:
            yield Frame(raw, _object(data))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        said = orjson.loads(raw)
    except ValueError:
        raise Garbled("a frame is not JSON") from None
    if not isinstance(said, dict):
        raise Garbled("a frame is not a JSON object")
    return said
