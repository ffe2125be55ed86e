"""The Kafka clients, the topic table and the batch writer, on a real broker."""

import asyncio
import os
import random
import socket
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from collector.kafka import (
    Ack,
    AIOKafkaConsumer,
    AIOKafkaProducer,
    BatchRefused,
    BatchWriter,
    BrokerAway,
    KafkaConfig,
    RecordTooLarge,
    TopicMismatch,
    TopicPartition,
    TopicSpec,
    changelog_spec,
    client_options,
    ensure_topics,
    make_consumer,
    make_producer,
    partition_for,
    topic_specs,
    wait_for_broker,
)
from tests.conftest import RunningBroker

DAY_MS = 86_400_000
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


def test_topic_table() -> None:
    """The development topics are those of the published table, to the last setting."""
    spec = {
        name: TopicSpec(f"iw.{name}", partitions, 1, APPEND_TIME | {"max.message.bytes": str(size)} | clean_up)
        for name, partitions, size, clean_up in (
            ("events", 4, 262_144, {"cleanup.policy": "delete", "retention.ms": str(7 * DAY_MS)}),
            ("rollups", 4, 1_048_576, {"cleanup.policy": "delete", "retention.ms": str(3 * DAY_MS)}),
            ("commands", 4, 262_144, {"cleanup.policy": "delete", "retention.ms": str(400 * DAY_MS)}),
            ("findings", 4, 1_048_576, {"cleanup.policy": "delete", "retention.ms": str(90 * DAY_MS)}),
            ("deadletter", 1, 262_144, {"cleanup.policy": "delete", "retention.ms": str(30 * DAY_MS)}),
            ("status", 1, 262_144, {"cleanup.policy": "compact"}),
        )
    }
    assert {s.name: s for s in topic_specs(KafkaConfig())} == {s.name: s for s in spec.values()}


def test_production_topics_are_replicated() -> None:
    """In production every topic has three replicas, two of them in sync, and the table's partition counts."""
    specs = topic_specs(KafkaConfig(), scale="prod")
    assert {s.name: (s.partitions, s.replication, s.configs["min.insync.replicas"]) for s in specs} == {
        "iw.events": (64, 3, "2"),
        "iw.rollups": (16, 3, "2"),
        "iw.commands": (16, 3, "2"),
        "iw.findings": (8, 3, "2"),
        "iw.deadletter": (4, 3, "2"),
        "iw.status": (1, 3, "2"),
    }


def test_partition_counts_can_be_set() -> None:
    """A count in the config wins, and commands follow rollups."""
    config = KafkaConfig(partitions={"events": 12, "rollups": 2})
    assert [config.count("events"), config.count("rollups"), config.count("commands")] == [12, 2, 2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bootstrap_servers": "kafka"}, "'kafka' is not HOST:PORT"),
        ({"bootstrap_servers": "a:9092,b:99999"}, "'b:99999' is not HOST:PORT"),
        ({"security_protocol": "SASL_SSL"}, "needs sasl_username"),
        (
            {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "u"},
            "shows the password to the network",
        ),
        ({"tls_cert_file": "/x.pem"}, "tls_cert_file and tls_key_file go together"),
        ({"partitions": {"commands": 3}}, "partitions.commands must equal partitions.rollups"),
        ({"partitions": {"evnets": 3}}, "partitions.evnets"),
        ({"topic_prefix": "a.b c"}, "topic_prefix"),
        ({"bootstrap": "x:1"}, "bootstrap"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], sentence: str) -> None:
    """A setting that can't work is refused with what is wrong with it."""
    with pytest.raises(ValidationError, match=sentence):
        KafkaConfig(**settings)


