"""Rules T4 to T8 for a run of ordinary records at once: what `PartitionClock` says of them one by one, in numpy.

Ordinary: neither hello, goodbye nor tick; every lane known, live and contiguous; nothing late, ahead or over the limit;
and no lane so near its death that it may die within the run. Anything else is left to the clock, record by record, so
an odd record costs time but never another answer (tested: any log, cut anyhow, both ways).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from detectors.config import TimeConfig

if TYPE_CHECKING:
    from detectors.time import ClockState, Lane

SECOND_US: Final = 1_000_000
LANES_MAX: Final = 64
"""With more lanes alive the clock's own way is no slower."""
Ints = NDArray[np.int64]


@dataclass(slots=True)
class Run:
    """Ordinary records in order of offset, one entry each."""

    lane: Ints
    """Index into `lanes`."""
    lanes: list[str]
    seq: Ints
    moment_us: Ints
    event: NDArray[np.bool_]
    append_ms: Ints


def judge(run: Run, state: "ClockState", config: TimeConfig) -> tuple[bool, int | None]:
    """(whether it was judged, the first second newly closed through by it). Where it was not, nothing has changed."""
    known = [state.lanes.get(name) for name in run.lanes]
    lanes = [lane for lane in known if lane is not None and lane.live]
    alive = [lane for lane in state.lanes.values() if lane.live]
    if len(lanes) != len(known) or state.appended_ms is None or len(alive) > LANES_MAX:
        return False, None
    appended = np.maximum.accumulate(np.concatenate(([state.appended_ms], run.append_ms)))
    grown = np.cumsum(np.minimum(np.diff(appended), config.gap_max_ms))
    clock_ms = state.clock_ms + int(grown[-1])
    sound = (
        clock_ms - min(lane.moved_ms for lane in alive) <= config.silence_max_ms
        and state.pending_count + len(run.seq) <= config.pending_events_max
        and bool((run.moment_us <= (run.append_ms + config.ahead_max_ms) * 1_000).all())
        and _contiguous(run, lanes)
    )
    if not sound:
        return False, None
    promised, moved = _promises(run, lanes)
    others = [lane.promise_us for lane in alive if not any(lane is mine for mine in lanes)]
    watermark = np.maximum.accumulate(np.minimum(promised.min(axis=0), min(others, default=np.iinfo(np.int64).max)))
    watermark = np.maximum(watermark, state.watermark_us)
    before = np.concatenate(([state.watermark_us], watermark[:-1]))
    second = run.moment_us // SECOND_US
    if bool((run.event & (second < before // SECOND_US)).any()):
        return False, None
    for number, lane in enumerate(lanes):
        lane.seq = int(run.seq[run.lane == number][-1])
        lane.promise_us = int(promised[number, -1])
        if moved[number] >= 0:
            lane.moved_ms = state.clock_ms + int(grown[moved[number]])
    _count(run, second, state)
    state.clock_ms, state.appended_ms = clock_ms, int(appended[-1])
    return True, _close(watermark, state)


def _contiguous(run: Run, lanes: "list[Lane]") -> bool:
    for number, lane in enumerate(lanes):
        seq = run.seq if len(lanes) == 1 else run.seq[run.lane == number]
        if int(seq[0]) != lane.seq + 1 or int(seq[-1]) != lane.seq + len(seq) or bool((np.diff(seq) != 1).any()):
            return False
    return True


def _promises(run: Run, lanes: "list[Lane]") -> tuple[Ints, list[int]]:
    """What each lane has promised after each record, and the record that last moved its promise, or -1."""
    rows, moved = [], []
    for number, lane in enumerate(lanes):
        mine = np.where(run.lane == number, run.moment_us, np.iinfo(np.int64).min)
        promise = np.maximum.accumulate(np.concatenate(([lane.promise_us], mine)))
        steps = np.flatnonzero(promise[1:] > promise[:-1])
        rows.append(promise[1:])
        moved.append(int(steps[-1]) if len(steps) else -1)
    return np.array(rows), moved


def _count(run: Run, second: Ints, state: "ClockState") -> None:
    waiting, numbers = np.unique(second[run.event], return_counts=True)
    for each, number in zip(waiting.tolist(), numbers.tolist(), strict=True):
        state.pending[each] = state.pending.get(each, 0) + number
    taken = int(np.count_nonzero(run.event))
    state.pending_count += taken
    for flag, number in (("taken", taken), ("control", len(run.seq) - taken)):
        if number:
            state.counters[flag] = state.counters.get(flag, 0) + number


def _close(watermark: Ints, state: "ClockState") -> int | None:
    """Moves the watermark; the first second through which all is newly closed, None where none is."""
    if int(watermark[-1]) <= state.watermark_us:
        return None
    through = watermark // SECOND_US - 1
    fresh = np.flatnonzero(through != state.closed_through) if state.closed_through is not None else [0]
    first = int(through[fresh[0]]) if len(fresh) else None
    state.move(int(watermark[-1]))
    return first
