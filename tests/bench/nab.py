"""The standard profile of the Numenta Anomaly Benchmark, and rivals on it.

Source: A. Lavin, S. Ahmad, "Evaluating Real-time Anomaly Detection Algorithms", ICMLA 2015: the earliest hit in a
window earns up to 1, a miss costs 1, an alarm outside up to 0.11; the first min(15 %, 750) rows count for nothing; 0 is
a detector that says nothing, 100 a perfect one. Rivals are given the same refractory period, and the threshold that is
best on the very files scored, which flatters them.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
FALSE_COST: Final = 0.11
REST: Final = 100
TREES, DEPTH, FLUSH = 25, 8, 250


@dataclass(frozen=True)
class Series:
    """One file."""

    name: str
    moment_s: Ints
    value: Floats
    windows: list[tuple[int, int]]
    """First and last row."""

    @property
    def probation(self) -> int:
        """Rows that are not scored."""
        return int(min(0.15 * len(self.value), 750))


def series_of(root: Path) -> list[Series]:
    """All that are labelled, in order of name."""
    found = []
    labels = json.loads((root / "combined_windows.json").read_text())
    for name, spans in sorted(labels.items()):
        with (root / name).open() as opened:
            rows = list(csv.DictReader(opened))
        moment = np.array([row["timestamp"] for row in rows], "datetime64[s]").astype(np.int64)
        places = {int(at): place for place, at in reversed(list(enumerate(moment.tolist())))}
        windows = [
            tuple(places[int(np.datetime64(edge[:19], "s").astype(np.int64))] for edge in span) for span in spans
        ]
        found.append(
            Series(name, moment, np.array([float(row["value"]) for row in rows]), [(a, b) for a, b in windows])
        )
    return found


def _sigmoid(at: Floats) -> Floats:
    return np.asarray(np.where(at > 3, -1.0, 2 / (1 + np.exp(np.clip(5 * at, -50, 50))) - 1))


def worth(series: Series) -> tuple[Floats, Ints]:
    """What an alarm at each row earns or costs, and the window it hits, -1 for none."""
    rows = np.arange(len(series.value))
    value, hit = np.full(len(rows), -FALSE_COST), np.full(len(rows), -1)
    last: tuple[int, int] | None = None
    for number, (begin, end) in enumerate(series.windows):
        width = end - begin + 1
        if last is not None and last[1] > 1:
            gap = np.arange(last[0] + 1, begin)
            value[gap] = FALSE_COST * _sigmoid((gap - last[0]) / (last[1] - 1))
        inside = np.arange(begin, end + 1)
        value[inside] = _sigmoid(-(end - inside + 1) / width) / _sigmoid(np.array(-1.0))
        hit[inside] = number
        last = (end, width)
    if last is not None:
        after = rows[rows > last[0]]
        value[after] = FALSE_COST * _sigmoid((after - last[0]) / (last[1] - 1))
    return value, hit


def points(series: Series, alarms: Ints) -> float:
    """The raw score of a file: between minus its windows and plus them, less false alarms."""
    value, hit = worth(series)
    rows = np.unique(alarms[alarms >= series.probation])
    total = float(value[rows[hit[rows] < 0]].sum())
    for number in range(len(series.windows)):
        mine = rows[hit[rows] == number]
        total += float(value[mine].max()) if len(mine) else -1.0
    return total


def normalised(raw: float, windows: int) -> float:
    """0 for silence, 100 for perfection."""
    return 100 * (raw + windows) / (2 * windows) if windows else 0.0


def rested(score: Floats, threshold: float) -> Ints:
    """Rows of alarms: after one, none for `REST` rows unless half as strong again."""
    told, last, strength = [], -REST, 0.0
    for row in np.flatnonzero(score >= threshold).tolist():
        if row - last >= REST or score[row] >= 1.5 * strength:
            told.append(row)
            strength = float(score[row])
        last = row
    return np.array(told, np.int64)


def best_of(files: list[Series], scores: list[Floats]) -> tuple[float, list[float]]:
    """The threshold that scores most on these very files, and the raw score of each."""
    pooled = np.concatenate([score[each.probation :] for each, score in zip(files, scores, strict=True)])
    thresholds = np.unique(np.quantile(pooled, 1 - np.geomspace(1e-5, 0.05, 40)))
    rows = [[points(each, rested(score, at)) for each, score in zip(files, scores, strict=True)] for at in thresholds]
    best = max(range(len(rows)), key=lambda number: sum(rows[number]))
    return float(thresholds[best]), rows[best]


def three_sigma(series: Series, span: int = 288) -> Floats:
    """Deviations from the mean of the last `span` rows."""
    value = series.value
    total = np.concatenate(([0.0], np.cumsum(value)))
    square = np.concatenate(([0.0], np.cumsum(value**2)))
    rows = np.arange(len(value))
    begin = np.maximum(rows - span, 0)
    count = np.maximum(rows - begin, 1)
    mean = (total[rows] - total[begin]) / count
    spread = np.sqrt(np.maximum((square[rows] - square[begin]) / count - mean**2, 0))
    return np.where(rows < 30, 0.0, np.minimum(np.abs(value - mean) / (spread + 1e-9), 1e6))


def spot(series: Series) -> Floats:
    """SPOT on the distance from the mean of the last ten rows (DSPOT), exponential tail over the 98 % quantile."""
    value = series.value
    total = np.concatenate(([0.0], np.cumsum(value)))
    rows = np.arange(len(value))
    begin = np.maximum(rows - 10, 0)
    away = np.abs(value - (total[rows] - total[begin]) / np.maximum(rows - begin, 1))
    score = np.zeros(len(value))
    for start in range(series.probation, len(value), 48):
        past = away[:start]
        edge = float(np.quantile(past, 0.98))
        scale = max(float((past[past > edge] - edge).mean()) if (past > edge).any() else 0.0, 0.1 * edge, 1e-9)
        score[start : start + 48] = np.maximum(away[start : start + 48] - edge, 0) / scale
    return score


def isolation_forest(series: Series) -> Floats:
    """scikit-learn's, on four lags, fitted on the probationary rows. Raises `ImportError` where it is absent."""
    from sklearn.ensemble import IsolationForest

    value = series.value
    lags = np.stack([np.concatenate((np.full(lag, value[0]), value[: len(value) - lag])) for lag in range(4)], 1)
    forest = IsolationForest(n_estimators=100, random_state=0).fit(lags[: series.probation])
    return np.asarray(-forest.score_samples(lags))


