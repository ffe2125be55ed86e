"""A panel and its answer as HTML. Pure: rows in, markup out."""

from collections.abc import Mapping, Sequence
from typing import Final

from dashboards.cells import number_of, table
from dashboards.markup import Markup, element, shown
from dashboards.panel import Panel, Row
from dashboards.plot import Limit, Line, Mark, draw
from dashboards.scope import Scope, moment_ms
from dashboards.units import duration, exact, short
from dashboards.window import Window

TONES: Final = tuple(f"c{number}" for number in range(1, 9))
OTHERS: Final = "others"


def framed(panel: Panel, body: Markup, scope: Scope, *, trouble: bool = False) -> Markup:
    """The panel with its head; `body` is the drawn answer, or the sentence that says why there is none."""
    kind = "stat" if panel.kind == "stat" else "framed"
    head = element(
        "header",
        None,
        element("h2", None, element("a", {"href": scope.link(f"/panel/{panel.name}")}, panel.title)),
        element("p", {"class": "answers", "title": panel.answers}, panel.answers) if panel.kind != "stat" else None,
    )
    classes = f"panel {kind} {panel.name} w{panel.width}" + (" trouble" if trouble else "")
    attributes = {"class": classes, "id": f"panel-{panel.name}", "data-panel": panel.name, "title": None}
    if panel.kind == "stat":
        attributes["title"] = panel.answers
    return element("section", attributes, head, element("div", {"class": "body"}, body))


def sentence(text: str, tone: str = "empty") -> Markup:
    """What a panel says instead of a drawing."""
    return element("p", {"class": f"sentence {tone}", "role": "status"}, text)


def timeseries(
    panel: Panel,
    rows: Sequence[Row],
    scope: Scope,
    *,
    series_max: int,
    watch_from: float | None = None,
    marks: Sequence[Mark] = (),
) -> Markup:
    """The plot with its legend; the legend's figures are the newest, or those under the cursor."""
    if not rows:
        return sentence(panel.empty)
    lines, left_out = lines_of(panel, rows, scope.window, series_max)
    limits = [] if watch_from is None else [Limit(watch_from, f"watch from {short(watch_from, panel.unit)}")]
    plot = draw(
        scope.window,
        lines,
        title=panel.title,
        unit=panel.unit,
        stacked=panel.stacked,
        limits=limits,
        marks=[mark for mark in marks if not panel.detectors or mark.detector in panel.detectors],
        link=scope.finding,
    )
    note = element("p", {"class": "note"}, f"{left_out} more not drawn") if left_out else None
    return element("div", {"class": "figure"}, _legend(lines, panel.unit), plot, note)


def _legend(lines: Sequence[Line], unit: str) -> Markup:
    buckets = range(len(lines[0].values) if lines else 0)
    newest = max((bucket for bucket in buckets if any(line.values[bucket] is not None for line in lines)), default=None)
    items = (
        element(
            "li",
            None,
            element("i", {"class": f"swatch {line.tone}"}),
            element("span", {"class": "name"}, shown(line.label, 60)),
            element("output", None, short(None if newest is None else line.values[newest], unit)),
        )
        for line in lines
    )
    return element("ul", {"class": "legend"}, items)


def lines_of(panel: Panel, rows: Sequence[Row], window: Window, series_max: int) -> tuple[list[Line], int]:
    """The series of an answer, and how many were left out. Stacked, the rest is added up as `others` instead."""
    if not panel.by:
        lines = [
            Line(series.label, series.tone or TONES[index % 8], _column(rows, series.column, window))
            for index, series in enumerate(panel.series)
        ]
        return lines, 0
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["series"]), []).append(row)
    values = {name: _column(part, "value", window) for name, part in found.items()}
    if panel.stacked:
        # What is stacked is counted: beside others that were, a missing count is none.
        told = [any(column) for column in zip(*values.values(), strict=True)]
        values = {
            name: tuple(0.0 if value is None and known else value for value, known in zip(part, told, strict=True))
            for name, part in values.items()
        }
    kept, rest = _chosen(panel.tones, values, series_max)
    lines = [Line(name, panel.tones.get(name, TONES[index % 8]), values[name]) for index, name in enumerate(kept)]
    if rest and panel.stacked:
        columns = zip(*(values[name] for name in rest), strict=True)
        summed = tuple(sum(value or 0.0 for value in column) for column in columns)
        return [*lines, Line(OTHERS, "grey", summed)], 0
    return lines, len(rest)


def _chosen(
    known: Mapping[str, str], values: Mapping[str, Sequence[float | None]], series_max: int
) -> tuple[list[str], list[str]]:
    """The names to draw and the rest. Known names first, in their order; then the largest, in order of name, so that
    a series keeps its colour from one refresh to the next."""
    named = [name for name in known if name in values]
    others = sorted(
        (name for name in values if name not in known),
        key=lambda name: (-sum(value or 0.0 for value in values[name]), name),
    )
    room = max(0, series_max - len(named))
    return [*named, *sorted(others[:room])], others[room:]


def _column(rows: Sequence[Row], column: str, window: Window) -> tuple[float | None, ...]:
    """A value for each bucket; a bucket without a row is a gap."""
    values: list[float | None] = [None] * window.buckets
    for row in rows:
        bucket = window.bucket(moment_ms(row["time"]))
        if 0 <= bucket < len(values):
            values[bucket] = number_of(row.get(column))
    return tuple(values)


def stat(panel: Panel, rows: Sequence[Row], before: Sequence[Row], scope: Scope, watch_from: float | None) -> Markup:
    """One large figure, its parts, and what it was in the stretch of the same length before."""
    row = rows[0] if rows else {}
    value = number_of(row.get("value"))
    watch = watch_from is not None and value is not None and value >= watch_from
    parts = [(series.label, number_of(row.get(series.column)) or 0.0) for series in panel.series]
    said = " · ".join(f"{short(part)} {label}" for label, part in parts if part)
    if panel.compared:
        earlier = number_of(before[0].get("value")) if before else None
        length = duration((scope.window.to_ms - scope.window.from_ms) / 1000)
        said = f"{'nothing' if earlier is None else short(earlier, panel.unit)} in the {length} before"
    figure = element("strong", {"class": "figure", "title": exact(value, panel.unit)}, short(value, panel.unit))
    return element("div", {"class": "watch" if watch else None}, figure, element("span", {"class": "parts"}, said))


def listing(panel: Panel, rows: Sequence[Row], scope: Scope, *, rows_max: int) -> Markup:
    """A table of at most `rows_max` rows, with a way to the rest."""
    if not rows:
        return sentence(panel.empty)
    more = len(rows) - rows_max
    link = element("a", {"href": scope.link(f"/panel/{panel.name}")}, f"{more} more")
    return element(
        "div",
        None,
        table(panel.columns, rows[:rows_max], scope, panel.title),
        element("p", {"class": "note"}, link) if more > 0 else None,
    )


def status(panel: Panel, rows: Sequence[Row]) -> Markup:
    """Words and what they come to."""
    if not rows:
        return sentence(panel.empty)
    pairs = (
        element(
            "div",
            {"class": str(row["tone"]) if row.get("tone") in ("watch", "bad") else None},
            element("dt", None, shown(row.get("label", ""), 120)),
            element("dd", None, _written(row.get("value"))),
        )
        for row in rows
    )
    return element("dl", {"class": "account"}, pairs)


def _written(value: object) -> str:
    text = shown(value, 60)
    return exact(float(text)) if text.isascii() and text.isdigit() else text
