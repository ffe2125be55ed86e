"""A finding in Common Event Format, version 0 (ArcSight CEF Implementation Standard). Pure.

The header escapes `\\` and `|`, and has no line end at all; the extension escapes `\\`, `=` and line ends, and leaves
the pipe alone. What has no CEF key of its own goes into custom strings (cs), numbers (cn) and floats (cfp).
"""

import re
from collections.abc import Mapping
from typing import Final

from detectors.finding import Finding
from sinks.formats.text import cut, fit, handling

_SEVERITY: Final = {"info": 1, "low": 3, "medium": 5, "high": 8, "critical": 10}
_LIMITS: Final = {
    "name": 512,
    "msg": 1023,
    "suser": 1023,
    "externalId": 40,
    "cat": 1023,
    "act": 63,
    "reason": 1023,
    "flexString1": 1023,
}
"""Characters that the standard gives a key; custom strings have 4000."""
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LINE_END: Final = re.compile(r"[\r\n\t\x85\u2028\u2029]+")


def escape_header(value: str) -> str:
    """A header field: `\\` and `|` escaped, line ends and control characters made spaces."""
    flat = _CONTROL.sub(" ", _LINE_END.sub(" ", value))
    return flat.replace("\\", "\\\\").replace("|", "\\|")


def escape_extension(value: str) -> str:
    """An extension's value: `\\`, `=`, line feed and carriage return escaped; other control characters are spaces."""
    escaped = _CONTROL.sub(" ", value).replace("\\", "\\\\").replace("=", "\\=")
    return escaped.replace("\n", "\\n").replace("\r", "\\r")


def encode(finding: Finding, *, product_version: str, bytes_max: int) -> bytes:
    """One CEF message in UTF-8, without a line end; long values are cut so that it fits `bytes_max`.

    Raises `ValueError` when it can't be made to fit (2,048 bytes always do).
    """
    return fit(lambda limit: _message(finding, product_version, limit), bytes_max)


def _message(finding: Finding, product_version: str, limit: int) -> bytes:
    name = f"{finding.detector} {finding.state}: {finding.entity.kind}"
    header = (
        "CEF:0",
        "inferwatch",
        "inferwatch",
        escape_header(cut(product_version, min(limit, 31))),
        escape_header(cut(finding.detector, min(limit, 128))),
        escape_header(cut(name, min(limit, _LIMITS["name"]))),
        str(_SEVERITY[finding.severity]),
    )
    pairs = (f"{key}={escape_extension(_fitted(key, value, limit))}" for key, value in _extension(finding).items())
    return "|".join((*header, " ".join(pairs))).encode()


def _fitted(key: str, value: str, limit: int) -> str:
    if key.endswith("Label"):
        return value
    own = _LIMITS.get(key, 4000)
    return cut(value, own if key == "externalId" else min(limit, own))


def _extension(finding: Finding) -> Mapping[str, str]:
    """Keys in the order in which they are written; empty values are left out."""
    kind, entity = finding.entity.kind, finding.entity.id
    user = entity.partition("/")[0] if kind in ("user", "session") else ""
    statistic = finding.statistic
    pairs = {
        "rt": str(finding.updated_us // 1000),
        "start": str(finding.first_seen_us // 1000),
        "end": str(finding.last_seen_us // 1000),
        "externalId": finding.uid,
        "act": finding.state,
        "cat": finding.detector,
        "cnt": str(finding.counts["events"]) if "events" in finding.counts else "",
        "suser": user,
        "msg": finding.summary,
        "cn1": str(finding.revision),
        "cn1Label": "revision",
        "cfp1": f"{statistic.observed:.6g}",
        "cfp1Label": "observed",
        "cfp2": f"{statistic.baseline:.6g}",
        "cfp2Label": "baseline",
        "cfp3": f"{statistic.threshold:.6g}",
        "cfp3Label": "threshold",
        "cs1": f"{kind} {entity}",
        "cs1Label": "entity",
        "cs2": finding.tenant,
        "cs2Label": "tenant",
        "cs3": finding.model,
        "cs3Label": "model",
        "cs4": f"{statistic.name} {statistic.unit}".strip(),
        "cs4Label": "statistic",
        "cs5": " ".join((*finding.atlas, *finding.owasp)),
        "cs5Label": "techniques",
        "cs6": finding.evidence.replay,
        "cs6Label": "replay",
        "reason": handling(finding),
        "flexString1": finding.incident,
        "flexString1Label": "incident",
    }
    kept = {key for key, value in pairs.items() if value and not key.endswith("Label")}
    return {key: value for key, value in pairs.items() if key in kept or key.removesuffix("Label") in kept}
