"""Producers, consumers and the batch writer, on a real broker."""

import asyncio
import os
import random
import time

import pytest

from collector.kafka import (
    Ack,
    AIOKafkaConsumer,
    AIOKafkaProducer,
    BatchRefused,
    BatchWriter,
    BrokerAway,
    KafkaConfig,
    RecordTooLarge,
    TopicPartition,
    TopicSpec,
    ensure_topics,
    make_consumer,
    make_producer,
    partition_for,
)
from tests.conftest import RunningBroker

APPEND_TIME = {"message.timestamp.type": "LogAppendTime", "unclean.leader.election.enable": "false"}


async def _producer(config: KafkaConfig) -> AIOKafkaProducer:
    producer = make_producer(config, client_id="test")
    await producer.start()
    return producer


async def _read_all(config: KafkaConfig, topic: str, partitions: int) -> list[list[tuple[bytes | None, bytes]]]:
    """Every record of a topic, one list a partition."""
    consumer: AIOKafkaConsumer = make_consumer(config, group_id=None)
    await consumer.start()
    try:
        ids = [TopicPartition(topic, p) for p in range(partitions)]
        consumer.assign(ids)
        ends = await consumer.end_offsets(ids)
        found: list[list[tuple[bytes | None, bytes]]] = [[] for _ in ids]
        while any(len(found[p.partition]) < ends[p] for p in ids):
            for where, records in (await consumer.getmany(timeout_ms=1000)).items():
                found[where.partition] += [(record.key, record.value) for record in records]
        return found
    finally:
        await consumer.stop()


def _spec(config: KafkaConfig, name: str, *, partitions: int = 1, size: int = 262_144, **configs: str) -> TopicSpec:
    settings = APPEND_TIME | {"cleanup.policy": "delete", "max.message.bytes": str(size)} | configs
    return TopicSpec(f"{config.topic_prefix}.{name}", partitions, 1, settings)


