"""`inferwatch backtest --source store`: judges the events in the store again, and gives the same findings.

Promise (b) of docs/time.md made use of: the rows that were neither late, doubled nor quarantined, in order of
(timestamp, event_id), all partitions at once. Each goes to the engine of its own partition with its own offset, so that
a finding's evidence names the same offsets: byte for byte what the stages wrote. The store holds no control records, so
coverage is not told again, and a summary does not name the change of guard, model or adapter before a spike. Rows of
before retention began are gone, and baselines start later then.

Reads only, a page at a time. Memory: both stages and one page.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import numpy as np

from collector.event import SCHEMA_VERSION, Heartbeat, Hello, Record, encode, from_timestamp_us, timestamp_us
from detectors.commands import BadCommand
from detectors.config import DetectConfig, TimeConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from detectors.rollup import Command
from detectors.time import SECOND_US
from sinks.clickhouse.rows import record_of

Query = Callable[[str, Mapping[str, object]], Sequence[Mapping[str, object]]]
"""`sinks.clickhouse.store.Store.query`."""

PAGE_ROWS: Final = 20_000
LANE: Final = "backtest"
AFTER_S: Final = 3_600
"""Without an end, time goes on for so long after the last event."""
AHEAD_US: Final = 60 * SECOND_US
_SOUND: Final = "NOT late AND NOT duplicate AND NOT quarantined"
_PLACE: Final = "toUnixTimestamp64Micro(timestamp), event_id, kafka_partition, kafka_offset"
_PAGE: Final = (  # of constants alone; what varies are its parameters
    f"SELECT * FROM events FINAL WHERE {_SOUND}"  # noqa: S608  # see above
    f" AND ({_PLACE}) > ({{moment:Int64}}, {{event:String}}, {{partition:UInt32}}, {{offset:UInt64}})"
    f" ORDER BY timestamp, event_id, kafka_partition, kafka_offset LIMIT {PAGE_ROWS}"
)


def backtest_store(
    query: Query,
    detect: DetectConfig,
    *,
    topic: str,
    partitions: int,
    commands: Sequence[Command] = (),
    end_us: int | None = None,
) -> Iterator[Finding]:
    """Every revision of every finding that the stored events give, in the order of the seconds judged.

    `topic` and `partitions` are those of iw.events, `commands` those of people in order of append time. Time goes on to
    `end_us`. Blocks while it queries; raises what `query` raises, and `ValueError` for a row of no known partition.
    """
    lanes = [_Lane(detect, topic, partition, partitions) for partition in range(partitions)]
    merged = TenantEngine(detect, partition=0, partitions=partitions)
    waiting = deque(commands)
    last_us = 0
    for page in _pages(query):
        first_us, last_us = _moment(page[0]), _moment(page[-1])
        if page[-1]["kafka_partition"] >= partitions:  # type: ignore[operator]  # an integer in the store's schema
            raise ValueError(f"the store has events of more than the {partitions} partitions of {topic}: name them all")
        for lane in lanes:
            lane.feed([row for row in page if row["kafka_partition"] == lane.partition], first_us, last_us)
        yield from _judged(lanes, merged, waiting, last_us)
    if last_us:
        ended_us = max(end_us if end_us is not None else last_us + AFTER_S * SECOND_US, last_us) + SECOND_US
        for lane in lanes:
            lane.feed([], last_us, ended_us)
        yield from _judged(lanes, merged, waiting, ended_us)


def _judged(
    lanes: Sequence["_Lane"], merged: TenantEngine, waiting: deque[Command], through_us: int
) -> Iterator[Finding]:
    while waiting and waiting[0].append_ms * 1_000 < through_us + AHEAD_US:
        with suppress(BadCommand):  # stage 2 put it among the dead letters
            merged.observe(waiting.popleft())
    for lane in lanes:
        for rollup in lane.engine.take():
            merged.observe(rollup)
    yield from merged.take()


def _pages(query: Query) -> Iterator[Sequence[Mapping[str, object]]]:
    """The sound rows, in order of (timestamp, event_id); each page goes on where the last one ended."""
    after: dict[str, object] = {"moment": -(2**62), "event": "", "partition": 0, "offset": 0}
    while rows := query(_PAGE, after):
        yield rows
        row = rows[-1]
        after = {
            "moment": _moment(row),
            "event": row["event_id"],
            "partition": row["kafka_partition"],
            "offset": row["kafka_offset"],
        }


def _moment(row: Mapping[str, object]) -> int:
    return timestamp_us(row["timestamp"])  # type: ignore[arg-type]  # a DateTime64 comes as an aware datetime


class _Lane:
    """One partition: an engine, and one lane on which its stored events come in order of time."""

    def __init__(self, detect: DetectConfig, topic: str, partition: int, partitions: int) -> None:
        # The rows passed the time rules when they were stored; here only the order counts, and one lane for all.
        config = detect.model_copy(update={"time": TimeConfig(pending_events_max=detect.time.pending_events_max)})
        self.engine = PartitionEngine(config, topic=topic, partition=partition, partitions=partitions)
        self.partition = partition
        self._seq = -1

    def feed(self, rows: Sequence[Mapping[str, object]], first_us: int, last_us: int) -> None:
        """The partition's rows between two moments, and a promise that all through `last_us` is told."""
        raws = [encode(Hello(**self._common("hello", first_us)))] if self._seq < 0 else []
        offsets = [0] * len(raws)
        moments = [first_us] * len(raws)
        for row in rows:
            record = record_of(row)
            self._seq += 1
            placed = msgspec.structs.replace(record, collector_id=LANE, boot=LANE, seq=self._seq)
            raws.append(encode(placed))
            offsets.append(int(row["kafka_offset"]))  # type: ignore[call-overload]  # as above
            moments.append(timestamp_us(record.timestamp))
        raws.append(encode(Heartbeat(**self._common("heartbeat", last_us))))
        offsets.append(0)
        moments.append(last_us)
        # The order of time is not that of offsets, and none is passed over as applied before.
        self.engine.applied_offset = -1
        self.engine.observe_log(raws, np.array(moments, np.int64) // 1_000 + 1, np.array(offsets, np.int64))

    def _common(self, name: str, moment_us: int) -> dict[str, Any]:
        self._seq += 1
        common = Record(
            schema_version=SCHEMA_VERSION,
            event_id=f"{name}-{self._seq}",
            timestamp=from_timestamp_us(moment_us),
            collector_id=LANE,
            boot=LANE,
            seq=self._seq,
        )
        return msgspec.structs.asdict(common)
