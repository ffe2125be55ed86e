"""Stage 2: rollups in, findings out. One engine for each partition of iw.rollups, which holds whole tenants (T9).

Delivery: every revision of a finding reaches iw.findings at least once, with the same bytes each time, keyed by its
uid. A partition of iw.events that says nothing holds time back for all tenants: an alarm in the status, not another
finding, until `pending_rollups_max` rollups wait for it. Commands of people come over iw.commands and take their place
among the rollups (`streams/commands.py`).
"""

import asyncio
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from collector.kafka import ConsumerRecord, KafkaConfig, partition_for
from detectors.commands import BadCommand
from detectors.config import DetectConfig
from detectors.engine import PartitionMismatch, TenantEngine
from detectors.finding import encode
from detectors.rollup import BadRollup, Command, decode
from detectors.time import SECOND_US
from streams.commands import Forwarder
from streams.config import StreamsConfig
from streams.output import Outgoing
from streams.stage import Refused, Stage, run_stage

ROLE: Final = "stage2"


class RollupShard:
    """A `TenantEngine` in the worker's terms."""

    def __init__(self, engine: TenantEngine, finding_partitions: int) -> None:
        self._engine, self._finding_partitions = engine, finding_partitions

    def observe(self, records: Sequence[ConsumerRecord]) -> list[Refused]:
        """Decodes and applies rollups and commands."""
        refused = []
        for record in records:
            try:
                rollup = decode(record.value or b"")
                self._engine.observe(rollup)
            except (BadRollup, PartitionMismatch) as error:
                refused.append((record, str(error)))
            except BadCommand as error:
                place = f"{rollup.partition}-{rollup.offset}" if isinstance(rollup, Command) else ""
                refused.append((record, f"command {place} of iw.commands refused: {error}"))
        return refused

    def applied(self, partition: int) -> tuple[int, int] | None:
        """The engine's; see `streams.commands.Commanded`."""
        return self._engine.applied(partition)

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


def stage2(
    kafka: KafkaConfig,
    detect: DetectConfig,
    events: int,
    rollups: int,
    findings: int,
    *,
    owned: MutableMapping[int, RollupShard] | None = None,
) -> Stage:
    """The stage over `rollups` partitions of iw.rollups, which speak of `events` partitions of iw.events.

    Into `owned` goes each shard that is made, by partition.
    """

    def make_shard(partition: int) -> RollupShard:
        shard = RollupShard(TenantEngine(detect, partition=partition, partitions=events), findings)
        if owned is not None:
            owned[partition] = shard
        return shard

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

    Raises BrokerAway, TopicMismatch, StageFailed or OSError, each with one sentence.
    """

    owned: WeakValueDictionary[int, RollupShard] = WeakValueDictionary()
    """Ends with the worker's ownership: a shard that was given up is collected."""
    beside: list[asyncio.Task[None]] = []
    """Cancelled with the event loop."""

    def make(counts: Mapping[str, int]) -> Stage:
        events, rollups, findings = (counts[kafka.topic(name)] for name in ("events", "rollups", "findings"))
        beside.append(asyncio.create_task(Forwarder(kafka, owned).run(), name="commands"))
        return stage2(kafka, detect, events, rollups, findings, owned=owned)

    run_stage(make, kafka, streams, data_dir=data_dir, config_digest=config_digest, on_serving=on_serving)
