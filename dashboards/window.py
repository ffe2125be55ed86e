"""The stretch of time a page shows, and how it is cut into buckets.

A relative range ends at the last whole bucket, so that no plot ends in a half-filled bucket that looks like a drop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from dashboards.config import RANGES_S

BUCKETS_AIM: Final = 120
DAYS_MAX: Final = 400
STEPS_S: Final = (1, 2, 5, 10, 15, 30, 60, 120, 180, 300, 600, 900, 1_800, 3_600, 7_200, 10_800, 21_600, 43_200, 86_400)
TICKS_S: Final = (*STEPS_S[3:], 172_800, 604_800, 1_209_600, 2_592_000, 7_776_000)


class BadWindow(ValueError):
    """The address asks for a time that can't be shown; the message says what to write instead."""


@dataclass(frozen=True)
class Window:
    """From `from_ms` (included) to `to_ms` (excluded), milliseconds since the epoch, in buckets of `bucket_s`."""

    from_ms: int
    to_ms: int
    bucket_s: int
    name: str = ""
    """`1h` …, or empty for a stretch with fixed ends."""

    @property
    def buckets(self) -> int:
        """How many buckets a plot has."""
        return max(1, -(-(self.to_ms - self.from_ms) // (self.bucket_s * 1000)))

    def bucket(self, moment_ms: float) -> int:
        """The bucket that holds `moment_ms`; may lie outside."""
        return int((moment_ms - self.from_ms) // (self.bucket_s * 1000))

    def start_ms(self, bucket: int) -> int:
        """When a bucket starts."""
        return self.from_ms + bucket * self.bucket_s * 1000

    def share(self, moment_ms: float) -> float:
        """Where a moment lies, 0 at the left edge and 1 at the right, kept inside."""
        width = self.buckets * self.bucket_s * 1000
        return min(1.0, max(0.0, (moment_ms - self.from_ms) / width))

    def parameters(self) -> dict[str, int]:
        """As the parameters of a panel's SQL."""
        return {"from_ms": self.from_ms, "to_ms": self.to_ms, "bucket_s": self.bucket_s}

    def address(self) -> dict[str, str]:
        """As the query of an address that shows the same."""
        if self.name:
            return {"range": self.name}
        return {"from": _written(self.from_ms), "to": _written(self.to_ms)}

    def ticks(self, count: int = 6) -> list[tuple[float, str]]:
        """(share, label) of round times in UTC: times of day, or dates where the window is longer than two days."""
        width_s = (self.to_ms - self.from_ms) / 1000
        step = next((step for step in TICKS_S if width_s / step <= count), TICKS_S[-1]) * 1000
        first = -(-self.from_ms // step) * step
        form = "%d %b" if step >= 86_400_000 else "%d %b %H:%M" if width_s > 172_800 else "%H:%M"
        form = "%H:%M:%S" if step < 60_000 else form
        moments = range(first, self.to_ms, step)
        return [(self.share(at), datetime.fromtimestamp(at / 1000, UTC).strftime(form)) for at in moments]


def last(name: str, now_ms: int) -> Window:
    """The named range up to now."""
    length_s = RANGES_S[name]
    step_s = _step(length_s)
    end_ms = now_ms // (step_s * 1000) * (step_s * 1000)
    return Window(end_ms - length_s * 1000, end_ms, step_s, name)


def between(from_ms: int, to_ms: int) -> Window:
    """A stretch with fixed ends, widened to whole buckets. Raises `BadWindow`."""
    if not 0 <= from_ms < to_ms or to_ms - from_ms > DAYS_MAX * 86_400_000:
        raise BadWindow(f"The time range must start before it ends and be at most {DAYS_MAX} days long.")
    step_ms = _step((to_ms - from_ms) / 1000) * 1000
    return Window(from_ms // step_ms * step_ms, -(-to_ms // step_ms) * step_ms, step_ms // 1000)


def asked(query: Mapping[str, str], default: str, now_ms: int) -> Window:
    """The window that an address asks for: `range=1h`, or `from` and `to` in ISO 8601 (UTC where no zone is given).

    Raises `BadWindow` with one sentence.
    """
    if "from" in query or "to" in query:
        start = _read(query.get("from", ""), "from")
        return between(start, _read(query["to"], "to") if query.get("to") else now_ms)
    name = query.get("range", default)
    if name not in RANGES_S:
        raise BadWindow(f"The range must be one of {', '.join(RANGES_S)}, or from and to in ISO 8601.")
    return last(name, now_ms)


def _step(length_s: float) -> int:
    return next((step for step in STEPS_S if length_s / step <= BUCKETS_AIM), 86_400 * 4)


def _written(moment_ms: int) -> str:
    return datetime.fromtimestamp(moment_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(text: str, name: str) -> int:
    try:
        moment = datetime.fromisoformat(text[:40])
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadWindow(f"`{name}` must be a time in ISO 8601, such as 2026-01-31T14:05:00Z.") from None
