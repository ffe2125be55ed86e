"""One number against its baseline and its threshold, drawn to scale."""

from typing import Final

from dashboards.markup import Markup, element, shown
from dashboards.units import exact
from detectors.finding import Statistic

ROOM: Final = 1.12


def gauge(statistic: Statistic) -> Markup:
    """A bar up to the observed value on a scale from zero, with a tick each for baseline and threshold."""
    values = (statistic.observed, statistic.baseline, statistic.threshold)
    low = min(0.0, *values)
    width = (max(0.0, *values) - low) * ROOM or 1.0

    def share(value: float) -> str:
        return f"{100 * (value - low) / width:.2f}%"

    over = statistic.observed >= statistic.threshold
    start, end = sorted((0.0, statistic.observed))
    length = f"{max(0.4, 100 * (end - start) / width):.2f}%"
    bar = {"class": "observed over" if over else "observed", "x": share(start), "y": 10, "width": length, "height": 16}
    drawing = element(
        "svg",
        {"class": "gauge", "width": "100%", "height": 36, "role": "img", "aria-label": spoken(statistic)},
        element("rect", {"class": "track", "x": "0", "y": 10, "width": "100%", "height": 16}),
        element("rect", bar),
        (
            element("line", {"class": name, "x1": share(value), "x2": share(value), "y1": 4, "y2": 32})
            for name, value in (("baseline", statistic.baseline), ("threshold", statistic.threshold))
        ),
    )
    unit = shown(statistic.unit, 20)
    legend = (
        element(
            "div", {"class": name}, element("dt", None, label), element("dd", None, f"{exact(value)} {unit}".strip())
        )
        for name, label, value in (
            ("observed", "observed", statistic.observed),
            ("threshold", "threshold", statistic.threshold),
            ("baseline", "baseline", statistic.baseline),
        )
    )
    return element("div", {"class": "measure"}, drawing, element("dl", None, legend))


def spoken(statistic: Statistic) -> str:
    """The drawing in words."""
    return (
        f"{shown(statistic.name, 80)}: observed {exact(statistic.observed)}, threshold {exact(statistic.threshold)}, "
        f"baseline {exact(statistic.baseline)} {shown(statistic.unit, 20)}".strip()
    )


def chance(improbability: float) -> str:
    """-log10 of a probability, as people say it; empty where none was computed."""
    if improbability <= 0:
        return ""
    if improbability < 6:
        return f"By chance this happens about once in {10**improbability:,.0f} times under the baseline."
    return f"By chance this happens less than once in 10^{improbability:.0f} times under the baseline."
