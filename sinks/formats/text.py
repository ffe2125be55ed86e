"""Strings and documents that fit: valid Unicode, and cut to a size that the receiver takes. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from detectors.finding import Finding

_LIMITS: Final = (4096, 1024, 512, 256, 128, 64, 32, 16)
"""Tried in turn for the longest string and list of a document that is too large."""
CUT: Final = "…"


def clean(text: str) -> str:
    """`text` as valid Unicode: a surrogate without its partner becomes U+FFFD, for no encoder takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(text: str, limit: int) -> str:
    """`text`, clean, of at most `limit` characters, the last an ellipsis where something is missing."""
    if len(text) > limit:
        return clean(text[: limit - 1]) + CUT
    return clean(text)


def bounded(value: object, limit: int) -> object:
    """A JSON-like document whose strings are cut to `limit` characters, whose lists and objects to `limit` members."""
    if isinstance(value, str):
        return cut(value, limit)
    if isinstance(value, Mapping):
        return {cut(str(key), limit): bounded(value[key], limit) for key in list(value)[:limit]}
    if isinstance(value, Sequence):
        return [bounded(member, limit) for member in value[:limit]]
    return value


def fit(build: Callable[[int], bytes], bytes_max: int) -> bytes:
    """The first of `build(limit)`, from the most generous limit down, that has at most `bytes_max` bytes.

    Raises `ValueError` when even the strictest is too long.
    """
    for limit in _LIMITS:
        made = build(limit)
        if len(made) <= bytes_max:
            return made
    raise ValueError(f"the finding can't be cut to {bytes_max} bytes")


def handling(finding: Finding) -> str:
    """Who said what of a finding, in one sentence; empty where nobody did."""
    if finding.suppressed_by:
        what, command = "Held back", finding.suppressed_by
    elif finding.acknowledged_by:
        what = "Called false" if finding.false_positive else "Acknowledged"
        command = finding.acknowledged_by
    else:
        return ""
    return f"{what} by {finding.handled_by} ({finding.handled_why}), command {command}."
