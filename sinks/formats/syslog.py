"""Syslog messages (RFC 5424) and their frames on a stream (octet counting, RFC 6587 and RFC 5425). Pure.

MSG carries no byte order mark: receivers of CEF look for `CEF:` at its start, and RFC 5424 allows any octets there.
"""

import re
from collections.abc import Mapping
from typing import Final

from collector.event import from_timestamp_us
from sinks.formats.text import clean

Fields = Mapping[str, str]
NIL: Final = "-"
_UNPRINTABLE: Final = re.compile(r"[^\x21-\x7e]")
_NOT_IN_NAME: Final = re.compile(r'[^\x21-\x7e]|[=\]"]')


def message(
    body: bytes,
    *,
    facility: int,
    severity: int,
    timestamp_us: int,
    host: str,
    app: str,
    process_id: str,
    message_id: str,
    data: Mapping[str, Fields] | None = None,
) -> bytes:
    """One message. Header fields are cut to the RFC's lengths, characters that it forbids there become `_`.

    `data`: structured data, SD-ID -> name -> value.
    """
    when = from_timestamp_us(timestamp_us).isoformat(timespec="microseconds").replace("+00:00", "Z")
    header = " ".join(
        (
            f"<{facility * 8 + severity}>1",
            when,
            _field(host, 255),
            _field(app, 48),
            _field(process_id, 128),
            _field(message_id, 32),
            structured_data(data or {}),
        )
    )
    return header.encode() + b" " + body


def structured_data(data: Mapping[str, Fields]) -> str:
    """`[id name="value" …]…`, or `-` for none."""
    elements = (
        "[" + " ".join((_name(sd_id), *(f'{_name(name)}="{escape(value)}"' for name, value in fields.items()))) + "]"
        for sd_id, fields in data.items()
    )
    return "".join(elements) or NIL


def escape(value: str) -> str:
    """A value of structured data: `\\`, `"` and `]` escaped, nothing else (RFC 5424, 6.3.3)."""
    return clean(value).replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")


def frame(raw: bytes) -> bytes:
    """The message with its length in octets before it."""
    return b"%d %b" % (len(raw), raw)


def _field(value: str, limit: int) -> str:
    return _UNPRINTABLE.sub("_", value)[:limit] or NIL


def _name(value: str) -> str:
    return _NOT_IN_NAME.sub("_", value)[:32] or "_"
