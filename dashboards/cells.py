"""The cells of tables: how a severity, a moment, an entity, a state or a piece of evidence is written."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from dashboards.markup import Markup, element, joined, shown
from dashboards.panel import Column, Row, Shown
from dashboards.scope import Scope, moment_ms
from dashboards.units import MISSING, ago, clock, duration, exact

SEVERITIES: Final = ("critical", "high", "medium", "low", "info")
PROCESS_TONES: Final = {"running": "good", "stopped": "quiet", "silent": "bad", "not ready": "watch"}
_PSEUDONYM: Final = re.compile(r"^[uska]_[0-9a-f]{12,}$")
_NUMERIC: Final = frozenset({"number", "span"})
SUMMARY_CHARACTERS_MAX: Final = 160
BRIEF_CHARACTERS_MAX: Final = 34


def number_of(value: object) -> float | None:
    """A number of the store, or None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def table(columns: Sequence[Column], rows: Sequence[Row], scope: Scope, caption: str) -> Markup:
    """A table of `rows`; rows of closed findings and stopped processes are quiet."""
    heads = (element("th", {"scope": "col", "class": " ".join(_classes(column))}, column.label) for column in columns)
    body = (
        element(
            "tr",
            {"class": "quiet" if row.get("state") in ("close", "stopped") else None},
            (cell(column, row, scope) for column in columns),
        )
        for row in rows
    )
    return element(
        "div",
        {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": caption},
        element(
            "table",
            {"class": "rows"},
            element("caption", {"class": "unseen"}, caption),
            element("thead", None, element("tr", None, heads)),
            element("tbody", None, body),
        ),
    )


def cell(column: Column, row: Row, scope: Scope) -> Markup:
    """One `td`."""
    value = row.get(column.column)
    number = number_of(value)
    watch = column.watch_from is not None and number is not None and number >= column.watch_from
    written = _WRITERS[column.shown](column, value, row, scope)
    return element("td", {"class": " ".join(_classes(column) + ["watch"] * watch)}, written)


def _classes(column: Column) -> list[str]:
    return ["number" if column.shown in _NUMERIC else f"as-{column.shown}", f"col-{column.column}"]


def severity(value: object) -> Markup:
    """The word in its colour; a severity not known here is written plainly."""
    name = str(value) if value in SEVERITIES else "info"
    return element("span", {"class": f"chip {name}"}, shown(value, 20))


def state(value: object) -> Markup:
    """`open` until the finding is closed."""
    closed = value == "close"
    return element("span", {"class": f"state {'quiet' if closed else 'live'}"}, "closed" if closed else "open")


def moment(value: object, scope: Scope) -> Markup | str:
    """How long ago, with the moment itself in the title."""
    if not isinstance(value, datetime):
        return MISSING
    at_ms = moment_ms(value)
    written = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    attributes = {"datetime": written, "title": f"{clock(at_ms)} UTC"}
    return element("time", attributes, ago(at_ms, scope.now_ms))


def brief(identifier: object) -> str:
    """A pseudonym cut to what tells it apart at a glance; `u_…/s_…` part by part; anything else as it is."""
    parts = str(identifier)[:600].split("/")
    return shown("/".join(part[:8] + "…" if _PSEUDONYM.match(part) else part for part in parts), BRIEF_CHARACTERS_MAX)


def entity(kind: object, identifier: object, model: object, scope: Scope) -> Markup:
    """The entity, with a link to its events where there are some."""
    label = joined([element("span", {"class": "kind"}, shown(kind, 20)), " ", brief(identifier)])
    more = entity_query(str(kind), str(identifier), str(model or ""))
    title = shown(identifier, 600)
    if not more:
        return element("span", {"title": title}, label)
    return element("a", {"href": scope.link("/events", **more), "title": title}, label)


def entity_query(kind: str, identifier: str, model: str) -> dict[str, str]:
    """The query of the events page that lists this entity's events; empty where the store can't tell."""
    match kind:
        case "session":
            user, _, session = identifier.partition("/")
            return {"user": user, "session": session}
        case "user" | "api_key" | "address":
            return {kind: identifier}
        case "model":
            return {"model": model} if model else {}
        case _:
            return {}


def evidence(value: object) -> Markup | str:
    """`iw.events/2 1204–1266`, and how many ranges more. Ranges are tuples or mappings, as the store gives them."""
    ranges = [offset_range(part) for part in value] if isinstance(value, list | tuple) else []
    if not ranges:
        return MISSING
    more = f" +{len(ranges) - 1}" if len(ranges) > 1 else ""
    where, _, offsets = ranges[0].rpartition(" ")
    parts = (element("span", {"class": "kind"}, where), " ", offsets + more)
    return element("span", {"title": "; ".join(ranges[:20])}, parts)


def offset_range(part: object) -> str:
    """One range as `TOPIC/PARTITION FIRST–LAST`."""
    names = ("topic", "partition", "first", "last")
    values = [part.get(name) for name in names] if isinstance(part, Mapping) else list(part)  # type: ignore[call-overload]  # the store gives tuples
    topic, partition, first, last = values
    return shown(f"{topic}/{partition} {first}" + ("" if first == last else f"–{last}"), 120)


def _span(_column: Column, value: object, _row: Row, _scope: Scope) -> str:
    seconds = number_of(value)
    return MISSING if seconds is None else duration(seconds)


def _summary(_column: Column, value: object, row: Row, scope: Scope) -> Markup:
    text = shown(value, SUMMARY_CHARACTERS_MAX)
    return element("a", {"href": scope.finding(row.get("uid")), "data-finding": True}, text or "no summary")


def _process(_column: Column, value: object, row: Row, _scope: Scope) -> Markup:
    tone = PROCESS_TONES.get(str(value), "quiet")
    why = shown(row.get("why") or "", 120) if tone != "good" else ""
    state_word = element("span", {"class": f"state {tone}"}, shown(value, 40))
    return joined([state_word, element("small", {"class": "reason"}, why)]) if why else state_word


_WRITERS: Final[dict[Shown, Callable[[Column, object, Row, Scope], Markup | str]]] = {
    "text": lambda _column, value, _row, _scope: shown("" if value is None else value, 120),
    "severity": lambda _column, value, _row, _scope: severity(value),
    "time": lambda _column, value, _row, scope: moment(value, scope),
    "number": lambda column, value, _row, _scope: exact(number_of(value), column.unit),
    "span": _span,
    "state": lambda _column, value, _row, _scope: state(value),
    "summary": _summary,
    "entity": lambda _column, value, row, scope: entity(row.get("entity_kind"), value, row.get("model"), scope),
    "evidence": lambda _column, value, _row, _scope: evidence(value),
    "process": _process,
}
