"""How far clients exceed their own past, and the threshold that a budget of false alarms puts on it.

Peaks over threshold: beyond a low edge the excess is taken for exponential, so n excesses a week with mean m pass
edge + m ln(n / budget) as often a week as the budget says (J. Pickands, Annals of Statistics 3, 1975, with shape 0,
which is steadier on few peaks). Number and mean start from an assumption that weighs as much as `prior_weeks` weeks and
`PRIOR_PEAKS` peaks. A peak is learned a day after it; what passed the threshold counts as having reached it, no more,
so that an attack does not teach its own size (the maximum-likelihood mean of censored exponentials: the sum over the
number of those not censored; B. Epstein and M. Sobel, Journal of the American Statistical Association 48, 1953).
All in thousandths of a nat, as integers. Memory: 100 bytes a peak, at most `WAITING_MAX`.
"""

import math
from typing import Final

from msgspec import Struct

WEEK_S: Final = 7 * 86_400
WAITING_MAX: Final = 512
PRIOR_PEAKS: Final = 4
"""What the assumed mean weighs, in peaks."""
WEEKS_MAX: Final = 8.0
"""Then peaks and weeks weigh half."""


class Exceedances(Struct):
    """Peaks of one tenant; `first_s` is when it was first seen."""

    first_s: int
    prior_mean_milli: int
    """Mean excess that is assumed."""
    prior_peaks: int
    """Peaks a week that are assumed."""
    prior_weeks: float = 1.0
    """What that weighs."""
    weeks_forgotten: float = 0.0
    peaks: int = 0
    excess_milli: int = 0
    clipped: int = 0
    """Of `peaks`, those that passed the threshold."""
    waiting: dict[str, tuple[int, int]] = {}
    """Who to (second of the first, largest excess), not learned yet, oldest first."""
    dropped: int = 0

    def peak(self, who: str, second: int, excess_milli: int) -> None:
        """`who` exceeded the edge by so much; what comes within a day of his is one peak."""
        began_s, largest = self.waiting.get(who, (second, 0))
        self.waiting[who] = (began_s, max(largest, excess_milli))
        if len(self.waiting) > WAITING_MAX:
            del self.waiting[next(iter(self.waiting))]
            self.dropped += 1

    def settle(self, second: int, adopt_s: int, budget_per_week: float) -> None:
        """Learns what is old enough."""
        while self.waiting:
            who = next(iter(self.waiting))
            began_s, excess = self.waiting[who]
            if second - began_s < adopt_s:
                break
            del self.waiting[who]
            bar = self.excess_bar_milli(second, budget_per_week)
            self.clipped += excess > bar
            self.excess_milli += min(excess, bar)
            self.peaks += 1
        if self._weeks(second) > WEEKS_MAX:
            self.weeks_forgotten += self._weeks(second) / 2
            self.peaks, self.excess_milli, self.clipped = self.peaks // 2, self.excess_milli // 2, self.clipped // 2

    def _weeks(self, second: int) -> float:
        return (second - self.first_s) / WEEK_S - self.weeks_forgotten

    def mean_milli(self) -> float:
        """Mean excess, with what is assumed of it."""
        return (self.excess_milli + self.prior_mean_milli * PRIOR_PEAKS) / (self.peaks - self.clipped + PRIOR_PEAKS)

    def excess_bar_milli(self, second: int, budget_per_week: float) -> int:
        """The excess that peaks pass as often as the budget says."""
        a_week = (self.peaks + self.prior_peaks * self.prior_weeks) / (max(self._weeks(second), 0.0) + self.prior_weeks)
        return round(self.mean_milli() * max(math.log(a_week / budget_per_week), 0.0))
