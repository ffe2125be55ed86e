"""What block_rate knows of one tenant x model x guard: usual rates by the hour of the day, charts, thresholds.

Usual rate: blocks over trials, by hour of the week with its neighbours at half weight, shrunk to that of the same hour
of any day, this to that of the whole day, this to that of the same guard over all models of the tenant, and this to an
assumed one, each with a weight in blocks (the mean of a beta posterior): a weekly swing shows where an hour of the week
has many blocks. Counts fade with a half-life of a week.

Threshold: peaks over threshold. Of each chart the largest value of every six hours is kept for sixty days; what
exceeds their 80 % quantile u has an exponential tail of mean m (J. Pickands, "Statistical inference using extreme order
statistics", Ann. Statist. 3, 1975; the exponential is the limit with shape 0), so h = u + m ln(peaks a week / budget).
That needs no independence of trials: the history clusters as the future will. m is shrunk to that of a CUSUM on
clustered trials. In the first week h = ln(assumed rate x requests a week) + 1.

Memory: about 25 KB a key: six charts of 240 maxima at most, and two histories of 768 counts.
"""

import math
from typing import Final

from msgspec import Struct

from detectors.config import BlockRateConfig

DAY_S: Final = 86_400
WEEK_S: Final = 7 * DAY_S
WEEK_H: Final = 7 * 24
SLOT_S: Final = 6 * 3_600
SLOTS_A_WEEK: Final = WEEK_S // SLOT_S
MAXIMA_MAX: Final = 240
QUANTILE: Final = 0.8
TAIL_MEAN: Final = 1.3
"""Mean excess over u assumed of a chart, in nats: 1 would be independence."""
TAIL_WEIGHT: Final = 5.0
THRESHOLD_MIN: Final = 3.0
REQUESTS_A_WEEK_MIN: Final = 10_000.0
STREAMS: Final = ("fresh", "distinct")
COUNTS_OF: Final = {stream: (f"{stream}_trials", f"{stream}_blocks") for stream in STREAMS}
ALIKE: Final = 1.2
"""So many charts cross together as one: six charts share the budget as five would."""


class Counts(Struct):
    """Trials and blocks of a stream: by hour of the week, by hour of the day, and in all."""

    trials: list[float]
    blocks: list[float]
    day_trials: list[float]
    day_blocks: list[float]
    all_trials: float = 0.0
    all_blocks: float = 0.0

    @classmethod
    def none(cls) -> "Counts":
        return cls([0.0] * WEEK_H, [0.0] * WEEK_H, [0.0] * 24, [0.0] * 24)

    def add(self, hour: int, trials: int, blocks: int) -> None:
        """`hour` of the week."""
        self.trials[hour] += trials
        self.blocks[hour] += blocks
        self.day_trials[hour % 24] += trials
        self.day_blocks[hour % 24] += blocks
        self.all_trials += trials
        self.all_blocks += blocks

    def fade(self, factor: float) -> None:
        """Makes all of it weigh less."""
        for values in (self.trials, self.blocks, self.day_trials, self.day_blocks):
            values[:] = [value * factor for value in values]
        self.all_trials *= factor
        self.all_blocks *= factor

    def overall(self, prior: float, weight: float) -> float:
        """The rate of the whole day, `prior` weighing as so many blocks."""
        return (self.all_blocks + weight) / (self.all_trials + weight / prior)

    def at(self, hour: int, prior: float, weight: float) -> float:
        """The usual rate at an hour of the week, in which each coarser rate weighs as so many blocks."""
        daily = _shrunk(self.day_trials, self.day_blocks, hour % 24, self.overall(prior, weight), weight)
        return min(max(_shrunk(self.trials, self.blocks, hour, daily, weight), 1e-5), 0.5)


def _shrunk(trials: list[float], blocks: list[float], place: int, coarser: float, weight: float) -> float:
    """The rate at a place, with its neighbours at half weight."""
    after = (place + 1) % len(trials)
    seen = blocks[place] + 0.5 * (blocks[place - 1] + blocks[after])
    asked = trials[place] + 0.5 * (trials[place - 1] + trials[after])
    return (seen + weight) / (asked + weight / coarser)


