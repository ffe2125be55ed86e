"""Stage 1 without Kafka or Faust: the log of one partition of iw.events in, rollups out. See `detectors/engine.py`."""

import msgspec
from msgspec import Struct

from collector.event import AnyRecord
from detectors.catalogue import enabled
from detectors.config import DetectConfig
from detectors.coverage import CoverageOne
from detectors.detector import Cells, printable
from detectors.rollup import Marker, Rollup
from detectors.snapshot import SNAPSHOT_VERSION, BadSnapshot, check
from detectors.time import ClockState, Flag, PartitionClock


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
        check(state, self._partition, self._partitions)
        self.applied_offset = state.applied_offset
        self._told_through = state.told_through
        self._taken_through = state.taken_through
        self._clock.restore(state.clock)
        self._coverage.restore(state.coverage)
        self._ready = state.ready
        for name, half in self._halves.items():
            if name in state.halves:
                half.restore(state.halves[name])


_encoder = msgspec.msgpack.Encoder()
_partition_decoder = msgspec.msgpack.Decoder(_PartitionState)
