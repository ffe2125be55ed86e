"""Lays the same events out over collectors, lanes, partitions and append times, as collectors and a broker would.

A `Layout` is what a person could have deployed: how many partitions, how many collectors, when the broker was away and
how fast each journal drained after it. `lay_out` gives each partition's log. Seeded, no clock.
"""

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from collector.event import (
    SCHEMA_VERSION,
    AnyRecord,
    AuditEvent,
    Goodbye,
    Heartbeat,
    Hello,
    Tick,
    from_timestamp_us,
    timestamp_us,
)
from detectors.detector import actor

SECOND_US = 1_000_000


@dataclass(frozen=True)
class Logged:
    """One record of a partition's log."""

    record: AnyRecord
    append_ms: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """How the events reach the log."""

    partitions: int = 4
    collectors: int = 1
    heartbeat_ms: int = 250
    outage_s: tuple[int, int] | None = None
    """Seconds from the start between which the broker is away."""
    drain: tuple[int, ...] = (8, 4, 2, 16)
    """Records that collector i sends every 333 ms while it catches up."""
    jitter_ms: int = 20
    idle_s: int = 900
    """How long after the last event the ticks go on, so that every layout ends at the same moment."""
    seed: int = 0


def lay_out(events: Sequence[AuditEvent], layout: Layout) -> list[list[Logged]]:
    """Each partition's log, with hello, heartbeats and goodbye on every lane."""
    begin_us = min(timestamp_us(event.timestamp) for event in events) - SECOND_US
    end_us = max(timestamp_us(event.timestamp) for event in events) + SECOND_US
    logs: list[list[tuple[int, int, AnyRecord]]] = [[] for _ in range(layout.partitions)]
    for collector in range(layout.collectors):
        mine = [event for event in events if zlib.crc32(event.event_id.encode()) % layout.collectors == collector]
        mine.sort(key=lambda event: timestamp_us(event.timestamp))
        for partition in range(layout.partitions):
            part = [event for event in mine if partition_of(event, layout.partitions) == partition]
            records = _lane(part, f"c{collector}", begin_us, end_us, layout)
            logs[partition] += _appended(records, collector, layout, begin_us)
    return [_log(rows, end_us // 1000 + layout.idle_s * 1000) for rows in logs]


def partition_of(event: AuditEvent, partitions: int) -> int:
    """Any stable hash of the key serves here; the collector uses murmur2."""
    return zlib.crc32(actor(event).encode()) % partitions


def _lane(part: list[AuditEvent], name: str, begin_us: int, end_us: int, layout: Layout) -> list[AnyRecord]:
    """The records of one lane, `seq` contiguous, a heartbeat wherever it would be silent."""
    beats = range(begin_us + layout.heartbeat_ms * 1000, end_us, layout.heartbeat_ms * 1000)
    rows: list[tuple[int, str, AuditEvent | None]] = [(moment_us, "", None) for moment_us in beats]
    rows += [(timestamp_us(event.timestamp), event.event_id, event) for event in part]
    rows.sort(key=lambda row: row[:2])
    records: list[AnyRecord] = [Hello(**_common(name, 0, begin_us))]
    for moment_us, _, event in rows:
        seq = len(records)
        if event is None:
            records.append(Heartbeat(**_common(name, seq, moment_us)))
        else:
            records.append(msgspec.structs.replace(event, collector_id=name, boot="b0", seq=seq))
    records.append(Goodbye(**_common(name, len(records), end_us)))
    return records


def _common(name: str, seq: int, moment_us: int) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "event_id": f"{name}-{seq}",
        "timestamp": from_timestamp_us(moment_us),
        "collector_id": name,
        "boot": "b0",
        "seq": seq,
    }


def _appended(
    records: Iterable[AnyRecord], collector: int, layout: Layout, begin_us: int
) -> list[tuple[int, int, AnyRecord]]:
    """When the broker took each record: soon, or, after an outage, as fast as the collector drains."""
    rng = random.Random(layout.seed * 1000 + collector)  # noqa: S311 seeded on purpose
    step_ms = 333 // layout.drain[collector % len(layout.drain)]
    last_ms, rows = 0, []
    for number, record in enumerate(records):
        moment_ms = timestamp_us(record.timestamp) // 1000
        append_ms = moment_ms + rng.randrange(layout.jitter_ms + 1)
        if layout.outage_s is not None:
            away, back = (begin_us // 1000 + second * 1000 for second in layout.outage_s)
            append_ms = back if away <= append_ms < back else append_ms
        last_ms = max(append_ms, last_ms + step_ms if append_ms - moment_ms > 1000 or last_ms > append_ms else last_ms)
        rows.append((last_ms, number, record))
    return rows


def _log(rows: list[tuple[int, int, AnyRecord]], end_ms: int) -> list[Logged]:
    """All lanes in order of append time, then ticks every 5 s while nobody lives, the last one at `end_ms`."""
    rows.sort(key=lambda row: (row[0], row[2].collector_id, row[1]))
    log = [Logged(record, append_ms, offset) for offset, (append_ms, _, record) in enumerate(rows)]
    for number, append_ms in enumerate([*range(log[-1].append_ms + 5_000, end_ms, 5_000), end_ms]):
        common = _common("reader", number, append_ms * 1000)
        log.append(Logged(Tick(**common), append_ms, len(log)))
    return log
