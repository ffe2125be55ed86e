"""Stage 1: events in, rollups out. One engine for each partition of iw.events; rules T4 to T10.

Delivery: every second's rollups reach iw.rollups at least once, with the same bytes each time. Order: per partition of
iw.rollups, all partials of a second come before the marker that closes it.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from collector.event import EVENT_BYTES_MAX, SCHEMA_VERSION, Tick, encode
from collector.kafka import ConsumerRecord, KafkaConfig, partition_for
from collector.uuid7 import uuid7
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine
from detectors.rollup import Marker, Signal
from detectors.rollup import encode as encode_rollup
from detectors.time import NEVER
from streams.batch import Fetched
from streams.config import StreamsConfig
from streams.health import process_id
from streams.output import Outgoing
from streams.stage import Refused, Stage, run_stage

ROLE: Final = "stage1"


class EventShard:
    """A `PartitionEngine` in the worker's terms."""

    def __init__(self, engine: PartitionEngine, rollup_partitions: int) -> None:
        self._engine, self._rollup_partitions = engine, rollup_partitions

    def observe(self, records: Sequence[ConsumerRecord]) -> list[Refused]:
        """Decodes and applies records of iw.events."""
        if not records:
            return []
        fetched = Fetched.of(records)
        raws = [b"" if raw is None or len(raw) > EVENT_BYTES_MAX else raw for raw in fetched.values]
        refused = self._engine.observe_log(raws, fetched.append_ms, fetched.offsets)
        return [(fetched[index], _unfit(fetched.values[index]) or why) for index, why in refused]

    def take(self) -> list[Outgoing]:
        """Rollups to the partition of their tenant; markers, and changes that concern all tenants, to every one."""
        outgoing = []
        for rollup in self._engine.take():
            value = encode_rollup(rollup)
            if isinstance(rollup, Marker):
                key, everywhere = f"{rollup.topic}-{rollup.partition}".encode(), True
            else:
                key = rollup.tenant.encode()
                everywhere = isinstance(rollup, Signal) and rollup.entity.kind == "collector" and not rollup.tenant
            home = partition_for(key, self._rollup_partitions)
            partitions = range(self._rollup_partitions) if everywhere else (home,)
            outgoing += [Outgoing(key, value, partition) for partition in partitions]
        return outgoing

    def snapshot(self) -> bytes:
        """The engine's."""
        return self._engine.snapshot()

    def restore(self, raw: bytes) -> None:
        """The engine's; raises `BadSnapshot`."""
        self._engine.restore(raw)

    def watermark_us(self) -> int | None:
        """W of the partition (T6)."""
        watermark = self._engine.watermark_us
        return None if watermark == NEVER else watermark

    def counters(self) -> Mapping[str, int]:
        """The engine's."""
        return self._engine.counters


def _unfit(raw: bytes | None) -> str:
    """Why a value can't even be looked at; empty where it can."""
    if raw is None:
        return "the record has no value"
    if len(raw) > EVENT_BYTES_MAX:
        return f"a record of {len(raw)} bytes is over the {EVENT_BYTES_MAX} allowed"
    return ""


class Ticker:
    """Makes the records that an idle partition's owner appends."""

    def __init__(self, writer: str) -> None:
        self._writer, self._boot, self._seq = writer, uuid7(), -1

    def __call__(self, partition: int) -> Outgoing:
        """The next tick, for `partition`."""
        self._seq += 1
        tick = Tick(
            schema_version=SCHEMA_VERSION,
            event_id=uuid7(),
            timestamp=datetime.now(UTC),
            collector_id=self._writer,
            boot=self._boot,
            seq=self._seq,
        )
        return Outgoing(b"tick", encode(tick), partition)


def stage1(kafka: KafkaConfig, detect: DetectConfig, events: int, rollups: int) -> Stage:
    """The stage over `events` partitions of iw.events and `rollups` of iw.rollups."""
    topic = kafka.topic("events")

    def make_shard(partition: int) -> EventShard:
        return EventShard(PartitionEngine(detect, topic=topic, partition=partition, partitions=events), rollups)

    return Stage(ROLE, topic, events, kafka.topic("rollups"), make_shard, Ticker(process_id(ROLE)))


def run_stage1(
    kafka: KafkaConfig,
    detect: DetectConfig,
    streams: StreamsConfig,
    *,
    data_dir: Path,
    config_digest: str = "",
    on_serving: Callable[[str], None] | None = None,
) -> None:
    """Runs one worker of stage 1 until SIGTERM or SIGINT; `on_serving` is given the address of its health pages.

    Raises BrokerAway, TopicMismatch, StageFailed or OSError, each with one sentence.
    """

    def make(counts: Mapping[str, int]) -> Stage:
        return stage1(kafka, detect, counts[kafka.topic("events")], counts[kafka.topic("rollups")])

    run_stage(make, kafka, streams, data_dir=data_dir, config_digest=config_digest, on_serving=on_serving)
