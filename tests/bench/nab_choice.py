"""How the statistics of `detectors/spot.py` were chosen on NAB: each off in turn, and the budget by leaving files out.

For speed the statistics are asked directly, a row a window, without the engine round them; `detection_latency` has the
deployed path. Leaving out: for each file the budget that scores most on all others. That guards against a budget fitted
to these files, not against statistics that were: those were chosen with synthetic series beside them.
"""

import math
from typing import Any, Final

import numpy as np

from detectors.spot import STATISTICS, SUDDEN, Seen, Spot
from tests.bench.nab import Floats, Ints, Series, normalised, points

BUDGETS: Final = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LASTING: Final = tuple(name for name in STATISTICS if name not in SUDDEN)
DAY_S, WEEK_S = 86_400, 7 * 86_400


def mapped(series: Series) -> Floats:
    """sign(z) ln(1 + |z|), z the distance from the median of the probationary rows in their own deviations."""
    early = series.value[: series.probation]
    middle = float(np.median(early))
    spread = 1.48 * float(np.median(np.abs(early - middle))) + 0.02 * abs(middle) + 1e-6
    z = (series.value - middle) / spread
    return np.asarray(np.sign(z) * np.log1p(np.abs(z)), np.float64)


def judged(series: Series) -> list[dict[str, float]]:
    """-log10 p of each statistic at each row."""
    spot = Spot()
    rows = zip(series.moment_s.tolist(), mapped(series).tolist(), strict=True)
    return [spot.judge(Seen(y, None, 0.0, moment // 3_600 % 168, math.log(2)), math.inf) for moment, y in rows]


def told(series: Series, found: list[dict[str, float]], budget: float, names: tuple[str, ...]) -> Ints:
    """Rows of alarms with these statistics alone."""
    spot = Spot()
    rows = []
    for row, each in enumerate(found):
        age_s = int(series.moment_s[row] - series.moment_s[0])
        spot.windows = row + 1
        if each and age_s >= DAY_S:
            needed = math.log10(spot.windows * WEEK_S / age_s * len(STATISTICS) / budget)
            unusual = [name for name in sorted(names) if spot.tells(name, each[name], needed)]
            rows += [row] if unusual else []
    return np.array(rows, np.int64)


def choice(files: list[Series], budget: float) -> dict[str, Any]:
    """Scores by budget, with the budget chosen on other files, and with each statistic off."""
    found = [judged(each) for each in files]
    windows = np.array([len(each.windows) for each in files])

    def raw(at: float, names: tuple[str, ...]) -> Floats:
        rows = [points(each, told(each, mine, at, names)) for each, mine in zip(files, found, strict=True)]
        return np.array(rows)

    def score(rows: Floats) -> float:
        return round(normalised(float(rows.sum()), int(windows.sum())), 1)

    table = np.array([raw(at, LASTING) for at in BUDGETS])
    others = table.sum(1, keepdims=True) - table
    left_out = table[others.argmax(0), np.arange(len(files))]
    off = {name: score(raw(budget, tuple(other for other in LASTING if other != name))) for name in LASTING}
    return {
        "by_budget": {str(at): score(rows) for at, rows in zip(BUDGETS, table, strict=True)},
        "budget_chosen_on_other_files": score(left_out),
        "without": off,
    }
