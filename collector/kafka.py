"""Kafka for every room: its settings, the topics, producers, consumers, and the writer that sends whole batches.

Every room takes Kafka from here; beside this file only login.py, admin.py and `streams/transport.py` import aiokafka.
Clients belong to the running event loop.

Guarantee: producers are idempotent and wait for all in-sync replicas, so what `BatchWriter.flush` returned is stored
once and in order per partition. A batch that the broker refuses makes every later one of that producer fail on the
partition (measured on Kafka 4.3.1); so sizes are checked before sending, topics take the broker's time, and after a
`BatchRefused` the caller makes a new producer and goes on from the first record that was not acknowledged.
"""

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any, Final, NamedTuple

import cramjam
import structlog
from aiokafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    ConsumerRecord,
    OffsetAndMetadata,
    TopicPartition,
)
from aiokafka.errors import KafkaError, KafkaTimeoutError
from aiokafka.partitioner import murmur2
from aiokafka.record import default_records

from collector.admin import TopicMismatch, ensure_topics
from collector.event import EVENT_BYTES_MAX
from collector.login import BrokerAway, LoginRefused, client_options, wait_for_broker
from collector.topics import KafkaConfig, Scale, TopicName, TopicSpec, changelog_spec, topic_specs

__all__ = [
    "AIOKafkaConsumer",
    "AIOKafkaProducer",
    "Ack",
    "BatchRefused",
    "BatchWriter",
    "BrokerAway",
    "ConsumerRebalanceListener",
    "ConsumerRecord",
    "KafkaConfig",
    "KafkaError",
    "LoginRefused",
    "OffsetAndMetadata",
    "RecordTooLarge",
    "Scale",
    "TopicMismatch",
    "TopicName",
    "TopicPartition",
    "TopicSpec",
    "changelog_spec",
    "client_options",
    "ensure_topics",
    "make_consumer",
    "make_producer",
    "partition_for",
    "read_topic",
    "topic_specs",
    "wait_for_broker",
]

log = structlog.get_logger(__name__)

RECORD_OVERHEAD_BYTES: Final = 256
"""More than a batch of one record adds to its key and value: header 61, varints 12, zstd 9 and 3 for each 128 KiB."""
BATCH_BYTES_MAX: Final = EVENT_BYTES_MAX - 1024
"""One batch before compression. Every topic takes it, even where zstd makes it larger (a `max.message.bytes` counts
the compressed batch, and incompressible bytes grow by 15)."""
REQUEST_BYTES_MAX: Final = 1024 * 1024 - 1024


ZSTD_LEVEL: Final = 1
"""A third of the time of zstd's default level, and no larger on events, whose bulk is digests."""


def _zstd(data: Any) -> bytes:
    return bytes(cramjam.zstd.compress(data, level=ZSTD_LEVEL))


# aiokafka has no setting for the level; its batch builder looks the function up in its own module.
sys.modules[default_records.DefaultRecordBatchBuilder.__module__].zstd_encode = _zstd  # type: ignore[attr-defined]


class RecordTooLarge(ValueError):
    """One record is larger than its topic takes. Nothing was sent; the producer is still good."""


class BatchRefused(RuntimeError):
    """The broker refused a batch, or it can no longer be known whether it took it. The producer is spent."""


def make_producer(
    config: KafkaConfig, *, client_id: str, linger_ms: int = 5, batch_bytes: int = BATCH_BYTES_MAX, **options: Any
) -> AIOKafkaProducer:
    """An idempotent producer, acks=all, zstd. `batch_bytes` bounds one batch before compression."""
    settings: dict[str, Any] = {
        "client_id": f"inferwatch-{client_id}",
        "enable_idempotence": True,
        "acks": "all",
        "compression_type": "zstd",
        "linger_ms": linger_ms,
        "max_batch_size": batch_bytes,
        "max_request_size": REQUEST_BYTES_MAX,
    }
    return AIOKafkaProducer(**(client_options(config) | settings | options))


def make_consumer(config: KafkaConfig, *topics: str, group_id: str | None, **options: Any) -> AIOKafkaConsumer:
    """A consumer that starts at the earliest record and never commits by itself."""
    settings: dict[str, Any] = {"group_id": group_id, "auto_offset_reset": "earliest", "enable_auto_commit": False}
    return AIOKafkaConsumer(*topics, **(client_options(config) | settings | options))


