"""The two stages of detection, without Kafka or Faust: events to rollups, rollups to findings.

Guarantees. (a) The same partition log gives the same rollups, and these the same findings, byte for byte, whatever the
batches, snapshots and restores. (b) The same events over other partitions, or interleaved otherwise, give the same
findings but for offsets, as long as no event was late, no table was full, and lanes had no holes of their own.

Delivery: `snapshot` holds the last offset applied and everything not yet taken, so reading again from an older offset
changes nothing (`observe` answers "replayed"). What a crash loses: nothing, if outputs were acknowledged before the
snapshot was kept and reading goes on from its offset.
"""

from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from collector.event import AnyRecord
from detectors.catalogue import cards, enabled
from detectors.config import DetectConfig, config_digest
from detectors.coverage import CoverageOne
from detectors.detector import Alarm, Cells, printable
from detectors.finding import Finding
from detectors.lifecycle import Lifecycle
from detectors.rollup import Cell, Marker, Partial, Rollup, Signal
from detectors.time import SECOND_US, ClockState, Flag, PartitionClock

SNAPSHOT_VERSION: Final = 1
_Sortable = TypeVar("_Sortable", bound=tuple[object, ...])


class BadSnapshot(ValueError):
    """The bytes are no snapshot of this engine: another version, partition, or damaged."""


class PartitionMismatch(ValueError):
    """A marker tells of another number of partitions than the engine was made for."""


class _PartitionState(Struct, array_like=True):
    version: int
    partition: int
    partitions: int
    applied_offset: int
    told_through: int | None
    taken_through: int | None
    clock: ClockState
    halves: dict[str, bytes]
    coverage: bytes
    ready: list[Rollup]


class _TenantState(Struct, array_like=True):
    version: int
    partition: int
    partitions: int
    closed_through: int | None
    markers: dict[int, int]
    topics: dict[int, str]
    pending: list[Rollup]
    halves: dict[str, bytes]
    lifecycle: bytes
    counters: dict[str, int]
    ready: list[Finding]


class PartitionEngine:
    """Stage 1, one per partition of iw.events."""

    def __init__(self, config: DetectConfig, *, topic: str, partition: int, partitions: int) -> None:
        self._config = config
        self._topic = topic
        self._partition = partition
        self._partitions = partitions
        self._clock = PartitionClock(config.time)
        self._halves = {
            detector.card.name: detector.stage_one(config)
            for detector in enabled(config)
            if detector.stage_one is not None
        }
        self._coverage = CoverageOne(config, partition)
        self._cells = Cells(partition)
        self._ready: list[Rollup] = []
        self._told_through: int | None = None
        """The rollups made so far go through this second."""
        self._taken_through: int | None = None
        self.applied_offset = -1

    @property
    def watermark_us(self) -> int:
        """The partition's watermark, µs; `detectors.time.NEVER` before the first promise."""
        return self._clock.watermark_us

    @property
    def counters(self) -> dict[str, int]:
        """What was counted, by name; a detector's own under DETECTOR.NAME."""
        found = dict(self._clock.counters)
        for name, half in self._halves.items():
            found |= {f"{name}.{counter}": value for counter, value in half.counters.items()}
        return found | {f"coverage.{counter}": value for counter, value in self._coverage.counters.items()}

    def observe(self, record: AnyRecord, *, append_ms: int, offset: int) -> Flag:
        """One record of the log, in order of offset. `append_ms` is the broker's append time."""
        if offset <= self.applied_offset:
            return "replayed"
        self.applied_offset = offset
        record = printable(record)
        flag = self._clock.observe(record, append_ms=append_ms, offset=offset)
        for trouble in self._clock.troubles():
            self._coverage.trouble(trouble)
        closed_through = self._clock.state.closed_through
        if closed_through is not None and closed_through != self._told_through:
            self._close(closed_through)
        return flag

    def take(self) -> list[Rollup]:
        """What the seconds closed since the last call gave, a marker last; empty where none closed."""
        if self._told_through is None or self._told_through == self._taken_through:
            return []
        ready, self._ready = self._ready, []
        self._taken_through = self._told_through
        return [*ready, Marker(self._topic, self._partition, self._partitions, self._told_through)]

    def _close(self, through: int) -> None:
        for second, events in self._clock.closed():
            for taken in events:
                for half in self._halves.values():
                    half.event(taken, self._cells)
            self._flush(second)
        self._ready.extend(self._coverage.close(through))
        self._told_through = through

    def _flush(self, second: int) -> None:
        limit = self._config.contributors_max
        for name, cell in self._cells.drain():
            self._ready.append(cell.partial(self._partition, second, name, limit))
        for half in self._halves.values():
            self._ready.extend(half.close(second))

    def snapshot(self) -> bytes:
        """Everything, as MessagePack. Taken between records."""
        state = _PartitionState(
            version=SNAPSHOT_VERSION,
            partition=self._partition,
            partitions=self._partitions,
            applied_offset=self.applied_offset,
            told_through=self._told_through,
            taken_through=self._taken_through,
            clock=self._clock.state,
            halves={name: half.snapshot() for name, half in self._halves.items()},
            coverage=self._coverage.snapshot(),
            ready=self._ready,
        )
        return _encoder.encode(state)

    def restore(self, raw: bytes) -> None:
        """Goes on from a snapshot of the same partition. Raises `BadSnapshot`."""
        try:
            state = _partition_decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadSnapshot(f"no snapshot of stage 1: {type(error).__name__}") from None
        _check(state, self._partition, self._partitions)
        self.applied_offset = state.applied_offset
        self._told_through = state.told_through
        self._taken_through = state.taken_through
        self._clock.restore(state.clock)
        self._coverage.restore(state.coverage)
        self._ready = state.ready
        for name, half in self._halves.items():
            if name in state.halves:
                half.restore(state.halves[name])