class History(Struct):
    """Counts of each stream, faded day by day."""

    day: int
    streams: dict[str, Counts]

    @classmethod
    def new(cls) -> "History":
        return cls(0, {stream: Counts.none() for stream in STREAMS})

    def add(self, minute: int, counts: dict[str, int], half_life_s: int) -> None:
        """One minute's counts. Minutes come in order, or a little late from another model."""
        day = minute // 1_440
        if day > self.day:
            factor = 0.5 ** ((day - self.day) * DAY_S / half_life_s) if self.day else 1.0
            for known in self.streams.values():
                known.fade(factor)
            self.day = day
        for stream, (trials, blocks) in COUNTS_OF.items():
            self.streams[stream].add(minute // 60 % WEEK_H, counts.get(trials, 0), counts.get(blocks, 0))

    def trials(self) -> float:
        """Of the first stream: how much was learned."""
        return self.streams["fresh"].all_trials


def lasted(level: History, usual: History, since_s: int, config: BlockRateConfig) -> bool:
    """Whether a level of a day, but for its first two hours, was nearer to itself, in ln, than to what was usual."""
    begin = since_s // 3_600
    first = {begin % 24, (begin + 1) % 24} if config.adopt_s >= DAY_S else set()
    for stream, counts in level.streams.items():
        prior = usual.streams[stream].overall(config.prior_rate, config.prior_blocks)
        trials = counts.all_trials - sum(counts.day_trials[hour] for hour in first)
        blocks = counts.all_blocks - sum(counts.day_blocks[hour] for hour in first)
        whole = counts.all_blocks / max(counts.all_trials, 1.0)
        if blocks >= trials * math.sqrt(prior * whole) > 0:
            return True
    return False


class Chart(Struct):
    """One CUSUM, and its largest value of each past slot of six hours."""

    stream: str
    ratio: float
    sum: float = 0.0
    start_s: int = 0
    requests: int = 0
    """Seen since the sum was last zero."""
    block_nats: float = 0.0
    pass_nats: float = 0.0
    """What a trial with and without a block adds, at the usual rate last aimed at."""
    threshold: float = THRESHOLD_MIN
    slot: int = 0
    top: float = 0.0
    maxima: list[float] = []

    def turn(self, second: int) -> None:
        """Puts the maxima of slots that are over to the others; slots without traffic are zero."""
        slot = second // SLOT_S
        if slot == self.slot:
            return
        if self.slot:
            gap = min(slot - self.slot - 1, MAXIMA_MAX)
            self.maxima = [*self.maxima, self.top, *([0.0] * gap)][-MAXIMA_MAX:]
        self.slot, self.top = slot, self.sum

    def aim(self, rate: float) -> None:
        """The usual rate of the trials that come."""
        shifted = min(self.ratio * rate, 0.9)
        self.block_nats, self.pass_nats = math.log(shifted / rate), math.log((1 - shifted) / (1 - rate))

    def add(self, second: int, trials: int, blocks: int, requests: int) -> None:
        """One second's trials."""
        if self.sum <= 0:
            self.start_s, self.requests = second, 0
        self.requests += requests
        value = self.sum + blocks * self.block_nats + (trials - blocks) * self.pass_nats
        self.sum = value = 0.0 if value < 0 else min(value, 2 * self.threshold)
        self.top = max(self.top, value)


def run(charts: list[Chart], second: int, counts: dict[str, int]) -> None:
    """One second's counts, on every chart."""
    requests = counts["requests"]
    for chart in charts:
        trials, blocks = COUNTS_OF[chart.stream]
        chart.add(second, counts.get(trials, 0), counts.get(blocks, 0), requests)


def threshold_of(maxima: list[float], cold: float, per_week: float) -> float:
    """h such that peaks over it come `per_week` times a week, in nats; `cold` before there is a week of maxima."""
    if len(maxima) < SLOTS_A_WEEK:
        return max(cold, THRESHOLD_MIN)
    ranked = sorted(maxima)
    over = ranked[int(QUANTILE * (len(ranked) - 1))]
    excess = [value - over for value in ranked if value > over]
    mean = (sum(excess) + TAIL_WEIGHT * TAIL_MEAN) / (len(excess) + TAIL_WEIGHT)
    peaks_a_week = max(len(excess), 1) / len(maxima) * SLOTS_A_WEEK
    return max(over + mean * math.log(max(peaks_a_week / per_week, 1.0)), THRESHOLD_MIN)


def cold_threshold(assumed_rate: float, requests_a_week: float, per_week: float) -> float:
    """h before there is a history: ln(rate x requests a week) + 1 for half an alarm a week over a tenant's charts."""
    charts = 5.0
    return math.log(assumed_rate * max(requests_a_week, REQUESTS_A_WEEK_MIN)) + 1 - math.log(per_week * charts / 0.5)


def share_of(budget_per_week: float, keys: int, charts: int) -> float:
    """False alarms a week that one chart of a tenant with so many keys may give."""
    return budget_per_week / max(keys, 1) / max(charts / ALIKE, 1.0)
