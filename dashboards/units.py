"""Numbers as people read them: short in a plot, exact in a table, always with their unit."""

import math
from datetime import UTC, datetime
from typing import Final, Literal

Unit = Literal["count", "per_minute", "per_second", "ratio", "ms", "s", "tokens", "tokens_per_minute"]

SUFFIX: Final[dict[str, str]] = {
    "count": "",
    "per_minute": "/min",
    "per_second": "/s",
    "ratio": "%",
    "ms": "ms",
    "s": "s",
    "tokens": "",
    "tokens_per_minute": "/min",
}
MISSING: Final = "–"
_SPANS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_AXIS_SPANS: Final = ((3_600, "h"), (60, "min"), (1, "s"))


def short(value: float | None, unit: str = "count") -> str:
    """Three significant digits with the unit: `12.4k/min`, `3.1 %`, `1.84 s`. A dash where there is no value."""
    if value is None or not math.isfinite(value):
        return MISSING
    if unit == "ratio":
        return f"{_digits(value * 100)} %"
    if unit == "ms":
        return duration(value / 1000)
    if unit == "s":
        return duration(value)
    return _scaled(value) + SUFFIX.get(unit, "")


def exact(value: float | None, unit: str = "count") -> str:
    """All the digits that mean something, thousands apart: `12,431`, `3.08 %`, `1,840.2 ms`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if unit == "ratio":
        return f"{value * 100:,.2f} %"
    if unit in ("ms", "s"):
        return f"{value:,.1f} {unit}"
    whole = float(value).is_integer() or abs(value) >= 1000
    return (f"{value:,.0f}" if whole else f"{value:,.2f}") + SUFFIX.get(unit, "")


def duration(seconds: float) -> str:
    """`340 ms`, `1.84 s`, `90 s`, `2.5 min`, `1 h`, `4 d`."""
    size = abs(seconds)
    if size == 0:
        return "0 s"
    if size < 1:
        return f"{_digits(seconds * 1000)} ms"
    for length, name in _SPANS:
        if size >= 2 * length or size % length == 0:
            return f"{_digits(seconds / length)} {name}"
    return f"{_digits(seconds)} s"


def ago(moment_ms: float, now_ms: float) -> str:
    """`12 s ago`, `5 min ago`; `in 3 s` for a clock that runs ahead."""
    seconds = round((now_ms - moment_ms) / 1000)
    for length, name in _SPANS:
        if abs(seconds) >= length * (2 if length > 1 else 1):
            count = abs(seconds) // length
            return f"{count} {name} ago" if seconds > 0 else f"in {count} {name}"
    return "just now"


def clock(moment_ms: float, *, now_ms: float | None = None, seconds: bool = True) -> str:
    """The time of day in UTC, with the date where it is not today's (or where `now_ms` is not given)."""
    moment = datetime.fromtimestamp(moment_ms / 1000, UTC)
    today = now_ms is not None and datetime.fromtimestamp(now_ms / 1000, UTC).date() == moment.date()
    return moment.strftime(("" if today else "%Y-%m-%d ") + ("%H:%M:%S" if seconds else "%H:%M"))


def ticks(top: float, count: int = 4) -> list[float]:
    """Round values from 0 to at least `top`, about `count` steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not math.isfinite(top) or top <= 0:
        return [0.0, 1.0]
    rough = top / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * index for index in range(math.ceil(top / step - 1e-9) + 1)]


def axis(top: float, unit: str) -> list[tuple[float, str]]:
    """The values and labels of an axis from 0 to at least `top`: all on one scale, with the rate's `/min` once, on top.

    Times are round in the unit they are told in: 90 s, but 5 min.
    """
    if unit in ("ms", "s"):
        seconds = top / 1000 if unit == "ms" else top
        size, name = next(
            ((size, name) for size, name in _AXIS_SPANS if seconds >= (5 if size > 1 else 1) * size), (0.001, "ms")
        )
        one = size * 1000 if unit == "ms" else size
        return [(step * one, f"{_digits(step)} {name}") for step in ticks(top / one)]
    steps = ticks(top)
    if unit == "ratio":
        return [(step, short(step, unit)) for step in steps]
    return [(step, _scaled(step, steps[-1]) + (SUFFIX.get(unit, "") if step == steps[-1] else "")) for step in steps]


def _scaled(value: float, like: float | None = None) -> str:
    """With k, M, G or T from ten thousand on; `like` names the value that decides."""
    size_of = abs(value if like is None else like)
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size_of >= size:
            return f"{_digits(value / (1e3 if name == 'k' else size))}{name if value else ''}"
    return f"{value:,.0f}" if abs(value) >= 1000 else _digits(value, places_max=2)


def _digits(value: float, places_max: int = 4) -> str:
    """Three significant digits, no exponent, no trailing zeros."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(places, places_max)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
