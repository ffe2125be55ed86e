"""Plots as SVG, drawn from the data: axes, ticks, units, gaps as gaps, thresholds, findings on the time axis.

Everything is placed in per cent of the box, so that one drawing fits every width without script: paths live in an inner
SVG that stretches (strokes do not), text and marks in the outer one, which keeps letters as they are. The numbers
behind a plot stand beside it in a table, for screen readers and for the read-out under the cursor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from dashboards.markup import Markup, element, joined, shown
from dashboards.units import axis, clock, exact, short
from dashboards.window import Window

SIDE: Final = 1000.0
"""The inner drawing is SIDE × SIDE, stretched over the box."""
HEADROOM: Final = 1.06
MARK_LANES: Final = 3
MARKS_MAX: Final = 60
BAR_FILL: Final = 0.82


@dataclass(frozen=True)
class Line:
    """One series: a value for each bucket, None where there is none. `tone` is a class of the style sheet."""

    label: str
    tone: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Mark:
    """A finding on the time axis."""

    uid: str
    detector: str
    severity: str
    text: str
    first_ms: float
    last_ms: float


@dataclass(frozen=True)
class Limit:
    """A threshold drawn across the plot."""

    value: float
    label: str


def top_of(lines: Sequence[Line], *, stacked: bool, limits: Sequence[Limit] = ()) -> float:
    """The highest value to draw. A limit counts once the data come within a quarter of it, lest it flatten them."""
    columns = zip(*(line.values for line in lines), strict=True)
    peaks = ((value or 0.0 for value in column) for column in columns)
    highest = max((sum(peak) if stacked else max(peak) for peak in peaks), default=0.0)
    near = [limit.value for limit in limits if highest * 4 >= limit.value]
    return max([highest, *near])


def draw(
    window: Window,
    lines: Sequence[Line],
    *,
    title: str,
    unit: str,
    stacked: bool = False,
    limits: Sequence[Limit] = (),
    marks: Sequence[Mark] = (),
    link: Callable[[str], str] = "/finding/{}".format,
) -> Markup:
    """The whole figure: value axis, plot, marks, time axis, and the table of its numbers."""
    steps = axis(top_of(lines, stacked=stacked, limits=limits) * HEADROOM, unit)
    top = steps[-1][0]
    in_window = [mark for mark in marks if mark.last_ms >= window.from_ms and mark.first_ms < window.to_ms]
    hours = window.ticks()
    canvas = element(
        "svg",
        {"class": "drawn", "role": "img", "aria-label": _spoken(title, lines, unit), "width": "100%", "height": "100%"},
        (_band(window, mark) for mark in in_window[:MARKS_MAX]),
        (_grid(1 - step / top) for step, _ in steps),
        (_hour(share) for share, _ in hours),
        _paths(lines, top, stacked=stacked),
        (_limit(limit, top) for limit in limits if limit.value <= top),
    )
    return element(
        "div",
        {
            "class": "plot",
            "data-plot": True,
            "tabindex": 0,
            "role": "group",
            "aria-label": f"{title}: arrow keys read the values",
        },
        element("svg", {"class": "values", "aria-hidden": "true"}, _values(steps)),
        element("div", {"class": "canvas"}, canvas, element("div", {"class": "cursor", "hidden": True})),
        _marks(window, in_window, link),
        element("svg", {"class": "hours", "aria-hidden": "true"}, (_label(share, text) for share, text in hours)),
        numbers(window, lines, title=title, unit=unit),
    )


def numbers(window: Window, lines: Sequence[Line], *, title: str, unit: str) -> Markup:
    """The table behind a plot: one row a bucket, one column a series; the page's script reads it for the read-out."""
    head = element("tr", None, element("th", {"scope": "col"}, "Time (UTC)"), _heads(lines))
    rows = (
        element(
            "tr",
            None,
            element("th", {"scope": "row"}, clock(window.start_ms(index))),
            (element("td", None, exact(line.values[index], unit)) for line in lines),
        )
        for index in range(window.buckets)
    )
    table = element(
        "table", None, element("caption", None, title), element("thead", None, head), element("tbody", None, rows)
    )
    return element("details", {"class": "numbers"}, element("summary", None, "Numbers"), table)


def _heads(lines: Sequence[Line]) -> Markup:
    return joined(element("th", {"scope": "col"}, shown(line.label, 80)) for line in lines)


def _spoken(title: str, lines: Sequence[Line], unit: str) -> str:
    """What a screen reader says instead of the picture."""
    parts = []
    for line in lines:
        known = [value for value in line.values if value is not None]
        if known:
            parts.append(f"{shown(line.label, 80)}: latest {short(known[-1], unit)}, highest {short(max(known), unit)}")
    return f"{title}. " + ("; ".join(parts) or "No data")


