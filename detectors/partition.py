"""Stage 1 without Kafka or Faust: the log of one partition of iw.events in, rollups out. See `detectors/engine.py`.

Records are taken a thousand at a time: decoded, taken apart into columns, judged by the clock as one run where they are
ordinary and one by one where not. Detectors see whole closed seconds when `take` or `snapshot` is called. None of that
shows: any cut of the log gives the same rollups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np
import structlog
from msgspec import Struct

from collector.event import (
    AnyRecord,
    AuditEvent,
    Change,
    Goodbye,
    Heartbeat,
    Hello,
    Rejection,
    Tick,
    decode_all,
    encode,
    timestamp_us,
)
from detectors.catalogue import enabled
from detectors.chunk import Chunk, in_order
from detectors.columns import Columns, Ints, columns_of, joined, paired, picked
from detectors.config import DetectConfig
from detectors.coverage import CoverageOne
from detectors.detector import Detector, clean, line_of, printable
from detectors.finding import Entity
from detectors.registry import Registry
from detectors.rollup import Marker, Partial, Rollup, Signal
from detectors.runs import Run
from detectors.snapshot import SNAPSHOT_VERSION, BadSnapshot, check
from detectors.time import NEVER, SECOND_US, ClockState, Flag, PartitionClock

log = structlog.get_logger(__name__)

PIECE_RECORDS: Final = 1_024
"""Decoded at a time: few enough to stay in the processor's cache until they are columns."""
SPECIAL: Final = (Hello, Goodbye, Tick, Change)
TOLD_OF_CHANGES: Final = ("block_rate",)
"""Detectors whose second half is sent change events, as signals."""
KEYS: Final = frozenset(("api_keys", "token_keys", "proxy_secret", "signing_key"))
"""Subjects of changes in who may ask or who signs: no guard blocks more for them, and they come every day."""
EVENTS: Final = frozenset((AuditEvent, Rejection))
SELF_TEST: Final = "selftest"
"""The operation of the request that a collector sends itself at its start: it has its place in the lane, and is no
user's, so no detector is given it."""


class _PartitionState(Struct, array_like=True):
    version: int
    partition: int
    partitions: int
    applied_offset: int
    told_through: int | None
    taken_through: int | None
    clock: ClockState
    registry: bytes
    halves: dict[str, bytes]
    coverage: bytes
    ready: list[Rollup]
    waiting: list[tuple[int, int, bytes]]
    """(offset, moment, event as JSON)."""
    failures: dict[str, int]
    changes: list[Signal] = []


@dataclass(slots=True)
class _Piece:
    """Decoded records that follow each other, with what the broker says of them."""

    records: list[AnyRecord]
    raws: list[bytes]
    append_ms: Ints
    offsets: Ints

    def cut(self, begin: int, end: int) -> "_Piece":
        return _Piece(self.records[begin:end], self.raws[begin:end], self.append_ms[begin:end], self.offsets[begin:end])


