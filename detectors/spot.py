"""Peaks over threshold of a window's latency: how improbable is it, given this key's own past?

A window is one number, y = ln(observed / expected latency). Five statistics are made of it: its size, a jump of two
adjoining windows above an AR(1) forecast, the same of the 95th percentile, the mean of 24 windows against its own past,
and a smoothed deviation from the running mean. Each has a tail of its own past beyond its 98 % quantile, continued by
an exponential; the least probable decides. Sources: A. Siffer et al., "Anomaly Detection in Streams with Extreme Value
Theory", KDD 2017 (SPOT; DSPOT for the residuals), with shape 0, which is steadier on few peaks.

Residuals are to a slow level, the hour of the day, the hour of the week and the load, all learned online with clipped
steps, so that a shift enters slowly. Cold start: nothing in the first `WARM` windows nor the first day; the hour of the
week counts from the second week on. Memory: about 8 KB a key, most of it five histograms of at most 150 buckets.
"""

import math
from typing import Final

from msgspec import Struct, field

from detectors.histogram import Histogram, bucket_of, halve, lower_edge

WARM: Final = 250
EDGE_SHARE: Final = 0.02
"""The share of the past that the exponential is fitted to."""
REFIT: Final = 48
TAIL_MAX: Final = 20_000
"""Values a tail remembers before it halves them: two weeks of minutes."""
SCALE_MIN: Final = 0.1
"""Least scale of the exponential, in edges: a past without peaks must not make the first one impossible."""
MEAN_OF: Final = 24
RHO: Final = 0.9
GAIN: Final = 0.4
LOAD_BINS: Final = 24
HOURS: Final = 24
WEEK_HOURS: Final = 168
REST: Final = 100
"""Windows for which an unusual one silences the next, unless half as improbable again: an episode is told once."""
REST_SUDDEN: Final = 20
SUDDEN: Final = ("jump", "tail")
STATISTICS: Final = ("level", "jump", "tail", "mean", "drift")


class Tail(Struct):
    """The past of one statistic, in thousandths, and the exponential beyond its edge."""

    counts: Histogram = {}
    total: int = 0
    since_fit: int = REFIT
    edge: float = 0.0
    share: float = 1.0
    scale: float = 1.0

    def improbability(self, value: float) -> float:
        """-log10 P(a value as large or larger); 0 within the edge."""
        if value <= self.edge or self.share >= 1:
            return 0.0
        return -math.log10(self.share) + (value - self.edge) / self.scale / math.log(10)

    def learn(self, value: float) -> None:
        """Adds to the past; the exponential is fitted anew every `REFIT` values."""
        bucket = bucket_of(int(max(value, 0.0) * 1_000))
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.total += 1
        self.since_fit += 1
        if self.total > TAIL_MAX:
            self.counts = halve(self.counts)
            self.total = sum(self.counts.values())
        if self.since_fit >= REFIT and self.total >= WARM // 2:
            self._fit()

    def _fit(self) -> None:
        self.since_fit = 0
        above, edge_bucket = 0, max(self.counts)
        ordered = sorted(self.counts.items(), reverse=True)
        for bucket, count in ordered:
            if above and above + count > EDGE_SHARE * self.total:
                break
            above += count
            edge_bucket = bucket
        self.edge = lower_edge(edge_bucket) / 1_000
        middles = ((lower_edge(bucket) + lower_edge(bucket + 1)) / 2_000 for bucket, _ in ordered)
        excess = math.fsum(
            count * max(middle - self.edge, 0.0)
            for (bucket, count), middle in zip(ordered, middles, strict=True)
            if bucket >= edge_bucket
        )
        self.share = (above + 0.5) / (self.total + 1)
        self.scale = max(excess / above, SCALE_MIN * self.edge, 1e-3)


