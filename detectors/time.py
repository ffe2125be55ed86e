"""The clock of one partition: which records count, and which seconds are closed. Rules T4 to T8, record by record.

Nothing here reads a wall clock. The answer depends on the partition's log alone: records, append times, offsets. So
whoever reads the same log closes the same seconds with the same events, whatever the batches and restarts.

The clock counts the events that wait, its caller keeps them. Memory: `lanes_max` lanes of about 200 bytes. What a crash
loses: nothing that reading again from the offset of the last snapshot does not bring back.
"""

from typing import Final, Literal

from msgspec import Struct

from collector.event import AnyRecord, AuditEvent, Goodbye, Hello, Tick, timestamp_us
from detectors.config import TimeConfig
from detectors.runs import Run, judge

Flag = Literal["taken", "duplicate", "late", "quarantined", "control", "replayed"]
"""What became of a record. `replayed`: its offset was applied before; only engines that restored a snapshot say so."""
Problem = Literal["hole", "late", "quarantined", "unaudited", "canary"]

NEVER: Final = -(2**62)
"""Before every moment, in µs."""
SECOND_US: Final = 1_000_000


class Lane(Struct):
    """What is remembered of one (collector_id, boot) in this partition."""

    seq: int = -1
    """The last one taken."""
    promise_us: int = NEVER
    moved_ms: int = 0
    """The partition's clock when the promise last moved."""
    live: bool = False


class Trouble(Struct, frozen=True, array_like=True):
    """Something a lane did wrong. `lost` counts records in a hole, unaudited requests, failed canaries; or it is 1."""

    problem: Problem
    collector_id: str
    boot: str
    moment_us: int
    lost: int
    event_id: str
    offset: int


class ClockState(Struct):
    """All that a `PartitionClock` is; its snapshot."""

    clock_ms: int = 0
    appended_ms: int | None = None
    watermark_us: int = NEVER
    tick_us: int = NEVER
    closed_through: int | None = None
    pending_count: int = 0
    lanes: dict[str, Lane] = {}
    pending: dict[int, int] = {}
    """How many events wait for each second that is not closed."""
    counters: dict[str, int] = {}

    def move(self, watermark_us: int) -> None:
        """The watermark never goes back, so neither does what is closed."""
        self.watermark_us = watermark_us
        through = watermark_us // SECOND_US - 1
        if through != self.closed_through:
            self.closed_through = through
            for second in [waiting for waiting in self.pending if waiting <= through]:
                self.pending_count -= self.pending.pop(second)