async def read_topic(config: KafkaConfig, name: TopicName) -> AsyncIterator[ConsumerRecord]:
    """Every record that is on a topic now, in order per partition; ends at the offsets seen when it began.

    Outside of any consumer group. The topic must exist. Memory: one fetch. Raises KafkaError.
    """
    consumer = make_consumer(config, group_id=None)
    await consumer.start()
    try:
        places = [TopicPartition(config.topic(name), partition) for partition in range(config.count(name))]
        ends = await consumer.end_offsets(places)
        consumer.assign(places)
        await consumer.seek_to_beginning(*places)
        while any([await consumer.position(place) < ends[place] for place in places]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    yield record
    finally:
        await consumer.stop()


@lru_cache(maxsize=16_384)
def partition_for(key: bytes, partitions: int) -> int:
    """The partition that Kafka's own default partitioner picks: murmur2 of the key, sign bit off, modulo."""
    return int(murmur2(key) & 0x7FFFFFFF) % partitions


class Ack(NamedTuple):
    """One acknowledged batch: `records` records from `base_offset` on, appended at `append_ms` (broker's clock)."""

    partition: int
    base_offset: int
    records: int
    append_ms: int


class BatchWriter:
    """Records of one topic, gathered into batches per partition and acknowledged by `flush`.

    Order per partition is the order of `append`. Memory: one open batch per partition and at most `batches_max` under
    way; `append` waits beyond that. Not for several tasks at once.
    """

    def __init__(
        self, producer: AIOKafkaProducer, topic: str, *, record_bytes_max: int = EVENT_BYTES_MAX, batches_max: int = 64
    ) -> None:
        self.topic = topic
        self._producer = producer
        self._record_bytes_max = record_bytes_max
        self._batches_max = batches_max
        self._open: dict[int, Any] = {}
        self._sent: deque[tuple[int, int, asyncio.Future[Any]]] = deque()
        self._acks: list[Ack] = []
        self._refusal: str | None = None

    async def append(self, key: bytes | None, value: bytes | None, partition: int) -> None:
        """Add one record; None deletes the key of a compacted topic. Raises RecordTooLarge (this record only),
        BatchRefused, or BrokerAway."""
        size = len(value or b"") + len(key or b"") + RECORD_OVERHEAD_BYTES
        if size > self._record_bytes_max:
            raise RecordTooLarge(
                f"a record of {size} bytes is over the {self._record_bytes_max} that {self.topic} takes"
            )
        while True:
            batch = self._open.get(partition)
            if batch is None:
                batch = self._open[partition] = self._producer.create_batch()
            if batch.append(key=key, value=value, timestamp=None) is not None:
                return
            await self._send(partition)

    async def flush(self, timeout_s: float | None = None) -> list[Ack]:
        """Send what is open, wait for all acknowledgements, and return those since the last flush.

        Raises BrokerAway after `timeout_s` seconds: nothing is forgotten then, call it again. Raises BatchRefused once
        all that was under way is decided: `acknowledged` then has the rest.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for partition in list(self._open) if self._refusal is None else ():
                    await self._send(partition)
                while self._sent:
                    await self._collect()
        except TimeoutError:
            raise BrokerAway(f"Kafka did not acknowledge batches of {self.topic} within {timeout_s} s") from None
        if self._refusal is not None:
            raise BatchRefused(self._refusal)
        return self.acknowledged()

    def acknowledged(self) -> list[Ack]:
        """What is known to be stored, also after a refusal; clears the list."""
        acks, self._acks = self._acks, []
        return acks

    async def _send(self, partition: int) -> None:
        while len(self._sent) >= self._batches_max:
            await self._collect()
        if self._refusal is not None:
            raise BatchRefused(self._refusal)
        batch = self._open[partition]
        batch.close()
        try:
            if partition not in await self._producer.partitions_for(self.topic):
                raise ValueError(f"{self.topic} has no partition {partition}")
            future = await self._producer.send_batch(batch, self.topic, partition=partition)
        except KafkaTimeoutError as error:
            raise BrokerAway(f"Kafka takes no batch for partition {partition} of {self.topic}: {error}") from None
        except KafkaError as error:
            self._refusal = f"{self.topic} cannot be written to: {error}"
            raise BatchRefused(self._refusal) from None
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, whoever collects it
        del self._open[partition]
        self._sent.append((partition, batch.record_count(), future))

    async def _collect(self) -> None:
        """Wait for the oldest batch. A cancelled wait leaves it in place."""
        partition, records, future = self._sent[0]
        await asyncio.wait([future])
        self._sent.popleft()
        error = future.exception()
        if error is None:
            stored = future.result()
            self._acks.append(Ack(partition, stored.offset, records, stored.timestamp))
        elif self._refusal is None:
            self._refusal = f"{records} records for partition {partition} of {self.topic} were refused: {error}"