class Residual(Struct):
    """A number less what its level, hour and load explain, and the jump of the last two above their forecast."""

    level: float = 0.0
    spread: float = 0.2
    seen: int = 0
    hours: list[float] = []
    hours_seen: list[int] = []
    week: list[float] = []
    week_seen: list[int] = []
    load: list[float] = []
    load_seen: list[float] = []
    last: float = 0.0
    forecasts: tuple[float, float] = (0.0, 0.0)
    """The AR(1) state after the last window and after the one before."""

    def of(self, y: float, hour: int, load: float) -> float:
        """The residual of y in this hour of the week under ln(calls a minute + 1) of load; then learns it."""
        if not self.hours:
            self.hours, self.hours_seen = [0.0] * HOURS, [0] * HOURS
            self.week, self.week_seen = [0.0] * WEEK_HOURS, [0] * WEEK_HOURS
            self.load, self.load_seen = [0.0] * (LOAD_BINS + 1), [0.0] * (LOAD_BINS + 1)
            self.level = y
        day = hour % HOURS
        place = min(max(load * 4, 0.0), LOAD_BINS - 1.0)
        low = int(place)
        part = place - low
        explained = self.hours[day] + self.week[hour] + (1 - part) * self.load[low] + part * self.load[low + 1]
        residual = y - self.level - explained
        step = min(max(residual, -2 * self.spread), 2 * self.spread)
        self.spread = max(self.spread + 0.005 * (1.25 * abs(step) - self.spread), 0.02)
        self.seen += 1
        self.level += 0.004 * step
        self.hours_seen[day] += 1
        self.hours[day] += step * max(0.01, 1 / (self.hours_seen[day] + 20))
        self.week_seen[hour] += 1
        self.week[hour] += step * max(0.01, 1 / (self.week_seen[hour] + 40))
        for number, weight in ((low, 1 - part), (low + 1, part)):
            self.load_seen[number] += weight
            self.load[number] += weight * step * max(0.005, 1 / (self.load_seen[number] + 20))
        return residual

    def jump(self, residual: float) -> float:
        """The smaller of the last two residuals above what an AR(1) forecast from before them allowed; at least 0."""
        now, before = self.forecasts
        found = min(residual - before * RHO**2, self.last - before * RHO)
        ahead = now * RHO
        self.forecasts = (ahead + GAIN * (residual - ahead), now)
        self.last = residual
        return max(found, 0.0)


class Spot(Struct):
    """The statistics of one key."""

    windows: int = 0
    median: Residual = field(default_factory=Residual)
    high: Residual = field(default_factory=Residual)
    recent: list[float] = []
    mean: float = 0.0
    mean_level: float = 0.0
    fast: float = 0.0
    drift: float = 0.0
    tails: dict[str, Tail] = {}
    last: dict[str, tuple[int, float]] = {}
    """Of sudden and of lasting changes: the last window that was improbable enough, and the last told -log10 p."""

    def tells(self, statistic: str, found: float, needed: float) -> bool:
        """Whether the window just judged is to be told: once an episode, and again where it is half as bad again."""
        if found < needed:
            return False
        family = "sudden" if statistic in SUDDEN else "lasting"
        at, told = self.last.get(family, (-REST, 0.0))
        again = self.windows - at < (REST_SUDDEN if family == "sudden" else REST)
        tells = not again or found >= 1.5 * told
        self.last[family] = (self.windows, found if tells else told)
        return tells

    def judge(self, y: float, y_high: float | None, hour: int, load: float) -> dict[str, float]:
        """-log10 p of each statistic; empty while warm. `y_high` is of the 95th percentile where there are enough."""
        found = {"level": math.expm1(min(abs(y), 7.0)), "jump": self.median.jump(self.median.of(y, hour, load))}
        if y_high is not None:
            found["tail"] = self.high.jump(self.high.of(y_high, hour, load))
        self.recent = [*self.recent, y][-MEAN_OF:]
        mean = math.fsum(self.recent) / len(self.recent)
        found["mean"] = abs(mean - self.mean_level)
        self.mean_level += (mean - self.mean_level) / min(self.windows + 1, 1000)
        self.drift += 0.15 * (y - self.fast - self.drift)
        found["drift"] = abs(self.drift)
        self.fast += 0.02 * (y - self.fast)
        self.windows += 1
        told = {name: self.tails.setdefault(name, Tail()).improbability(value) for name, value in found.items()}
        strongest = max(told.values())
        for name, value in found.items():
            if self.windows <= WARM or told[name] < GUARD:
                self.tails[name].learn(value)
        return told if self.windows > WARM and strongest else {}


GUARD: Final = 4.0
"""What is less probable is kept out of the past."""