class PartitionClock:
    """Judges records one by one and says which seconds are closed."""

    def __init__(self, config: TimeConfig) -> None:
        self._config = config
        self._expected = frozenset(config.collectors)
        self._troubles: list[Trouble] = []
        self.state = ClockState()
        self._least: Lane | None = None
        """The live lane with the least promise, where known."""
        self._expiry_ms = 0
        """No live lane can be dead before the partition's clock shows this."""

    def restore(self, state: ClockState) -> None:
        """Goes on from a snapshot's state; troubles not yet taken are kept by the engine."""
        self.state = state
        self._least = None
        self._expiry_ms = 0

    @property
    def watermark_us(self) -> int:
        """W: every second that ends at or before it is closed. `NEVER` before the first promise."""
        return self.state.watermark_us

    @property
    def counters(self) -> dict[str, int]:
        """taken, duplicate, late, quarantined, control, holes, forced_seconds, lanes, pending."""
        return self.state.counters | {"lanes": len(self.state.lanes), "pending": self.state.pending_count}

    def observe(self, record: AnyRecord, *, append_ms: int, offset: int) -> Flag:
        """Judges one record. Call in order of offset."""
        state = self.state
        if append_ms != state.appended_ms:
            self._grow(append_ms)
        flag = self._tick(append_ms) if isinstance(record, Tick) else self._judge(record, append_ms, offset)
        state.counters[flag] = state.counters.get(flag, 0) + 1
        if state.clock_ms > self._expiry_ms:
            self._bury()
        self._advance()
        return flag

    def observe_run(self, run: Run) -> tuple[bool, int | None]:
        """Judges ordinary records at once, all of them "taken" or "control"; see `detectors.runs.judge`."""
        self._least = None
        return judge(run, self.state, self._config)

    def troubles(self) -> list[Trouble]:
        """Holes, late and quarantined records since the last call, in order of offset."""
        troubles, self._troubles = self._troubles, []
        return troubles

    def _grow(self, append_ms: int) -> None:
        """T4: the clock adds the gap between append times, so an outage is not silence."""
        state = self.state
        if state.appended_ms is None:
            state.appended_ms = append_ms
            return
        gap_ms = append_ms - state.appended_ms
        if gap_ms > 0:
            state.clock_ms += min(gap_ms, self._config.gap_max_ms)
            state.appended_ms = append_ms

    def _tick(self, append_ms: int) -> Flag:
        """T6: what counts is when the broker took the tick, not what its writer's clock said."""
        self.state.tick_us = max(self.state.tick_us, (append_ms - self._config.tick_lag_ms) * 1_000)
        return "control"

    def _judge(self, record: AnyRecord, append_ms: int, offset: int) -> Flag:
        """T5 and T7 for a record of a lane."""
        moment_us = timestamp_us(record.timestamp)
        name = f"{record.collector_id}\n{record.boot}"
        lane = self.state.lanes.get(name)
        if lane is None:
            if (self._expected and record.collector_id not in self._expected) or not self._room():
                self._tell("quarantined", record, moment_us, offset)
                return "quarantined"
            lane = self.state.lanes[name] = Lane(moved_ms=self.state.clock_ms)
        if record.seq <= lane.seq:
            return "duplicate"
        if record.seq > lane.seq + 1:
            self._tell("hole", record, moment_us, offset, lost=record.seq - lane.seq - 1)
        lane.seq = record.seq
        if moment_us > (append_ms + self._config.ahead_max_ms) * 1_000:
            self._tell("quarantined", record, moment_us, offset)
            return "quarantined"
        flag: Flag = "control"
        if isinstance(record, AuditEvent):
            flag = self._place(record, moment_us, offset)
        self._promise(lane, record, moment_us)
        return flag

    def _place(self, event: AuditEvent, moment_us: int, offset: int) -> Flag:
        second = moment_us // SECOND_US
        if self.state.closed_through is not None and second <= self.state.closed_through:
            self._tell("late", event, moment_us, offset)
            return "late"
        self.state.pending[second] = self.state.pending.get(second, 0) + 1
        self.state.pending_count += 1
        return "taken"

    def _promise(self, lane: Lane, record: AnyRecord, moment_us: int) -> None:
        """A record that moves the promise keeps its lane alive, or revives it."""
        if isinstance(record, Goodbye):
            lane.promise_us = max(lane.promise_us, moment_us)
            if lane.live:
                lane.live = False
                self._least = None
            return
        if moment_us > lane.promise_us or isinstance(record, Hello):
            lane.promise_us = max(lane.promise_us, moment_us)
            lane.moved_ms = self.state.clock_ms
            if not lane.live or lane is self._least:
                self._least = None
            lane.live = True

    def _room(self) -> bool:
        """Whether another lane can be remembered; the dead lane that moved longest ago makes room."""
        lanes = self.state.lanes
        if len(lanes) < self._config.lanes_max:
            return True
        dead = [(lane.moved_ms, name) for name, lane in lanes.items() if not lane.live]
        if not dead:
            return False
        del lanes[min(dead)[1]]
        return True

    def _bury(self) -> None:
        """T5: a lane is dead when the clock grew too far without its promise moving."""
        state = self.state
        oldest_ms = state.clock_ms
        for lane in state.lanes.values():
            if lane.live and state.clock_ms - lane.moved_ms > self._config.silence_max_ms:
                lane.live = False
                self._least = None
            elif lane.live:
                oldest_ms = min(oldest_ms, lane.moved_ms)
        self._expiry_ms = oldest_ms + self._config.silence_max_ms

    def _advance(self) -> None:
        """T6 and T8: the watermark is the running maximum of the least promise; seconds that end before it close."""
        state = self.state
        least = self._least
        if least is None:
            live = [lane for lane in state.lanes.values() if lane.live]
            if live:
                least = self._least = min(live, key=lambda lane: lane.promise_us)
        promise_us = least.promise_us if least is not None else state.tick_us
        if promise_us > state.watermark_us:
            self.state.move(promise_us)
        if state.pending_count > self._config.pending_events_max:
            self._force()

    def _force(self) -> None:
        """The limit on waiting events: their oldest second closes now. Decided by the log alone, so replays agree."""
        state = self.state
        self.state.move((min(state.pending) + 1) * SECOND_US)
        state.counters["forced_seconds"] = state.counters.get("forced_seconds", 0) + 1

    def _tell(self, problem: Problem, record: AnyRecord, moment_us: int, offset: int, lost: int = 1) -> None:
        self._troubles.append(
            Trouble(problem, record.collector_id, record.boot, moment_us, lost, record.event_id, offset)
        )
        if problem == "hole":
            self.state.counters["holes"] = self.state.counters.get("holes", 0) + 1
