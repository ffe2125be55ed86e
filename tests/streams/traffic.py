"""Seeded audit events on real lanes, and the answer that an undisturbed run over the same log must give."""

import asyncio
import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from collector.event import (
    SCHEMA_VERSION,
    AnyRecord,
    AuditEvent,
    Goodbye,
    GuardResult,
    Heartbeat,
    Hello,
    encode,
    from_timestamp_us,
)
from collector.kafka import (
    BatchWriter,
    ConsumerRecord,
    KafkaConfig,
    TopicPartition,
    make_consumer,
    make_producer,
    partition_for,
)
from detectors import finding as findings
from detectors import rollup as rollups
from detectors.config import DetectConfig
from detectors.finding import Finding
from streams.stage1 import stage1
from streams.stage2 import stage2
from tests.streams.worker import Worker

SECOND_US = 1_000_000


@dataclass
class Collector:
    """Writes lanes as a collector does: contiguous `seq`, promises that never go back."""

    partitions: int
    boot: str = "boot-1"
    name: str = "collector-1"
    at_us: int = 0
    seqs: dict[int, int] = field(default_factory=dict)
    made: int = 0

    def _common(self, partition: int) -> dict[str, object]:
        self.seqs[partition] = self.seqs.get(partition, -1) + 1
        self.made += 1
        return {
            "schema_version": SCHEMA_VERSION,
            "event_id": f"{self.boot}-{self.made:08d}",
            "timestamp": from_timestamp_us(self.at_us),
            "collector_id": self.name,
            "boot": self.boot,
            "seq": self.seqs[partition],
        }

    def control(self, kind: type[Hello] | type[Heartbeat] | type[Goodbye]) -> Iterator[tuple[bytes, AnyRecord, int]]:
        """The same control record on every lane."""
        for partition in range(self.partitions):
            yield b"", kind(**self._common(partition)), partition  # type: ignore[arg-type]

    def event(
        self, user: str, *, blocked: bool = False, latency_ms: float = 100.0, tenant: str = "acme"
    ) -> tuple[bytes, AnyRecord, int]:
        """One request of `user` that ends now."""
        pseudonym = "u_" + hashlib.sha256(user.encode()).hexdigest()[:32]
        partition = partition_for(pseudonym.encode(), self.partitions)
        guard = GuardResult(guard="patterns", version="1", stage="input", decision="block" if blocked else "allow")
        event = AuditEvent(
            **self._common(partition),  # type: ignore[arg-type]
            tenant=tenant,
            session_id="s_" + pseudonym[2:],
            user_id=pseudonym,
            prompt_hash=f"hmac:{self.made:064x}",
            model_version="tiny@0",
            guardrail_results=[guard],
            response_tokens=0 if blocked else 20,
            latency_ms=latency_ms,
            blocked=blocked,
            status="blocked_input" if blocked else "ok",
            turn_hash=f"hmac:{self.made:064x}",
            prompt_tokens=10,
        )
        return pseudonym.encode(), event, partition


def spike(
    seed: int, partitions: int, start_us: int, *, calm_s: int = 240, spike_s: int = 60, per_second: int = 20
) -> list[tuple[bytes, bytes, int]]:
    """A calm time, then blocked prompts of many users; (key, value, partition) in order, `hello` to `goodbye`."""
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    collector = Collector(partitions, boot=f"boot-{seed}", at_us=start_us)
    made = list(collector.control(Hello))
    for second in range(calm_s + spike_s):
        for _ in range(per_second):
            collector.at_us += SECOND_US // per_second
            attack = second >= calm_s and chance.random() < 0.6
            user = f"attacker-{chance.randrange(60)}" if attack else f"user-{chance.randrange(200)}"
            blocked = attack or chance.random() < 0.01
            made.append(collector.event(user, blocked=blocked, latency_ms=chance.uniform(80, 120)))
        made.extend(collector.control(Heartbeat))
    collector.at_us += 2 * SECOND_US
    made.extend(collector.control(Heartbeat))  # closes the last second
    made.extend(collector.control(Goodbye))
    return [(key, encode(record), partition) for key, record, partition in made]


def noise(size: int) -> bytes:
    """Bytes that don't compress, always the same."""
    return random.Random(1).randbytes(size)  # noqa: S311  # repeatable, no secret


async def send(
    kafka: KafkaConfig,
    records: Sequence[tuple[bytes, bytes, int]],
    topic: str = "events",
    record_bytes_max: int = 262_144,
) -> None:
    """Writes records as the publisher does: whole batches, idempotent."""
    producer = make_producer(kafka, client_id="traffic")
    await producer.start()
    try:
        writer = BatchWriter(producer, kafka.topic(topic), record_bytes_max=record_bytes_max)  # type: ignore[arg-type]
        for key, value, partition in records:
            await writer.append(key, value, partition)
        await writer.flush()
    finally:
        await producer.stop()