def half_space_trees(series: Series) -> Floats:
    """S. C. Tan et al., "Fast Anomaly Detection for Streaming Data", IJCAI 2011: value and step, 25 trees."""
    rng = np.random.default_rng(1)
    value = series.value
    low, high = value[: series.probation].min(), value[: series.probation].max()
    scaled = np.clip((value - low) / (high - low + 1e-9), 0, 1)
    step = np.clip(np.diff(scaled, prepend=scaled[:1]) / 2 + 0.5, 0, 1)
    cells = np.stack([_cells(np.stack([scaled, step], 1), rng) for _ in range(TREES)])
    score = np.zeros(len(value))
    mass = np.zeros((TREES, DEPTH + 1, 2**DEPTH))
    for start in range(0, len(value), FLUSH):
        mine = cells[:, :, start : start + FLUSH]
        tree, level = np.arange(TREES)[:, None, None], np.arange(DEPTH + 1)[None, :, None]
        found = mass[tree, level, mine]
        stop = np.argmax(np.concatenate((found[:, 1:] < 25, np.ones_like(found[:, :1], bool)), 1), 1)
        depth = np.minimum(stop, DEPTH)
        weights = np.take_along_axis(found, depth[:, None, :], 1)[:, 0] * 2.0**depth
        score[start : start + FLUSH] = -weights.sum(0)
        mass = np.zeros_like(mass)
        np.add.at(mass, (np.broadcast_to(tree, mine.shape), np.broadcast_to(level, mine.shape), mine), 1)
    score[:FLUSH] = score.min()
    return np.asarray(score - score.min(), np.float64)


def _cells(features: Floats, rng: np.random.Generator) -> Ints:
    """The node of each row on each level of one random tree."""
    middle = rng.random(2)
    reach = 2 * np.maximum(middle, 1 - middle)
    lows = np.tile(middle - reach, (len(features), 1))
    highs = np.tile(middle + reach, (len(features), 1))
    node = np.zeros(len(features), np.int64)
    nodes = [node]
    for level in range(DEPTH):
        axes = rng.integers(0, 2, 2**level)
        axis = axes[node]
        rows = np.arange(len(features))
        cut = (lows[rows, axis] + highs[rows, axis]) / 2
        right = features[rows, axis] >= cut
        lows[rows, axis] = np.where(right, cut, lows[rows, axis])
        highs[rows, axis] = np.where(right, highs[rows, axis], cut)
        node = 2 * node + right
        nodes.append(node)
    return np.stack(nodes)


RIVALS: Final = {
    "three_sigma": three_sigma,
    "spot": spot,
    "isolation_forest": isolation_forest,
    "half_space_trees": half_space_trees,
}
