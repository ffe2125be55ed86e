"""Stage 2 without Kafka or Faust: rollups of all partitions in, findings out. See `detectors/engine.py`."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
import structlog
from msgspec import Struct

from detectors.catalogue import cards, enabled
from detectors.config import DetectConfig, config_digest
from detectors.detector import Alarm, line_of
from detectors.finding import Finding
from detectors.lifecycle import Lifecycle
from detectors.rollup import Cell, Command, Marker, Partial, Rollup, Signal
from detectors.snapshot import SNAPSHOT_VERSION, BadSnapshot, check
from detectors.time import SECOND_US

log = structlog.get_logger(__name__)

_Sortable = TypeVar("_Sortable", bound=tuple[object, ...])


class PartitionMismatch(ValueError):
    """A marker tells of another number of partitions than the engine was made for."""


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


class TenantEngine:
    """Stage 2, one per partition of iw.rollups; `partitions` is that of iw.events."""

    def __init__(self, config: DetectConfig, *, partition: int, partitions: int) -> None:
        self._config = config
        self._partition = partition
        self._partitions = partitions
        all_cards = cards()
        digest = config_digest(config, {name: card.version for name, card in all_cards.items()})
        self._halves = {detector.card.name: detector.stage_two(config) for detector in enabled(config)}
        self._lifecycle = Lifecycle(config.lifecycle, all_cards, digest, config.commands)
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

    def applied(self, partition: int) -> tuple[int, int] | None:
        """(offset, append time in ms) of the last record of that partition of iw.commands that was observed."""
        return self._lifecycle.applied(partition)

    def observe(self, rollup: Rollup | Command) -> None:
        """One rollup. Raises `PartitionMismatch` for a marker of another layout, `BadCommand` for a command refused."""
        if isinstance(rollup, Marker):
            self._mark(rollup)
            return
        if isinstance(rollup, Command):
            self._lifecycle.command(
                rollup, 0 if self._closed_through is None else (self._closed_through + 1) * SECOND_US
            )
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
        self._raise([said for name, half in self._halves.items() for said in self._asked(name, half.advance, until_s)])
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
            cells.setdefault((rollup.tenant, rollup.key), Cell()).absorb(rollup)
        alarms: list[tuple[str, Alarm]] = []
        for name, half in self._halves.items():
            rows = [(*key, cell) for key, cell in sorted(merged.get(name, {}).items(), key=_by_key)]
            if rows:
                alarms += self._asked(name, half.second, second, rows)
            for signal in signals:
                if signal.kind == name:
                    alarms += self._asked(name, half.signal, signal)
        self._raise(alarms)

    def _asked(self, name: str, judge: Callable[..., Iterable[Alarm]], *arguments: object) -> list[tuple[str, Alarm]]:
        """What a detector says. A rollup that makes no sense, or a fault of its own, stops nobody else, and is told."""
        try:
            return [(name, alarm) for alarm in judge(*arguments)]
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            self._counters["failed_judgements"] = self._counters.get("failed_judgements", 0) + 1
            log.warning("a detector failed", detector=name, error=type(error).__name__, at=line_of(error))
            return []

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
        check(state, self._partition, self._partitions)
        try:
            self._lifecycle.restore(state.lifecycle)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadSnapshot(f"no snapshot of this lifecycle: {type(error).__name__}") from None
        self._closed_through, self._markers, self._counters = state.closed_through, state.markers, state.counters
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


_encoder = msgspec.msgpack.Encoder()
_tenant_decoder = msgspec.msgpack.Decoder(_TenantState)