async def read(kafka: KafkaConfig, topic: str, partitions: int) -> list[ConsumerRecord]:
    """Everything that is on a topic now, by partition and offset."""
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        tps = [TopicPartition(topic, partition) for partition in range(partitions)]
        consumer.assign(tps)
        ends = await consumer.end_offsets(tps)
        found: list[ConsumerRecord] = []
        while any([await consumer.position(tp) < ends[tp] for tp in tps]):
            for fetched in (await consumer.getmany(timeout_ms=200)).values():
                found.extend(fetched)
        return sorted(found, key=lambda record: (record.partition, record.offset))
    finally:
        await consumer.stop()


@dataclass
class Answer:
    """What a log of events leads to."""

    rollups: dict[tuple[object, ...], bytes]
    """Overwritten by (partition, second, type, tenant, kind, key), as stage 2 does; markers are left out."""
    findings: dict[tuple[str, int], bytes]
    """By (uid, revision)."""


def expected(kafka: KafkaConfig, detect: DetectConfig, events: Sequence[ConsumerRecord]) -> Answer:
    """The engines alone over the log, in one go: no Kafka, no Faust, no restart."""
    counts = {name: kafka.count(name) for name in ("events", "rollups", "findings")}
    first = stage1(kafka, detect, counts["events"], counts["rollups"])
    second = stage2(kafka, detect, counts["events"], counts["rollups"], counts["findings"])
    merging = {partition: second.make_shard(partition) for partition in range(counts["rollups"])}
    told: dict[tuple[object, ...], bytes] = {}
    for partition in range(counts["events"]):
        shard = first.make_shard(partition)
        shard.observe([record for record in events if record.partition == partition])
        for rollup in shard.take():
            told |= _by_key([rollup.value or b""])
            merged = Appended(rollup.partition, 0, 0, rollup.value or b"")
            merging[rollup.partition].observe([merged])
    raised = [outgoing.value or b"" for shard in merging.values() for outgoing in shard.take()]
    return Answer(told, _by_revision(raised))


class Appended(NamedTuple):
    """What a stage reads of a record."""

    partition: int
    offset: int
    timestamp: int
    value: bytes
    topic: str = ""


async def observed(kafka: KafkaConfig) -> Answer:
    """What lies on iw.rollups and iw.findings. Records written twice must be the same bytes."""
    told = await read(kafka, kafka.topic("rollups"), kafka.count("rollups"))
    raised = await read(kafka, kafka.topic("findings"), kafka.count("findings"))
    return Answer(_by_key([record.value for record in told]), _by_revision([record.value for record in raised]))


def _by_key(values: Sequence[bytes]) -> dict[tuple[object, ...], bytes]:
    found: dict[tuple[object, ...], bytes] = {}
    for value in values:
        try:
            rollup = rollups.decode(value)
        except rollups.BadRollup:
            continue
        if not isinstance(rollup, rollups.Partial | rollups.Signal):
            continue
        key = (rollup.partition, rollup.second, type(rollup).__name__, rollup.tenant, rollup.kind, rollup.key)
        assert found.setdefault(key, value) == value, f"told twice, and differently: {key}"
    return found


def _by_revision(values: Sequence[bytes]) -> dict[tuple[str, int], bytes]:
    found: dict[tuple[str, int], bytes] = {}
    for value in values:
        finding: Finding = findings.decode(value)
        key = (finding.uid, finding.revision)
        assert found.setdefault(key, value) == value, f"told twice, and differently: {key}"
    return found


async def caught_up(
    kafka: KafkaConfig, *workers: Worker, timeout_s: float = 60, detect: DetectConfig | None = None
) -> tuple[Answer, Answer]:
    """(what the log leads to, what the stages wrote), once the two agree; else as they are after `timeout_s`.

    Where there are ticks the log goes on for ever, so it is read anew each time.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        while any(worker.metric("lag_records") > 0 for worker in workers) and time.monotonic() < end_s:
            for worker in workers:
                assert worker.process.poll() is None, worker.log.read_text()[-3000:]
            await asyncio.sleep(0.2)
        log = await read(kafka, kafka.topic("events"), kafka.count("events"))
        wanted, found = expected(kafka, detect or DetectConfig(), log), await observed(kafka)
        if wanted == found or time.monotonic() > end_s:
            return wanted, found
        await asyncio.sleep(0.2)