class TenantEngine:
    """Stage 2, one per partition of iw.rollups; `partitions` is that of iw.events."""

    def __init__(self, config: DetectConfig, *, partition: int, partitions: int) -> None:
        self._config = config
        self._partition = partition
        self._partitions = partitions
        all_cards = cards()
        digest = config_digest(config, {name: card.version for name, card in all_cards.items()})
        self._halves = {detector.card.name: detector.stage_two(config) for detector in enabled(config)}
        self._lifecycle = Lifecycle(config.lifecycle, all_cards, digest)
        self._markers: dict[int, int] = {}
        self._pending: dict[int, dict[tuple[str, str, str, str, int], Partial | Signal]] = {}
        self._waiting = 0
        self._ready: list[Finding] = []
        self._closed_through: int | None = None
        self._counters = {"late_rollups": 0, "forced_seconds": 0, "seconds": 0}

    @property
    def closed_through(self) -> int | None:
        """The last second judged; None before all partitions have spoken."""
        return self._closed_through

    @property
    def waiting_for(self) -> list[int]:
        """Partitions of iw.events that hold time back: not yet heard, or at the least marker."""
        missing = [partition for partition in range(self._partitions) if partition not in self._markers]
        if missing or not self._markers:
            return missing
        least = min(self._markers.values())
        return sorted(partition for partition, through in self._markers.items() if through == least)

    @property
    def counters(self) -> dict[str, int]:
        """What was counted, by name; a detector's own under DETECTOR.NAME."""
        found = self._counters | {"waiting": self._waiting, "open_episodes": self._lifecycle.open_episodes}
        found |= {f"lifecycle.{name}": value for name, value in self._lifecycle.counters.items()}
        for name, half in self._halves.items():
            found |= {f"{name}.{counter}": value for counter, value in half.counters.items()}
        return found

    def observe(self, rollup: Rollup) -> None:
        """One rollup. Raises `PartitionMismatch` for a marker of another layout."""
        if isinstance(rollup, Marker):
            self._mark(rollup)
            return
        if self._closed_through is not None and rollup.second <= self._closed_through:
            self._counters["late_rollups"] += 1
            return
        seconds = self._pending.setdefault(rollup.second, {})
        key = (type(rollup).__name__, rollup.kind, rollup.tenant, rollup.key, rollup.partition)
        self._waiting += key not in seconds
        seconds[key] = rollup
        if self._waiting > self._config.pending_rollups_max:
            self._counters["forced_seconds"] += 1
            self._close(min(self._pending))

    def take(self) -> list[Finding]:
        """The findings since the last call, in order of (time, detector, uid, revision)."""
        ready, self._ready = self._ready, []
        ready.sort(key=lambda finding: (finding.updated_us, finding.detector, finding.uid, finding.revision))
        return ready

    def _mark(self, marker: Marker) -> None:
        if marker.partitions != self._partitions or not 0 <= marker.partition < self._partitions:
            raise PartitionMismatch(
                f"a marker of partition {marker.partition} of {marker.partitions} came, but stage 2 reads"
                f" {self._partitions} partitions: drain and restart it after changing the topic"
            )
        self._lifecycle.topics[marker.partition] = marker.topic
        self._markers[marker.partition] = max(
            self._markers.get(marker.partition, marker.closed_through), marker.closed_through
        )
        if len(self._markers) == self._partitions:
            self._close(min(self._markers.values()))

    def _close(self, through: int) -> None:
        """Judges every waiting second up to `through`, doing first what was due before it."""
        if self._closed_through is not None and through <= self._closed_through:
            return
        for second in sorted(waiting for waiting in self._pending if waiting <= through):
            self._advance(second)
            self._judge(second)
        self._advance(through + 1)
        self._closed_through = through

    def _advance(self, until_s: int) -> None:
        self._raise([(name, alarm) for name, half in self._halves.items() for alarm in half.advance(until_s)])
        self._ready.extend(self._lifecycle.advance(until_s * SECOND_US))

    def _judge(self, second: int) -> None:
        rollups = self._pending.pop(second)
        self._waiting -= len(rollups)
        self._counters["seconds"] += 1
        merged: dict[str, dict[tuple[str, str], Cell]] = {}
        signals: list[Signal] = []
        for _, rollup in sorted(rollups.items(), key=_by_key):
            if isinstance(rollup, Signal):
                signals.append(rollup)
                continue
            cells = merged.setdefault(rollup.kind, {})
            cells.setdefault((rollup.tenant, rollup.key), Cell()).absorb(rollup, self._config.contributors_max)
        alarms: list[tuple[str, Alarm]] = []
        for name, half in self._halves.items():
            rows = [(*key, cell) for key, cell in sorted(merged.get(name, {}).items(), key=_by_key)]
            if rows:
                alarms.extend((name, alarm) for alarm in half.second(second, rows))
            for signal in signals:
                if signal.kind == name:
                    alarms.extend((name, alarm) for alarm in half.signal(signal))
        self._raise(alarms)

    def _raise(self, alarms: list[tuple[str, Alarm]]) -> None:
        """In order of time, and after what was due before, so that one long step says the same as many short ones."""
        alarms.sort(key=lambda raised: (raised[1].at_us, raised[0], raised[1].tenant, raised[1].entity.id))
        for name, alarm in alarms:
            self._ready.extend(self._lifecycle.advance(alarm.at_us - 1))
            self._ready.extend(self._lifecycle.alarm(name, alarm))

    def snapshot(self) -> bytes:
        """Everything, as MessagePack. Taken between rollups."""
        state = _TenantState(
            version=SNAPSHOT_VERSION,
            partition=self._partition,
            partitions=self._partitions,
            closed_through=self._closed_through,
            markers=self._markers,
            topics=self._lifecycle.topics,
            pending=[rollup for second in sorted(self._pending) for rollup in self._pending[second].values()],
            halves={name: half.snapshot() for name, half in self._halves.items()},
            lifecycle=self._lifecycle.snapshot(),
            counters=self._counters,
            ready=self._ready,
        )
        return _encoder.encode(state)

    def restore(self, raw: bytes) -> None:
        """Goes on from a snapshot of the same partition. Raises `BadSnapshot`."""
        try:
            state = _tenant_decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadSnapshot(f"no snapshot of stage 2: {type(error).__name__}") from None
        _check(state, self._partition, self._partitions)
        self._closed_through, self._markers, self._counters = state.closed_through, state.markers, state.counters
        self._lifecycle.restore(state.lifecycle)
        self._lifecycle.topics = state.topics
        self._ready = state.ready
        self._pending = {}
        self._waiting = 0
        for name, half in self._halves.items():
            if name in state.halves:
                half.restore(state.halves[name])
        for rollup in state.pending:
            self.observe(rollup)


def _by_key(item: tuple[_Sortable, object]) -> _Sortable:
    return item[0]


def _check(state: _PartitionState | _TenantState, partition: int, partitions: int) -> None:
    if state.version != SNAPSHOT_VERSION:
        raise BadSnapshot(
            f"snapshot version {state.version}, wanted {SNAPSHOT_VERSION}: rebuild the state from the log"
        )
    if (state.partition, state.partitions) != (partition, partitions):
        raise BadSnapshot(
            f"snapshot of partition {state.partition} of {state.partitions}, wanted {partition} of {partitions}"
        )


_encoder = msgspec.msgpack.Encoder()
_partition_decoder = msgspec.msgpack.Decoder(_PartitionState)
_tenant_decoder = msgspec.msgpack.Decoder(_TenantState)
