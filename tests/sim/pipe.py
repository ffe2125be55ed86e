"""Runs partition logs through both stages the way workers do: in batches, in any interleaving, with restarts."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from detectors import rollup
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding
from tests.sim.layout import Logged

TOPIC = "iw.events"


@dataclass
class Run:
    """What came out."""

    findings: list[Finding] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)
    counters: dict[str, int] = field(default_factory=dict)


def run(
    logs: Sequence[Sequence[Logged]],
    config: DetectConfig,
    *,
    batch: int = 500,
    seed: int = 0,
    restart: float = 0.0,
) -> Run:
    """Feeds each partition in batches, partitions in random order; with chance `restart` an engine dies after a batch
    and a new one goes on from its snapshot, reading the last batch once more. Rollups pass through their wire form."""
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    partitions = len(logs)
    engines = [_partition_engine(config, partition, partitions) for partition in range(partitions)]
    tenant = TenantEngine(config, partition=0, partitions=partitions)
    position = [0] * partitions
    out = Run()
    while any(position[partition] < len(logs[partition]) for partition in range(partitions)):
        partition = rng.choice([p for p in range(partitions) if position[p] < len(logs[p])])
        begin = position[partition]
        for logged in logs[partition][begin : begin + batch]:
            flag = engines[partition].observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
            out.flags[flag] += 1
        position[partition] = begin + batch
        told = [rollup.encode(each) for each in engines[partition].take()]
        if rng.random() < restart:
            raw = engines[partition].snapshot()
            engines[partition] = _partition_engine(config, partition, partitions)
            engines[partition].restore(raw)
            for logged in logs[partition][max(0, begin - 3) : begin + batch]:
                flag = engines[partition].observe(logged.record, append_ms=logged.append_ms, offset=logged.offset)
                assert flag == "replayed"
            told += told[-5:]
        for raw in told:
            tenant.observe(rollup.decode(raw))
        if rng.random() < restart:
            raw = tenant.snapshot()
            tenant = TenantEngine(config, partition=0, partitions=partitions)
            tenant.restore(raw)
        out.findings += tenant.take()
    out.counters = tenant.counters | {f"stage1.{k}": v for engine in engines for k, v in engine.counters.items()}
    return out


def _partition_engine(config: DetectConfig, partition: int, partitions: int) -> PartitionEngine:
    return PartitionEngine(config, topic=TOPIC, partition=partition, partitions=partitions)
