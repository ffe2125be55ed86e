"""A check of the guards as one HTML page: tables, ROC curves, histograms. No script, no network, no text judged."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dashboards.markup import Markup, element, joined

if TYPE_CHECKING:
    from collector.guards.assessment import Curve, Group, Verdicts
    from collector.guards.check_record import CheckRecord
    from collector.guards.figures import Interval

_SIZE: Final = 240
_PAD: Final = 34
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE: Final = Markup("""
:root { color-scheme: light dark; --ground: light-dark(#f2f4f6,#0c1116); --panel: light-dark(#fff,#141b22);
  --line: light-dark(#dfe4e9,#25303a); --text: light-dark(#18212a,#dce5ed); --quiet: light-dark(#586673,#8e9eac);
  --attack: light-dark(#c22f2f,#ff6d6d); --calm: light-dark(#1f6fb8,#5aa7ea);
  font: 14px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; font-variant-numeric: tabular-nums; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; background: var(--ground); color: var(--text); }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .3rem 0; color: var(--quiet); max-width: 60rem; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.wide { overflow-x: auto; margin: .9rem 0; } table { border-collapse: collapse; width: 100%; table-layout: fixed;
  min-width: 56rem; } th:first-child { width: 16rem; } td:first-child { overflow: hidden; text-overflow: ellipsis; }
th, td { text-align: right; padding: .22rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td small { color: var(--quiet); } .curves { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
figcaption { color: var(--quiet); } svg { display: block; width: 20rem; max-width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 11px; } .frame { fill: none; stroke: var(--line); }
.roc { fill: none; stroke: var(--attack); stroke-width: 2; } .chance { stroke: var(--line); stroke-dasharray: 4 4; }
.attack { fill: var(--attack); } .calm { fill: var(--calm); } .key { display: inline-block; width: .8em; height: .8em;
  border-radius: 2px; margin: 0 .3em 0 .8em; }
.key.attack { background: var(--attack); } .key.calm { background: var(--calm); }
""")


def page(record: "CheckRecord") -> str:
    """The whole document."""
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("title", None, f"Guards checked {record.at:%Y-%m-%d} · inferwatch"),
        element("style", None, _STYLE),
    )
    body = element(
        "body",
        None,
        element("h1", None, "What the guards let through"),
        _about(record),
        (_verdicts(one, record.fpr) for one in record.assessment.verdicts),
        _agreement(record),
    )
    return "<!doctype html>\n" + element("html", {"lang": "en"}, head, body) + "\n"


def _about(record: "CheckRecord") -> Markup:
    signed = "signed" if record.signature else "not signed"
    texts = f"{record.attacks} attacks and {record.harmless} harmless texts of {', '.join(record.plan.digests)}."
    versions = ", ".join(f"{name} {version}" for name, version in record.plan.versions.items())
    return joined([
        element("p", None, f"{record.at:%Y-%m-%d %H:%M} UTC, {signed}. {texts} Guards: {versions}."),
        element(
            "p",
            None,
            "Intervals are 95 %. Bypassed: the share of attacks that pass plain or in any one disguise. A text that a "
            "guard failed to judge counts as passed by it.",
        ),
        element("p", None, "These texts were seen in training: the figures flatter the classifier.")
        if record.seen_in_training
        else None,
    ])  # fmt: skip


def _verdicts(one: "Verdicts", fpr: float) -> Markup:
    bypass = "" if one.bypass is None else f" Bypassed: {one.bypass}."
    cost = (
        f"{one.ms_per_kb:.2f} ms per KB; a text took {one.latency_p50_ms:.2f} ms at the median, "
        f"{one.latency_p99_ms:.2f} ms at the 99th percentile.{bypass}"
    )
    parts = [("Stage", one.by_stage), ("Disguise", one.by_disguise), ("Language", one.by_language)]
    return element(
        "section",
        None,
        element("h2", None, one.guard),
        element("p", None, cost),
        _table("All", [one.overall]),
        element("div", {"class": "curves"}, (_curves(curve) for curve in one.curves)),
        (_table(name, groups) for name, groups in (*parts, ("Family", one.by_family))),
        _thresholds(one, fpr),
    )


def _table(title: str, groups: "Sequence[Group]") -> Markup | None:
    if not groups:
        return None
    heads = (title, "attacks", "caught", "harmless", "wrongly blocked", "AUROC", "errors")
    rows = (
        (
            one.name, one.attacks or "", _interval(one.tpr), one.harmless or "", _interval(one.fpr),
            _interval(one.auroc), one.errors or "",
        )
        for one in groups
    )  # fmt: skip
    return _grid(heads, rows)


def _grid(heads: Sequence[str], rows: "object") -> Markup:
    head = element("tr", None, (element("th", {"scope": "col"}, one) for one in heads))
    body = (element("tr", None, (element("td", None, cell) for cell in row)) for row in rows)  # type: ignore[attr-defined]
    return element(
        "div", {"class": "wide"}, element("table", None, element("thead", None, head), element("tbody", None, body))
    )


def _interval(value: "Interval | None") -> Markup | str:
    if value is None:
        return ""
    return joined([f"{value.value:.3f} ", element("small", None, f"{value.low:.3f}–{value.high:.3f}")])


def _thresholds(one: "Verdicts", fpr: float) -> Markup | None:
    if not one.thresholds:
        return None
    heads = (
        f"Threshold for {fpr:.2%}",
        "language",
        "score",
        "chance of attack",
        "caught",
        "wrongly blocked",
        "on new texts",
    )
    rows = (
        (
            limit.stage, limit.lang, f"{limit.score:.6f}", "" if limit.chance is None else f"{limit.chance:.3f}",
            _interval(limit.tpr), _interval(limit.fpr), _interval(limit.fpr_held_out),
        )
        for limit in one.thresholds
    )  # fmt: skip
    return _grid(heads, rows)


def _agreement(record: "CheckRecord") -> Markup | None:
    if not record.assessment.agreement:
        return None
    rows = (
        (f"{one.first}, {one.second}", one.texts, "" if one.kappa is None else f"{one.kappa:.3f}")
        for one in record.assessment.agreement
    )
    return element("section", None, element("h2", None, "Agreement"), _grid(("guards", "texts", "Cohen's kappa"), rows))


def _curves(curve: "Curve") -> list[Markup]:
    drawn = [_histogram(curve)]
    if curve.roc:
        drawn.insert(0, _roc(curve))
    return drawn


def _roc(curve: "Curve") -> Markup:
    points = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in curve.roc)
    svg = _svg(
        f"ROC curve, {curve.stage}",
        element("line", {"class": "chance", "x1": _x(0), "y1": _y(0), "x2": _x(1), "y2": _y(1)}),
        element("polyline", {"class": "roc", "points": points}),
        _labels("wrongly blocked", "caught"),
    )
    return element("figure", None, svg, element("figcaption", None, f"ROC, {curve.stage}"))


def _histogram(curve: "Curve") -> Markup:
    """Both classes as shares of their own, so that a rare class is seen."""
    bars = []
    width = _SIZE / len(curve.attacks) / 2
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in (curve.attacks, curve.harmless)]
    top = max(max(one) for one in shares) or 1
    for side, (name, values) in enumerate(zip(("attack", "calm"), shares, strict=True)):
        for place, value in enumerate(values):
            height = value / top * _SIZE
            left = _PAD + (place * 2 + side) * width
            where = {
                "x": round(left, 1),
                "y": round(_y(0) - height, 1),
                "width": round(width, 1),
                "height": round(height, 1),
            }
            bars.append(element("rect", {"class": name, **where}))
    key = (element("span", {"class": "key attack"}), "attacks", element("span", {"class": "key calm"}), "harmless")
    svg = _svg(f"Scores, {curve.stage}", bars, _labels("score", f"share, up to {top:.0%}"))
    return element("figure", None, svg, element("figcaption", None, f"Scores, {curve.stage}", key))


def _svg(title: str, *children: object) -> Markup:
    side = _SIZE + _PAD + 8
    frame = element("rect", {"class": "frame", "x": _PAD, "y": 8, "width": _SIZE, "height": _SIZE})
    box = {"viewBox": f"0 0 {side} {side}", "role": "img", "aria-label": title}
    return element("svg", box, element("title", None, title), frame, children)


def _labels(below: str, beside: str) -> Markup:
    middle, turned = _PAD + _SIZE / 2, {"transform": "rotate(-90)"}
    return joined([
        element("text", {"x": _PAD, "y": _y(0) + 14}, "0"),
        element("text", {"x": _x(1), "y": _y(0) + 14, "text-anchor": "end"}, "1"),
        element("text", {"x": middle, "y": _y(0) + 16, "text-anchor": "middle"}, below),
        element("text", {"x": _PAD - 8 - middle, "y": 20, "text-anchor": "middle", **turned}, beside),
    ])  # fmt: skip


def _x(share: float) -> float:
    return _PAD + share * _SIZE


def _y(share: float) -> float:
    return 8 + (1 - share) * _SIZE
