"""Stage 2: rollups in, findings out. One engine for each partition of iw.rollups, which holds whole tenants (T9).

Delivery: every revision of a finding reaches iw.findings at least once, with the same bytes each time, keyed by its
uid. A partition of iw.events that says nothing holds time back for all tenants: an alarm in the status, never another
finding.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from collector.kafka import ConsumerRecord, KafkaConfig, partition_for
from detectors.config import DetectConfig
from detectors.engine import PartitionMismatch, TenantEngine
from detectors.finding import encode
from detectors.rollup import BadRollup, decode
from detectors.time import SECOND_US
from streams.config import StreamsConfig
from streams.output import Outgoing
from streams.stage import Refused, Stage, run_stage

ROLE: Final = "stage2"


class RollupShard:
    """A `TenantEngine` in the worker's terms."""

    def __init__(self, engine: TenantEngine, finding_partitions: int) -> None:
        self._engine, self._finding_partitions = engine, finding_partitions

    def observe(self, records: Sequence[ConsumerRecord]) -> list[Refused]:
        """Decodes and applies rollups."""
        refused = []
        for record in records:
            try:
                self._engine.observe(decode(record.value or b""))
            except (BadRollup, PartitionMismatch) as error:
                refused.append((record, str(error)))
        return refused

    def take(self) -> list[Outgoing]:
        """Findings, each to the partition of its uid."""
        outgoing = []
        for finding in self._engine.take():
            key = finding.uid.encode()
            outgoing.append(Outgoing(key, encode(finding), partition_for(key, self._finding_partitions)))
        return outgoing

    def snapshot(self) -> bytes:
        """The engine's."""
        return self._engine.snapshot()

    def restore(self, raw: bytes) -> None:
        """The engine's; raises `BadSnapshot`."""
        self._engine.restore(raw)

    def watermark_us(self) -> int | None:
        """The end of the last second judged."""
        through = self._engine.closed_through
        return None if through is None else (through + 1) * SECOND_US

    def counters(self) -> Mapping[str, int]:
        """The engine's."""
        return self._engine.counters


def stage2(kafka: KafkaConfig, detect: DetectConfig, events: int, rollups: int, findings: int) -> Stage:
    """The stage over `rollups` partitions of iw.rollups, which speak of `events` partitions of iw.events."""

    def make_shard(partition: int) -> RollupShard:
        return RollupShard(TenantEngine(detect, partition=partition, partitions=events), findings)

    return Stage(ROLE, kafka.topic("rollups"), rollups, kafka.topic("findings"), make_shard)


def run_stage2(
    kafka: KafkaConfig,
    detect: DetectConfig,
    streams: StreamsConfig,
    *,
    data_dir: Path,
    config_digest: str = "",
    on_serving: Callable[[str], None] | None = None,
) -> None:
    """Runs one worker of stage 2 until SIGTERM or SIGINT; `on_serving` is given the address of its health pages.

    Raises BrokerAway, TopicMismatch, UnknownVersion, StageFailed or OSError, each with one sentence.
    """

    def make(counts: Mapping[str, int]) -> Stage:
        events, rollups, findings = (counts[kafka.topic(name)] for name in ("events", "rollups", "findings"))
        return stage2(kafka, detect, events, rollups, findings)

    run_stage(make, kafka, streams, data_dir=data_dir, config_digest=config_digest, on_serving=on_serving)