@pytest.mark.parametrize(
    ("key", "murmur2"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_partition_is_kafkas_own(key: bytes, murmur2: int) -> None:
    """The partition equals that of Kafka's Java client (the hashes are those its own tests expect)."""
    assert [partition_for(key, n) for n in (1, 4, 64, 1000)] == [(murmur2 & 0x7FFFFFFF) % n for n in (1, 4, 64, 1000)]


@pytest.mark.kafka
async def test_batches_keep_order_per_partition(kafka_config: KafkaConfig) -> None:
    """All records are stored once, in order per partition, and the acknowledgements tell their offsets."""
    spec = _spec(kafka_config, "events", partitions=3)
    await ensure_topics(kafka_config, [spec])
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    chance = random.Random(seed)  # noqa: S311 (test data, not secrets)
    expected: list[list[tuple[bytes | None, bytes]]] = [[], [], []]
    producer = await _producer(kafka_config)
    try:
        writer = BatchWriter(producer, spec.name, batches_max=2)
        acks: list[Ack] = []
        for round_number in range(3):
            for i in range(chance.randrange(1, 3000)):
                key = b"u%d" % chance.randrange(100)
                partition = partition_for(key, 3)
                record = (key, b"%d-%d-" % (round_number, i) + b"x" * chance.randrange(600))
                expected[partition].append(record)
                await writer.append(*record, partition)
            acks += await writer.flush(30)
    finally:
        await producer.stop()
    assert await _read_all(kafka_config, spec.name, 3) == expected
    for partition in range(3):
        offset = 0
        for ack in (a for a in acks if a.partition == partition):
            assert ack.base_offset == offset
            offset += ack.records
        assert offset == len(expected[partition])
    assert all(abs(ack.append_ms - time.time() * 1000) < 60_000 for ack in acks)


@pytest.mark.kafka
async def test_oversized_record_is_refused_before_sending(kafka_config: KafkaConfig) -> None:
    """A record over the limit is refused alone: what came before and after is stored. One at the limit is taken."""
    spec = _spec(kafka_config, "events")
    await ensure_topics(kafka_config, [spec])
    fits = os.urandom(262_144 - 256 - 1)
    producer = await _producer(kafka_config)
    try:
        writer = BatchWriter(producer, spec.name)
        await writer.append(b"k", b"before", 0)
        with pytest.raises(RecordTooLarge, match=r"a record of 262145 bytes is over the 262144"):
            await writer.append(b"k", fits + b"+", 0)
        await writer.append(b"k", fits, 0)
        await writer.append(b"k", b"after", 0)
        assert sum(ack.records for ack in await writer.flush(30)) == 3
    finally:
        await producer.stop()
    assert await _read_all(kafka_config, spec.name, 1) == [[(b"k", b"before"), (b"k", fits), (b"k", b"after")]]


@pytest.mark.kafka
async def test_after_a_refused_batch_a_new_producer_goes_on(kafka_config: KafkaConfig) -> None:
    """A batch that the broker refuses spends the producer: the writer says so at once and ever after, tells what was
    stored, and a new producer stores the rest."""
    spec = _spec(kafka_config, "events", partitions=2, size=5000)
    await ensure_topics(kafka_config, [spec])
    producer = await _producer(kafka_config)
    try:
        writer = BatchWriter(producer, spec.name)
        await writer.append(None, b"good", 0)
        await writer.flush(10)
        await writer.append(None, os.urandom(20_000), 0)  # the broker takes 5,000 bytes, the writer was told more
        await writer.append(None, b"elsewhere", 1)
        with pytest.raises(BatchRefused, match=r"1 records for partition 0 of .* were refused: .*MessageSizeTooLarge"):
            await writer.flush(10)
        assert [(ack.partition, ack.records) for ack in writer.acknowledged()] == [(1, 1)]
        await writer.append(None, b"later", 0)
        with pytest.raises(BatchRefused):
            await writer.flush(10)
    finally:
        await producer.stop()
    producer = await _producer(kafka_config)
    try:
        writer = BatchWriter(producer, spec.name)
        for i in range(100):
            await writer.append(None, b"%d" % i, 0)
        await writer.flush(10)
    finally:
        await producer.stop()
    stored = await _read_all(kafka_config, spec.name, 2)
    assert stored == [[(None, b"good")] + [(None, b"%d" % i) for i in range(100)], [(None, b"elsewhere")]]


@pytest.mark.kafka
async def test_unknown_partition_is_refused(kafka_config: KafkaConfig) -> None:
    """A partition that the topic does not have is a programming error, and said so before anything is sent."""
    spec = _spec(kafka_config, "events")
    await ensure_topics(kafka_config, [spec])
    producer = await _producer(kafka_config)
    try:
        writer = BatchWriter(producer, spec.name)
        await writer.append(None, b"x", 7)
        with pytest.raises(ValueError, match=r"has no partition 7"):
            await writer.flush(10)
    finally:
        await producer.stop()


@pytest.mark.kafka
async def test_broker_killed_between_batches(broker: RunningBroker, kafka_config: KafkaConfig) -> None:
    """While the broker is away a flush ends in time and forgets nothing; after its return everything is stored once."""
    spec = _spec(kafka_config, "events")
    await ensure_topics(kafka_config, [spec])
    producer = await _producer(kafka_config)
    try:
        writer = BatchWriter(producer, spec.name)
        await writer.append(None, b"before", 0)
        await writer.flush(10)
        await asyncio.to_thread(broker.kill9)
        await writer.append(None, b"during", 0)
        started_s = time.monotonic()
        with pytest.raises(BrokerAway, match=r"did not acknowledge batches of .* within 1 s"):
            await writer.flush(1)
        assert time.monotonic() - started_s < 3
        await asyncio.to_thread(broker.start)
        await writer.append(None, b"after", 0)
        await writer.flush(30)
    finally:
        await producer.stop()
    assert await _read_all(kafka_config, spec.name, 1) == [[(None, b"before"), (None, b"during"), (None, b"after")]]


@pytest.mark.kafka
async def test_consumer_starts_at_the_earliest_and_commits_only_when_told(kafka_config: KafkaConfig) -> None:
    """A new group reads from the beginning; without a commit the next member reads the same again."""
    spec = _spec(kafka_config, "events")
    await ensure_topics(kafka_config, [spec])
    producer = await _producer(kafka_config)
    writer = BatchWriter(producer, spec.name)
    await writer.append(None, b"one", 0)
    await writer.flush(10)
    await producer.stop()
    found = []
    for commit in (False, True, False):
        consumer = make_consumer(kafka_config, spec.name, group_id=f"{kafka_config.topic_prefix}-group")
        await consumer.start()
        batches = await consumer.getmany(timeout_ms=1500)
        if commit:
            await consumer.commit()
        await consumer.stop()
        found.append([record.value for records in batches.values() for record in records])
    assert found == [[b"one"], [b"one"], []]