def _paths(lines: Sequence[Line], top: float, *, stacked: bool) -> Markup:
    inner = {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none", "width": "100%", "height": "100%"}
    if not stacked:
        # The first series is the most important one: drawn last, so that it lies on top.
        return element("svg", inner, (_line(line, top) for line in reversed(lines)))
    floors = [0.0] * (len(lines[0].values) if lines else 0)
    bars = []
    for line in lines:
        bars.append(element("path", {"class": f"bar {line.tone}", "d": _bars(line, floors, top)}))
        floors = [floor + (value or 0.0) for floor, value in zip(floors, line.values, strict=True)]
    return element("svg", inner, bars)


def _line(line: Line, top: float) -> Markup:
    return element("path", {"class": f"line {line.tone}", "d": line_path(line.values, top)})


def line_path(values: Sequence[float | None], top: float) -> str:
    """A path through the middles of the buckets, lifted where a value is missing; a lone value is a dot."""
    width = SIDE / len(values) if values else SIDE
    path: list[str] = []
    pen_down = False
    for index, value in enumerate(values):
        if value is None:
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{(index + 0.5) * width:.1f} {_y(value, top):.1f}")
        follower = values[index + 1] if index + 1 < len(values) else None
        if not pen_down and follower is None:
            path.append("h0.01")
        pen_down = True
    return "".join(path)


def _bars(line: Line, floors: Sequence[float], top: float) -> str:
    width = SIDE / max(1, len(line.values))
    return "".join(
        f"M{(index + (1 - BAR_FILL) / 2) * width:.1f} {_y(floor, top):.1f}"
        f"V{_y(floor + value, top):.1f}h{width * BAR_FILL:.1f}V{_y(floor, top):.1f}z"
        for index, (value, floor) in enumerate(zip(line.values, floors, strict=True))
        if value
    )


def _y(value: float, top: float) -> float:
    return SIDE * (1 - min(max(value / top, 0.0), 1.0))


def _grid(share: float) -> Markup:
    y = f"{100 * share:.2f}%"
    return element("line", {"class": "floor" if share >= 1 else "grid", "x1": "0", "x2": "100%", "y1": y, "y2": y})


def _hour(share: float) -> Markup:
    x = f"{100 * share:.2f}%"
    return element("line", {"class": "grid", "x1": x, "x2": x, "y1": "0", "y2": "100%"})


def _values(steps: Sequence[tuple[float, str]]) -> list[Markup]:
    top = steps[-1][0]
    return [element("text", {"x": "100%", "y": f"{100 * (1 - step / top):.2f}%"}, label) for step, label in steps]


def _label(share: float, text: str) -> Markup:
    """A label keeps inside the box: the first starts at the left edge, the last ends at the right one."""
    anchor = "start" if share < 0.04 else "end" if share > 0.96 else "middle"
    return element("text", {"x": f"{100 * share:.2f}%", "y": "50%", "text-anchor": anchor}, text)


def _limit(limit: Limit, top: float) -> Markup:
    y = f"{100 * (1 - limit.value / top):.2f}%"
    return element(
        "g",
        {"class": "limit"},
        element("line", {"x1": "0", "x2": "100%", "y1": y, "y2": y}),
        element("text", {"x": "100%", "y": y, "dx": -4, "dy": -4}, limit.label),
    )


def _band(window: Window, mark: Mark) -> Markup:
    start, end = window.share(mark.first_ms), window.share(mark.last_ms)
    return element(
        "rect",
        {
            "class": f"band {mark.severity}",
            "x": f"{100 * start:.2f}%",
            "y": "0",
            "width": f"{max(0.2, 100 * (end - start)):.2f}%",
            "height": "100%",
        },
    )


def _marks(window: Window, marks: Sequence[Mark], link: Callable[[str], str]) -> Markup:
    """The findings in up to three lanes: a dot where each began, a line to where it was last seen, a link to it."""
    ends = [-1.0] * MARK_LANES
    drawn = []
    for mark in sorted(marks, key=lambda mark: (mark.first_ms, mark.uid))[:MARKS_MAX]:
        start, end = window.share(mark.first_ms), window.share(mark.last_ms)
        lane = next((lane for lane, busy in enumerate(ends) if busy < start), MARK_LANES - 1)
        ends[lane] = max(ends[lane], end + 0.02)
        x1, x2, y = f"{100 * start:.2f}%", f"{100 * end:.2f}%", 4 + 7 * lane
        drawn.append(
            element(
                "a",
                {"href": link(mark.uid), "class": f"mark {mark.severity}", "data-finding": True},
                element("title", None, shown(mark.text)),
                element("line", {"x1": x1, "x2": x2, "y1": y, "y2": y}),
                element("circle", {"cx": x1, "cy": y, "r": 3}),
            )
        )
    lanes = max((lane + 1 for lane, end in enumerate(ends) if end >= 0), default=0)
    return element("svg", {"class": f"marks lanes{lanes}", "width": "100%"}, drawn)
