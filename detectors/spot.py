"""Peaks over threshold of a window's latency: how improbable is it, given this key's own past?

A window is one number, y = ln(observed / expected latency), and its tail. Seven statistics are made of them.

Four see what lasts or is large, on v = how many times more or less than expected (e^|y| - 1 with the sign of y: sizes
count in proportion, so that a peak stands out as in the raw series): v less what its hour of the day explains, the same
of the hour of the week, and the means of 12 and of 24 windows.

Three see a sudden rise: the smaller of two adjoining windows' residuals of y above an AR(1) forecast; the same of the
95th percentile; and the share of calls that are slow beside their own window's median (as an arcsine, so that its noise
is even), of which the two smaller of three windows are added. Slow is what lies beyond the geometric mean of the usual
95th percentile and its double. Load moves a median and its tail together and cancels out, and in a heavy tail a share
is steadier than a percentile.

Each has a tail of its own past beyond its 98 % quantile, continued by an exponential; the least probable decides. Noise
whose steps are Gaussian falls off sooner, with the square of the size, and then a sudden rise is far less probable.
That is believed as long as the key's own record does not contradict it: what such a tail would have told more than a
week ago came at most once a week, and once more. Younger rises don't count yet, so that one bad week hides nothing.
Sources: A. Siffer et al., "Anomaly Detection in Streams with Extreme Value Theory", KDD 2017 (SPOT; DSPOT for the
residuals), with shape 0, which is steadier on few peaks.

Residuals are to a slow level, the hour and the load, all learned online with clipped steps, so that a shift enters
slowly. Cold start: nothing in the first `WARM` windows nor the first day; the hour of the week counts from the second
week on. Memory: about 12 KB a key, most of it seven histograms of at most 150 buckets.
"""

import math
from typing import Final

from msgspec import Struct, field

from detectors.histogram import Histogram, bucket_of, halve, lower_edge

WARM: Final = 250
TRUSTING: Final = 600
"""Windows from which on an improbable value is kept out of the past: before, the past itself is not known."""
GUARD: Final = 4.5
"""-log10 p from which on it is."""
EDGE_SHARE: Final = 0.02
"""The share of the past that the exponential is fitted to."""
REFIT: Final = 48
TAIL_MAX: Final = 8_000
"""Values a tail remembers before it halves them: five days of minutes."""
SCALE_MIN: Final = 0.05
"""Least scale of the exponential, in edges: a past without peaks must not make the first one impossible."""
MEANS: Final = {"mean12": 12, "mean24": 24}
RHO: Final = 0.9
GAIN: Final = 0.4
LOAD_BINS: Final = 24
HOURS: Final = 24
WEEK_S: Final = 7 * 86_400
WEEK_HOURS: Final = 168
REST: Final = 100
"""Windows for which an unusual one silences the next, unless half as improbable again: an episode is told once."""
REST_SUDDEN: Final = 20
SUDDEN: Final = ("jump", "tail", "slowest")
SLOW_MIN: Final = 0.05
"""Share of slow calls that matters: then the 95th percentile lies where slow begins."""
RECORD_AGE_S: Final = 7 * 86_400
"""Age from which a sudden rise is held against the tail that falls off with the square."""
RECORD_WEEKS: Final = 8
RECORD_MAX: Final = 64
"""Sudden rises remembered."""
STATISTICS: Final = ("day", "week", *MEANS, *SUDDEN)


class Tail(Struct):
    """The past of one statistic, in thousandths, and the exponential beyond its edge."""

    counts: Histogram = {}
    total: int = 0
    since_fit: int = REFIT
    edge: float = 0.0
    share: float = 1.0
    scale: float = 1.0
    square_scale: float = 1.0
    """The same of a tail that falls off with the square of the size."""

    def improbability(self, value: float) -> float:
        """-log10 P(a value as large or larger); 0 within the edge."""
        if value <= self.edge or self.share >= 1:
            return 0.0
        return -math.log10(self.share) + (value - self.edge) / self.scale / math.log(10)

    def square_improbability(self, value: float) -> float:
        """The same, where the tail falls off with the square of the size if that is sooner."""
        least = self.improbability(value)
        if least == 0:
            return 0.0
        return max(least, -math.log10(self.share) + (value**2 - self.edge**2) / self.square_scale / math.log(10))

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
        peaks = [
            (count, middle)
            for (bucket, count), middle in zip(ordered, middles, strict=True)
            if bucket >= edge_bucket and middle > self.edge
        ]
        excess = math.fsum(count * (middle - self.edge) for count, middle in peaks)
        squares = math.fsum(count * (middle**2 - self.edge**2) for count, middle in peaks)
        self.share = (above + 0.5) / (self.total + 1)
        self.scale = max(excess / above, SCALE_MIN * self.edge, 1e-3)
        self.square_scale = max(squares / above, 2 * SCALE_MIN * self.edge**2, 1e-6)


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


class Profile(Struct):
    """A number less its slow level and what is usual in its slot of the day or week."""

    slots: int
    level: float = 0.0
    spread: float = 0.2
    usual: list[float] = []
    seen: list[int] = []

    def of(self, value: float, slot: int) -> float:
        """The residual; then learns it, in steps of at most two spreads."""
        if not self.usual:
            self.usual, self.seen, self.level = [0.0] * self.slots, [0] * self.slots, value
        residual = value - self.level - self.usual[slot]
        step = min(max(residual, -2 * self.spread), 2 * self.spread)
        self.spread = max(self.spread + 0.005 * (1.25 * abs(step) - self.spread), 0.02)
        self.level += 0.004 * step
        self.seen[slot] += 1
        self.usual[slot] += step * max(0.05, 1 / (self.seen[slot] + 3))
        return residual


