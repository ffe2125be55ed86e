"""Kafka for every room: its settings, the topics, producers, consumers, and the writer that sends whole batches.

Beside `streams/transport.py` the only file that imports aiokafka. Clients belong to the running event loop.

Guarantee: producers are idempotent and wait for all in-sync replicas, so what `BatchWriter.flush` returned is stored
once and in order per partition. A batch that the broker refuses makes every later one of that producer fail on the
partition (measured on Kafka 4.3.1); so sizes are checked before sending, topics take the broker's time, and after a
`BatchRefused` the caller makes a new producer and goes on from the first record that was not acknowledged.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, Final, NamedTuple

import structlog
from aiokafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    ConsumerRecord,
    OffsetAndMetadata,
    TopicPartition,
)
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError, KafkaTimeoutError
from aiokafka.partitioner import murmur2

from collector.event import EVENT_BYTES_MAX
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


class BrokerAway(ConnectionError):
    """No broker answered in time. What was not acknowledged is still the caller's to send."""


class TopicMismatch(RuntimeError):
    """A topic exists, but with a setting that would break order, time or delivery."""


class RecordTooLarge(ValueError):
    """One record is larger than its topic takes. Nothing was sent; the producer is still good."""


class BatchRefused(RuntimeError):
    """The broker refused a batch, or it can no longer be known whether it took it. The producer is spent."""


def client_options(config: KafkaConfig) -> dict[str, Any]:
    """What every aiokafka client is given, the password too: never log it. Raises ValueError on an unreadable file."""
    options: dict[str, Any] = {
        "bootstrap_servers": config.bootstrap_servers,
        "request_timeout_ms": config.request_timeout_ms,
        "security_protocol": config.security_protocol,
    }
    if config.security_protocol.endswith("SSL"):
        options["ssl_context"] = _tls(config)
    if config.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": config.sasl_mechanism,
            "sasl_plain_username": config.sasl_username,
            "sasl_plain_password": config.password().get_secret_value(),
        }
    return options


def _tls(config: KafkaConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.tls_ca_file)
        if config.tls_cert_file is not None:
            # An empty password: an encrypted key fails here at once instead of asking on the terminal.
            context.load_cert_chain(config.tls_cert_file, config.tls_key_file, password="")
    except OSError as error:  # ssl.SSLError is one of these
        files = ", ".join(str(f) for f in (config.tls_ca_file, config.tls_cert_file, config.tls_key_file) if f)
        raise ValueError(f"cannot use the TLS files of [kafka] ({files}): {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _servers(config: KafkaConfig) -> list[tuple[str, int]]:
    parts = [server.strip().rpartition(":") for server in config.bootstrap_servers.split(",")]
    return [(host.strip("[]"), int(port)) for host, _, port in parts]


async def wait_for_broker(config: KafkaConfig, timeout_s: float = 10.0) -> None:
    """Return once a broker answers as a broker; raise BrokerAway with the last reason after `timeout_s` seconds."""
    options = client_options(config)
    del options["bootstrap_servers"]
    reason = "no answer"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                for host, port in _servers(config):
                    try:
                        connection = await create_conn(host, port, client_id="inferwatch-wait", **options)
                        connection.close()
                        async with _admin(config) as admin:
                            if (await admin.describe_cluster())["brokers"]:
                                return
                        reason = "it names no brokers yet"
                    except (KafkaError, OSError, TimeoutError) as error:
                        reason = str(error) or type(error).__name__
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise BrokerAway(f"no Kafka at {config.bootstrap_servers} after {timeout_s:g} s: {reason}") from None


@asynccontextmanager
async def _admin(config: KafkaConfig) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(client_id="inferwatch-admin", **client_options(config))
    try:
        await admin.start()
        yield admin
    finally:
        await admin.close()


async def ensure_topics(config: KafkaConfig, specs: Sequence[TopicSpec] | None = None) -> dict[str, int]:
    """Create the topics that are missing, check those that exist, and return topic → partitions.

    Checked: partition count, LogAppendTime, clean-up policy, and that `max.message.bytes` is not too small. Retention
    and replication of an existing topic are the operator's. Safe to run from several processes at once.
    Raises TopicMismatch, or BrokerAway where no broker answers within the request timeout.
    """
    wanted = {spec.name: spec for spec in (topic_specs(config) if specs is None else specs)}
    try:
        async with asyncio.timeout(4 * config.request_timeout_ms / 1000), _admin(config) as admin:
            missing = wanted.keys() - (await _partition_counts(admin)).keys()
            await _create(admin, [wanted[name] for name in sorted(missing)])
            # The controller knows a new topic a moment before the brokers do.
            while wanted.keys() - (counts := await _partition_counts(admin)).keys():  # noqa: ASYNC110 (another machine)
                await asyncio.sleep(0.05)
            configs = await _configs(admin, sorted(wanted))
    except (KafkaError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise BrokerAway(f"no Kafka at {config.bootstrap_servers} to check topics with: {reason}") from None
    wrong = [fault for name, spec in wanted.items() for fault in _faults(spec, counts[name], configs[name])]
    if wrong:
        raise TopicMismatch("; ".join(wrong))
    return {name: counts[name] for name in wanted}


async def _partition_counts(admin: AIOKafkaAdminClient) -> dict[str, int]:
    # All topics are listed: naming a missing one may create it with the broker's defaults.
    topics = await admin.describe_topics(None)
    return {t["topic"]: len(t["partitions"]) for t in topics if t["error_code"] == 0 and t["partitions"]}


async def _create(admin: AIOKafkaAdminClient, specs: Sequence[TopicSpec]) -> None:
    if not specs:
        return
    new = [NewTopic(s.name, s.partitions, s.replication, topic_configs=dict(s.configs)) for s in specs]
    for name, code, message in (await admin.create_topics(new)).topic_errors:
        if code == 0:
            log.info("topic created", topic=name)
        elif code != 36:  # 36: another process was quicker
            hint = ' (one broker alone wants [kafka] scale = "dev")' if code == 38 else ""
            raise TopicMismatch(f"Kafka would not create {name}: {message or f'error {code}'}{hint}")


async def _configs(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, str]]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    found = {}
    for response in await admin.describe_configs(resources):
        for code, message, _kind, name, entries in response.resources:
            if code:
                raise TopicMismatch(f"Kafka would not tell the settings of {name}: {message or f'error {code}'}")
            found[name] = {entry[0]: entry[1] for entry in entries}
    return found


def _faults(spec: TopicSpec, partitions: int, configs: Mapping[str, str]) -> list[str]:
    faults = []
    if partitions != spec.partitions:
        faults.append(f"{spec.name} has {partitions} partitions, the configuration says {spec.partitions}")
    faults += [
        f"{spec.name} has {key}={configs.get(key)}, it must be {spec.configs[key]}"
        for key in ("message.timestamp.type", "cleanup.policy")
        if configs.get(key) != spec.configs[key]
    ]
    size, least = int(configs.get("max.message.bytes", 0)), int(spec.configs["max.message.bytes"])
    if size < least:
        faults.append(f"{spec.name} takes messages of {size} bytes, it must take {least} (max.message.bytes)")
    return faults


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