class PartitionEngine:
    """Stage 1, one per partition of iw.events."""

    def __init__(
        self,
        config: DetectConfig,
        *,
        topic: str,
        partition: int,
        partitions: int,
        detectors: Sequence[Detector] | None = None,
    ) -> None:
        """`detectors`: those of the catalogue that the config has switched on, unless others are given."""
        self._topic = topic
        self._partition = partition
        self._partitions = partitions
        self._clock = PartitionClock(config.time)
        self._registry = Registry(config.entities_max)
        chosen = enabled(config) if detectors is None else detectors
        self._halves = {
            detector.card.name: detector.stage_one(config, self._registry)
            for detector in chosen
            if detector.stage_one is not None
        }
        self._reads = frozenset[str]().union(*(detector.reads for detector in chosen))
        self._coverage = CoverageOne(config, partition)
        self._waiting: list[Columns] = []
        self._ready: list[Rollup] = []
        self._changes: list[Signal] = []
        self._told_through: int | None = None
        """The rollups made so far go through this second."""
        self._taken_through: int | None = None
        self._failures: dict[str, int] = {}
        self.applied_offset = -1

    @property
    def watermark_us(self) -> int:
        """The partition's watermark, µs; `detectors.time.NEVER` before the first promise."""
        return self._clock.watermark_us

    @property
    def counters(self) -> dict[str, int]:
        """What was counted, by name; a detector's own under DETECTOR.NAME."""
        found = self._clock.counters | self._failures
        found |= {f"entities.{name}": value for name, value in self._registry.counters.items()}
        found["entities.live"] = self._registry.live
        for name, half in self._halves.items():
            found |= {f"{name}.{counter}": value for counter, value in half.counters.items()}
        return found | {f"coverage.{counter}": value for counter, value in self._coverage.counters.items()}

    def observe_log(self, raws: Sequence[bytes], append_ms: Ints, offsets: Ints) -> list[tuple[int, str]]:
        """Records of the log as they came, in order of offset; what was applied before is passed over.

        `append_ms` is the broker's append time. Returns the indices of what is no record, and why.
        """
        begin = int(np.searchsorted(offsets, self.applied_offset, side="right"))
        refused: list[tuple[int, str]] = []
        for first in range(begin, len(raws), PIECE_RECORDS):
            last = min(first + PIECE_RECORDS, len(raws))
            piece = _Piece([], list(raws[first:last]), append_ms[first:last], offsets[first:last])
            piece.records, bad = decode_all(piece.raws)
            if bad:
                refused += [(first + index, str(why)) for index, why in bad.items()]
                good = np.delete(np.arange(last - first), list(bad))
                piece.raws = [piece.raws[index] for index in good.tolist()]
                piece.append_ms, piece.offsets = piece.append_ms[good], piece.offsets[good]
            self._piece(piece)
            self.applied_offset = int(offsets[last - 1])
        return refused

    def observe(self, record: AnyRecord, *, append_ms: int, offset: int) -> Flag:
        """One record of the log, in order of offset. `append_ms` is the broker's append time."""
        if offset <= self.applied_offset:
            return "replayed"
        self.applied_offset = offset
        record = printable(record)
        return self._one(record, encode(record), append_ms, offset)

    def _piece(self, piece: _Piece) -> None:
        text = b"".join(piece.raws)
        if not text.isascii() or b"\\" in text or b"\x7f" in text:
            # Only then can a name hold a character that does not print.
            cleaned = [printable(record) for record in piece.records]
            for index, (record, clean) in enumerate(zip(piece.records, cleaned, strict=True)):
                if record is not clean:
                    piece.records[index], piece.raws[index] = clean, encode(clean)
        types = set(map(type, piece.records))
        if types <= EVENTS:
            self._run(piece, types)
            return
        special = [
            -1,
            *(
                index
                for index, record in enumerate(piece.records)
                if type(record) not in EVENTS
                and (isinstance(record, SPECIAL) or (isinstance(record, Heartbeat) and self._coverage.counts(record)))
            ),
            len(piece.records),
        ]
        for before, after in pairwise(special):
            if before >= 0:
                self._one(
                    piece.records[before], piece.raws[before], int(piece.append_ms[before]), int(piece.offsets[before])
                )
            if after - before > 1:
                self._run(piece.cut(before + 1, after), types)

    def _run(self, piece: _Piece, types: set[type]) -> None:
        """Records without a special one among them: at once where the clock can, else one by one."""
        records = piece.records
        if not records:
            return
        event = np.ones(len(records), bool)
        if not types <= EVENTS:
            event = np.array([isinstance(record, AuditEvent) for record in records])
        moment_us = _moments(records)
        lane, pairs = paired([record.collector_id for record in records], [record.boot for record in records])
        lanes = [f"{collector}\n{boot}" for collector, boot in pairs]
        seq = np.array([record.seq for record in records], np.int64)
        judged, closed = self._clock.observe_run(Run(lane, lanes, seq, moment_us, event, piece.append_ms))
        if not judged:
            for index, record in enumerate(records):
                self._one(record, piece.raws[index], int(piece.append_ms[index]), int(piece.offsets[index]))
            return
        tested = [
            at for at, record in enumerate(records) if type(record) is AuditEvent and record.operation == SELF_TEST
        ]
        if event.all() and not tested:
            self._waiting.append(columns_of(records, piece.raws, piece.offsets, moment_us, self._reads))  # type: ignore[arg-type]
        else:
            event[tested] = False
            mine = np.flatnonzero(event)
            events = [records[index] for index in mine.tolist()]
            raws = [piece.raws[index] for index in mine.tolist()]
            if events:
                self._waiting.append(columns_of(events, raws, piece.offsets[mine], moment_us[mine], self._reads))  # type: ignore[arg-type]
        if closed is not None:
            self._closed(closed)

    def _one(self, record: AnyRecord, raw: bytes, append_ms: int, offset: int) -> Flag:
        before = self._clock.state.closed_through
        flag = self._clock.observe(record, append_ms=append_ms, offset=offset)
        if flag == "taken" and isinstance(record, AuditEvent) and record.operation != SELF_TEST:
            moment_us = np.array([timestamp_us(record.timestamp)], np.int64)
            self._waiting.append(columns_of([record], [raw], np.array([offset]), moment_us, self._reads))
        if flag == "control" and isinstance(record, Change):
            self._changes += self._changed(record, offset, before)
        if flag == "control" and isinstance(record, Heartbeat) and self._coverage.counts(record):
            self._coverage.heartbeat(record, offset)
        for trouble in self._clock.troubles():
            self._coverage.trouble(trouble)
        closed = self._clock.state.closed_through
        if closed is not None and closed != before:
            self._closed(closed)
        return flag

    def _changed(self, change: Change, offset: int, closed_through: int | None) -> list[Signal]:
        """A change event for stage 2, told when its second closes; of one that is closed already, the next."""
        if change.subject in KEYS:
            return []
        moment_us = timestamp_us(change.timestamp)
        second = moment_us // SECOND_US
        if closed_through is not None:
            second = max(second, closed_through + 1)
        names = (change.subject, change.before, change.after)
        return [
            Signal(
                partition=self._partition,
                second=second,
                tenant=clean(change.tenant),
                kind=detector,
                key="\n".join(map(clean, names)),
                entity=Entity(kind="collector", id=change.collector_id),
                model="",
                first_seen_us=moment_us,
                last_seen_us=moment_us,
                observed_milli=0,
                baseline_milli=0,
                counts={},
                samples=[(moment_us, change.event_id)],
                first_offset=offset,
                last_offset=offset,
            )
            for detector in TOLD_OF_CHANGES
            if detector in self._halves
        ]

    def _closed(self, through: int) -> None:
        """What the lanes did wrong is told under the second that closed next, so it can't wait for `take`."""
        self._ready.extend(self._coverage.close(through))

    def take(self) -> list[Rollup]:
        """What the seconds closed since the last call gave, a marker last; empty where none closed."""
        self._judge()
        if self._told_through is None or self._told_through == self._taken_through:
            return []
        ready, self._ready = self._ready, []
        self._taken_through = self._told_through
        return [*ready, Marker(self._topic, self._partition, self._partitions, self._told_through)]

    def _judge(self) -> None:
        """Hands closed seconds to the detectors."""
        through = self._clock.state.closed_through
        if through is None or through == self._told_through:
            return
        self._told_through = through
        begin = len(self._ready)
        due_changes = [signal for signal in self._changes if signal.second <= through]
        self._ready.extend(due_changes)
        self._changes = [signal for signal in self._changes if signal.second > through]
        if self._waiting:
            columns = joined(self._waiting)
            due = columns.moment_us < (through + 1) * SECOND_US
            self._waiting = [] if due.all() else [picked(columns, np.flatnonzero(~due))]
            if due.any():
                self._tell(in_order(columns, np.flatnonzero(due)))
        if due_changes:
            self._ready[begin:] = sorted(self._ready[begin:], key=_place)

    def _tell(self, columns: Columns) -> None:
        if self._registry.sure_of_room(len(columns)):
            self._detect(columns)
            return
        seconds = columns.moment_us // SECOND_US
        cuts = [0, *(np.flatnonzero(np.diff(seconds)) + 1).tolist(), len(columns)]
        for begin, end in pairwise(cuts):
            self._detect(picked(columns, np.arange(begin, end)))

    def _detect(self, columns: Columns) -> None:
        chunk = Chunk(columns, self._partition, self._registry)
        told: list[Rollup] = []
        for name, half in self._halves.items():
            try:
                told.extend(half.events(chunk))
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                # A fault of one detector is its own: the others go on, and it is told.
                counter = f"{name}.failed_chunks"
                self._failures[counter] = self._failures.get(counter, 0) + 1
                log.warning("a detector failed", detector=name, error=type(error).__name__, at=line_of(error))
        told.sort(key=_place)
        self._ready.extend(told)

    def snapshot(self) -> bytes:
        """Everything, as MessagePack. Taken between records."""
        self._judge()
        state = _PartitionState(
            version=SNAPSHOT_VERSION,
            partition=self._partition,
            partitions=self._partitions,
            applied_offset=self.applied_offset,
            told_through=self._told_through,
            taken_through=self._taken_through,
            clock=self._clock.state,
            registry=self._registry.dump(),
            halves={name: half.snapshot() for name, half in self._halves.items()},
            coverage=self._coverage.snapshot(),
            ready=self._ready,
            waiting=[
                row
                for piece in self._waiting
                for row in zip(piece.offset.tolist(), piece.moment_us.tolist(), piece.raws, strict=True)
            ],
            failures=self._failures,
            changes=self._changes,
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
        self._registry.load(state.registry)
        self._coverage.restore(state.coverage)
        self._ready, self._failures, self._changes = state.ready, state.failures, state.changes
        for name, half in self._halves.items():
            if name in state.halves:
                half.restore(state.halves[name])
        self._waiting = []
        if state.waiting:
            offsets, moments, raws = zip(*state.waiting, strict=True)
            events = [event for event in decode_all(raws)[0] if isinstance(event, AuditEvent)]
            self._waiting = [columns_of(events, list(raws), np.array(offsets), np.array(moments), self._reads)]


def _moments(records: Sequence[AnyRecord]) -> Ints:
    """Timestamps in µs. A float is exact to the µs until 2038; later ones are taken one by one."""
    seconds = np.array([record.timestamp.timestamp() for record in records])
    if seconds.min() < 0 or seconds.max() >= 2**31:
        return np.array([timestamp_us(record.timestamp) for record in records], np.int64)
    return np.rint(seconds * 1e6).astype(np.int64)


def _place(rollup: Rollup) -> tuple[int, bool, str, str, str]:
    """By second, partials first, then by whose and what: the order does not depend on the cut."""
    if isinstance(rollup, Marker):
        return NEVER, True, "", "", ""
    return rollup.second, not isinstance(rollup, Partial), rollup.tenant, rollup.kind, rollup.key


_encoder = msgspec.msgpack.Encoder()
_partition_decoder = msgspec.msgpack.Decoder(_PartitionState)
