"""The page of one finding: why it was raised, what to do, where to look, and how it grew."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from dashboards.cells import brief, entity, entity_query, offset_range, severity, state
from dashboards.events_page import events_table
from dashboards.gauge import chance, gauge
from dashboards.markup import Markup, element, shown
from dashboards.panel import Row
from dashboards.panels import PLOTS
from dashboards.scope import Scope, moment_ms
from dashboards.units import ago, clock, duration, exact, short
from dashboards.window import Window, between
from detectors.finding import Finding
from sinks.formats.text import handling

MARGIN_MS: Final = 900_000
WINDOW_MS_MAX: Final = 7 * 86_400_000
RANGES_SHOWN: Final = 20
PLOT_OF: Final = {"probing": "guards", "token_length": "completion_length"}
"""The plot beside a finding, where it is not the first that marks the detector's findings."""


@dataclass(frozen=True)
class Seen:
    """What the page knows of a finding: its newest revision, all revisions (newest first), and events of its entity."""

    finding: Finding
    revisions: Sequence[Row]
    events: Sequence[Row] | str
    """Rows, or the sentence that says why there are none."""
    plot: Markup


def window_around(finding: Finding) -> Window:
    """The episode with a quarter of an hour before and after; of a long one, its last week."""
    last_ms = finding.last_seen_us // 1000 + MARGIN_MS
    return between(max(finding.first_seen_us // 1000 - MARGIN_MS, last_ms - WINDOW_MS_MAX, 0), last_ms)


def plot_of(finding: Finding) -> str:
    """The name of the panel that shows what the finding is about."""
    if finding.detector in PLOT_OF:
        return PLOT_OF[finding.detector]
    return next((panel.name for panel in PLOTS[1:] if finding.detector in panel.detectors), PLOTS[0].name)


def article(seen: Seen, scope: Scope) -> Markup:
    """The whole page's main part; also the content of the drawer."""
    finding = seen.finding
    return element(
        "article",
        {"class": "finding"},
        _head(finding, scope),
        element("section", {"class": "why"}, element("h2", None, "Why"), _why(finding)),
        _runbook(finding),
        element("section", {"class": "context"}, seen.plot),
        _evidence(finding, seen, scope),
        element("section", None, element("h2", None, "How it grew"), revisions(seen.revisions, finding)),
        _facts(finding),
    )


def _head(finding: Finding, scope: Scope) -> Markup:
    first, last = finding.first_seen_us / 1000, finding.last_seen_us / 1000
    lasted = duration(max(0.0, last - first) / 1000)
    when = f"{clock(first)} to {clock(last)[11:] if clock(first)[:10] == clock(last)[:10] else clock(last)} UTC"
    who = entity(finding.entity.kind, finding.entity.id, finding.model, scope)
    return element(
        "header",
        None,
        element("p", {"class": "line"}, severity(finding.severity), " ", state(finding.state), " ", finding.detector),
        element("h1", None, shown(finding.summary, 400) or "No summary"),
        element("p", {"class": "line"}, who, f" · {when} ({lasted}; last seen {ago(last, scope.now_ms)})"),
        element("p", {"class": "cold"}, shown(finding.cold_start)) if finding.cold_start else None,
        element("p", {"class": "line"}, shown(said, 600)) if (said := handling(finding)) else None,
    )


def _why(finding: Finding) -> list[Markup]:
    statistic = finding.statistic
    counts = (
        element("div", None, element("dt", None, shown(name, 60).replace("_", " ")), element("dd", None, exact(count)))
        for name, count in list(finding.counts.items())[:24]
    )
    odds = chance(statistic.improbability)
    return [
        element("p", {"class": "measured"}, shown(statistic.name, 120)),
        gauge(statistic),
        element("p", {"class": "note"}, odds) if odds else Markup(""),
        element("dl", {"class": "counts"}, counts),
    ]


def _runbook(finding: Finding) -> Markup:
    steps = [element("li", None, shown(step, 400)) for step in finding.runbook[:10]]
    body = element("ol", None, steps) if steps else element("p", {"class": "note"}, "This detector gives no runbook.")
    return element("section", {"class": "runbook"}, element("h2", None, "What to check first"), body)


def _evidence(finding: Finding, seen: Seen, scope: Scope) -> Markup:
    evidence = finding.evidence
    ranges = [offset_range((part.topic, part.partition, part.first, part.last)) for part in evidence.offsets]
    where = entity_query(finding.entity.kind, finding.entity.id, finding.model)
    around = Scope(window_around(finding), finding.tenant, scope.now_ms)
    replay = element(
        "div",
        {"class": "command"},
        element("code", {"id": "replay"}, shown(evidence.replay, 1_000)),
        element("button", {"type": "button", "data-copy": "replay", "hidden": True}, "Copy"),
    )
    listed: Markup = (
        element("p", {"class": "sentence"}, seen.events)
        if isinstance(seen.events, str)
        else events_table(seen.events, around)
    )
    return element(
        "section",
        {"class": "evidence"},
        element("h2", None, "Evidence"),
        element("h3", None, "Kafka offsets"),
        element("ul", {"class": "offsets"}, (element("li", None, text) for text in ranges[:RANGES_SHOWN])),
        element("p", {"class": "note"}, f"{len(ranges) - RANGES_SHOWN} more ranges")
        if len(ranges) > RANGES_SHOWN
        else None,
        element("h3", None, "Read these events again") if evidence.replay else None,
        replay if evidence.replay else None,
        element("h3", None, "Sample events"),
        listed,
        element(
            "p", {"class": "note"}, element("a", {"href": around.link("/events", **where)}, "All events of this entity")
        )
        if where
        else None,
    )


def revisions(rows: Sequence[Row], finding: Finding) -> Markup:
    """The revisions as a strip over time, and as a list, newest first."""
    if not rows:
        return element("p", {"class": "note"}, "No earlier revisions.")
    first = min(finding.first_seen_us / 1000, *(moment_ms(row["updated"]) for row in rows))
    last = max(finding.last_seen_us / 1000, *(moment_ms(row["updated"]) for row in rows))
    width = max(1.0, last - first)
    dots = (
        element(
            "circle",
            {"class": "closed" if row["state"] == "close" else "told", "cy": 10, "r": 4}
            | {"cx": f"{2 + 96 * (moment_ms(row['updated']) - first) / width:.2f}%"},
        )
        for row in rows
    )
    strip = element(
        "svg",
        {"class": "strip", "width": "100%", "height": 20, "aria-hidden": "true"},
        element("line", {"x1": "2%", "x2": "98%", "y1": 10, "y2": 10}),
        dots,
    )
    items = (
        element(
            "li",
            None,
            element("time", None, clock(moment_ms(row["updated"]))),
            f" revision {row['revision']}: {_word(row['state'])}, ",
            severity(row["severity"]),
            f" at {short(float(str(row['observed'])))}",
        )
        for row in rows
    )
    return element("div", None, strip, element("ol", {"class": "revisions"}, items))


def _word(value: object) -> str:
    return {"open": "opened", "update": "updated", "close": "closed"}.get(str(value), "told")


def _facts(finding: Finding) -> Markup:
    updated = datetime.fromtimestamp(finding.updated_us / 1e6, UTC).isoformat(timespec="milliseconds")
    facts = {
        "confidence": finding.confidence,
        "tenant": finding.tenant,
        "model": finding.model,
        "MITRE ATLAS": ", ".join(finding.atlas),
        "OWASP LLM": ", ".join(finding.owasp),
        "detector": f"{finding.detector} {finding.detector_version}",
        "configuration": finding.config_digest,
        "finding": finding.uid,
        "incident": f"{finding.incident}{', led by this' if finding.leads else ''}" if finding.incident else "",
        "flapping": f"opened {finding.flapping} times of late, so it is held open" if finding.flapping else "",
        "planned change before it": finding.change,
        "updated": updated,
        "entity": f"{finding.entity.kind} {brief(finding.entity.id)}",
    }
    pairs = (
        element("div", None, element("dt", None, name), element("dd", None, shown(value, 200)))
        for name, value in facts.items()
        if value
    )
    return element(
        "section", {"class": "facts"}, element("h2", None, "Facts"), element("dl", {"class": "counts"}, pairs)
    )