class Seen(Struct, frozen=True):
    """A window, as far as `Spot` looks at it."""

    median_ln: float
    """ln(observed / expected median)."""
    high_ln: float | None
    """The same of the 95th percentile; None where calls are too few for one."""
    slow_share: float
    """Share of calls above the window's own median times what the 95th percentile is usually above the median, and half
    of a doubling more."""
    hour: int
    """Of the week."""
    load: float
    """ln(calls a minute + 1)."""


class Spot(Struct):
    """The statistics of one key."""

    windows: int = 0
    median: Residual = field(default_factory=Residual)
    high: Residual = field(default_factory=Residual)
    day: Profile = field(default_factory=lambda: Profile(HOURS))
    week: Profile = field(default_factory=lambda: Profile(WEEK_HOURS))
    share: Profile = field(default_factory=lambda: Profile(HOURS))
    shares: list[tuple[float, float]] = []
    """Of the last three windows: the arcsine less what is usual, and the share itself."""
    recent: list[float] = []
    mean_levels: dict[str, float] = {}
    tails: dict[str, Tail] = {}
    last: dict[str, tuple[int, float]] = {}
    """Of sudden and of lasting changes: the last window that was improbable enough, and the last told -log10 p."""
    steepest: float = 0.0
    """Of the window judged last: -log10 p of the least probable sudden rise by the tail with the square."""
    risen: int = -REST_SUDDEN
    """The last window with one that this tail tells, of an episode of them."""
    record: list[int] = []
    """The age of the key in s when each of these episodes began."""

    def trusts_square(self, age_s: int) -> bool:
        """Whether a key of that age has a record that goes with a tail that falls off with the square."""
        seen_s = age_s - RECORD_AGE_S
        held = sum(began_s <= seen_s for began_s in self.record)
        return seen_s >= 86_400 and held <= 1 + min((seen_s - 86_400) / WEEK_S, RECORD_WEEKS)

    def note(self, age_s: int, needed: float) -> None:
        """Puts a sudden rise in the window judged last on record, an episode once."""
        if self.steepest < needed:
            return
        if self.windows - self.risen >= REST_SUDDEN:
            since_s = age_s - RECORD_AGE_S - RECORD_WEEKS * WEEK_S
            self.record = [*(began_s for began_s in self.record if began_s > since_s), age_s][-RECORD_MAX:]
        self.risen = self.windows

    def tells(self, statistic: str, found: float, needed: float) -> bool:
        """Whether the window just judged is to be told: once an episode, and again where it is half as bad again."""
        if found < needed:
            return False
        sudden = statistic in SUDDEN
        family = "sudden" if sudden else "lasting"
        at, told = self.last.get(family, (-REST, 0.0))
        again = self.windows - at < (REST_SUDDEN if sudden else REST)
        tells = not again or found >= 1.5 * told
        self.last[family] = (self.windows, found if tells else told)
        return tells

    def judge(self, window: "Seen", rise_min: float, *, square: bool = False) -> dict[str, float]:
        """-log10 p of each statistic; empty while warm. A median or a 95th percentile that rose at once by less than
        `rise_min` (in ln), or fewer slow calls than `SLOW_MIN`, are improbable by 0: however sure, it does not matter.
        `square`: whether sudden rises have a tail that falls off with the square."""
        y, hour, load = window.median_ln, window.hour, window.load
        size = math.copysign(math.expm1(min(abs(y), 7.0)), y)
        found = {
            "jump": self.median.jump(self.median.of(y, hour, load)),
            "day": abs(self.day.of(size, hour % HOURS)),
            "week": abs(self.week.of(size, hour)),
        }
        if window.high_ln is not None:
            found["tail"] = self.high.jump(self.high.of(window.high_ln, hour, load))
            share = 2 * math.asin(math.sqrt(min(max(window.slow_share, 0.0), 1.0)))
            self.shares = [*self.shares, (self.share.of(share, hour % HOURS), window.slow_share)][-3:]
            smaller = sorted(more for more, _ in self.shares)[:2]
            found["slowest"] = max(math.fsum(smaller), 0.0) if len(self.shares) == 3 else 0.0
        self.recent = [*self.recent, size][-max(MEANS.values()) :]
        for name, windows in MEANS.items():
            mine = self.recent[-windows:]
            mean = math.fsum(mine) / len(mine)
            level = self.mean_levels.get(name, 0.0)
            found[name] = abs(mean - level)
            self.mean_levels[name] = level + (mean - level) / (self.windows + 1)
        self.windows += 1
        told = {name: self.tails.setdefault(name, Tail()).improbability(value) for name, value in found.items()}
        risen: list[str] = [name for name in SUDDEN if name in found]
        steep = {name: self.tails[name].square_improbability(found[name]) for name in risen}
        for name, value in found.items():
            if self.windows <= TRUSTING or steep.get(name, told[name]) < GUARD:
                self.tails[name].learn(value)
        told |= steep if square else {}
        for name in ("jump", "tail"):
            if found.get(name, rise_min) < rise_min:
                told[name] = steep[name] = 0.0
        if "slowest" in steep and sum(share >= SLOW_MIN for _, share in self.shares) < 2:
            told["slowest"] = steep["slowest"] = 0.0
        self.steepest = max(steep.values())
        return told if self.windows > WARM else {}
