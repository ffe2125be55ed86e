"""The body of a webhook, as Standard Webhooks shapes it: `{type, timestamp, data}`. Pure.

`data` is the finding as it is on iw.findings. The same finding always gives the same bytes: a retry has the same body.
"""

from typing import Final

import msgspec
import orjson

from collector.event import from_timestamp_us
from detectors.finding import Finding
from sinks.formats.text import bounded, fit

_TYPE: Final = {"open": "finding.opened", "update": "finding.updated", "close": "finding.closed"}


def encode(finding: Finding, *, bytes_max: int) -> bytes:
    """JSON in UTF-8; long strings and lists are cut so that it fits `bytes_max`, or `ValueError`."""
    data = msgspec.to_builtins(finding)
    when = from_timestamp_us(finding.updated_us).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    head = {"type": _TYPE[finding.state], "timestamp": when}
    return fit(lambda limit: orjson.dumps(head | {"data": bounded(data, limit)}), bytes_max)