def test_password_never_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password reaches the client from a file or the environment, and no repr, dump or error."""
    secret = "correct-horse-battery"
    file = tmp_path / "password"
    file.write_text(secret + "\n")
    config = KafkaConfig(security_protocol="SASL_SSL", sasl_username="iw", sasl_password_file=file)
    assert client_options(config)["sasl_plain_password"] == secret
    monkeypatch.setenv("INFERWATCH_KAFKA_PASSWORD", secret)
    by_environment = config.model_copy(update={"sasl_password_file": None})
    assert by_environment.password().get_secret_value() == secret
    for shown in (config, by_environment, config.password(), config.model_dump(), config.model_dump_json()):
        assert secret not in repr(shown) + str(shown)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_missing_password_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    """A password file that is absent, empty or not text is named."""
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    config = KafkaConfig(security_protocol="SASL_SSL", sasl_username="iw", sasl_password_file=file)
    with pytest.raises(ValueError, match=r"kafka\.sasl_password_file .*password"):
        client_options(config)


def test_bad_tls_file_is_one_sentence(tmp_path: Path) -> None:
    """A CA file that holds no certificate is named."""
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ValueError, match=r"cannot use the TLS files of \[kafka\] .*ca\.pem"):
        client_options(KafkaConfig(security_protocol="SSL", tls_ca_file=tmp_path / "ca.pem"))


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


async def test_broker_away_within_the_timeout() -> None:
    """Where nobody listens, the wait ends in time with one sentence: where, how long, why."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        config = KafkaConfig(bootstrap_servers=f"127.0.0.1:{taken.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(
            BrokerAway, match=rf"no Kafka at {config.bootstrap_servers} after 0\.5 s: .*refused|Connect"
        ):
            await wait_for_broker(config, 0.5)
        assert time.monotonic() - started_s < 2


async def test_silent_server_is_away_within_the_timeout() -> None:
    """A server that accepts and never answers is no broker."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = KafkaConfig(bootstrap_servers=f"127.0.0.1:{silent.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(BrokerAway, match=r"after 0\.5 s"):
            await wait_for_broker(config, 0.5)
        assert time.monotonic() - started_s < 2


@pytest.mark.kafka
async def test_topics_are_created_once_and_as_the_table_says(kafka_config: KafkaConfig) -> None:
    """The first call creates all topics; the second finds nothing to do or to complain about."""
    specs = topic_specs(kafka_config)
    counts = {spec.name: spec.partitions for spec in specs}
    assert await ensure_topics(kafka_config) == counts
    assert await ensure_topics(kafka_config) == counts


@pytest.mark.kafka
async def test_topics_created_by_several_processes_at_once(kafka_config: KafkaConfig) -> None:
    """Processes that start together all come through."""
    counts = {spec.name: spec.partitions for spec in topic_specs(kafka_config)}
    assert await asyncio.gather(*(ensure_topics(kafka_config) for _ in range(4))) == [counts] * 4


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("wrong", "partitions", "sentence"),
    [
        (
            {"message.timestamp.type": "CreateTime"},
            1,
            "{topic} has message.timestamp.type=CreateTime, it must be LogAppendTime",
        ),
        ({"cleanup.policy": "compact"}, 1, "{topic} has cleanup.policy=compact, it must be delete"),
        (
            {"max.message.bytes": "1000"},
            1,
            "{topic} takes messages of 1000 bytes, it must take 262144 (max.message.bytes)",
        ),
        ({}, 3, "{topic} has 3 partitions, the configuration says 1"),
    ],
)
async def test_a_topic_that_would_break_promises_is_refused(
    kafka_config: KafkaConfig, wrong: dict[str, str], partitions: int, sentence: str
) -> None:
    """An existing topic with another setting is left as it is and refused with one sentence."""
    wanted = _spec(kafka_config, "events")
    existing = TopicSpec(wanted.name, partitions, 1, dict(wanted.configs) | wrong)
    await ensure_topics(kafka_config, [existing])
    with pytest.raises(TopicMismatch) as error:
        await ensure_topics(kafka_config, [wanted])
    assert str(error.value) == sentence.format(topic=wanted.name)


@pytest.mark.kafka
async def test_production_topics_on_one_broker_are_refused(kafka_config: KafkaConfig) -> None:
    """Three replicas can't be had from one broker; the sentence names the setting."""
    with pytest.raises(TopicMismatch, match=r'scale = "dev"'):
        await ensure_topics(kafka_config.model_copy(update={"scale": "prod"}))


@pytest.mark.kafka
async def test_changelog_topic(kafka_config: KafkaConfig) -> None:
    """The topic behind a Faust table is created and checked like the others."""
    spec = changelog_spec(kafka_config, f"{kafka_config.topic_prefix}-stage1-changelog", 4)
    assert await ensure_topics(kafka_config, [spec]) == {spec.name: 4}
    assert await ensure_topics(kafka_config, [spec]) == {spec.name: 4}


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
