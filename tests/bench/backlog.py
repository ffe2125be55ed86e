"""A seeded backlog of audit events on a real broker, quick to make: for the benches of the streams.

Events of about 550 bytes (`event_bytes` says how many), one lane a partition from hello to goodbye, one in a hundred
blocked, users drawn evenly. `rate` is that of event time: how many events lie in one of its seconds.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from collector.event import SCHEMA_VERSION, Goodbye, Hello, encode
from collector.kafka import BatchWriter, KafkaConfig, ensure_topics, make_producer, partition_for
from collector.uuid7 import uuid7

EVENT = (
    '{"kind":"inference","schema_version":"1.0","event_id":"%s-%012x","timestamp":"%s","collector_id":"bench",'
    '"boot":"%s","seq":%d,"tenant":"t","session_id":"s_%032x","user_id":"%s","prompt_hash":"","model_version":"m@1",'
    '"guardrail_results":[{"guard":"injection","version":"1","stage":"input","decision":"%s"}],"response_tokens":%d,'
    '"latency_ms":%.3f,"blocked":%s,"status":"%s","prompt_tokens":%d,"max_tokens":400,%s"turn_hash":"hmac:%032x"}'
)


@dataclass(frozen=True)
class Backlog:
    """What is asked for."""

    events: int
    users: int = 10_000
    rate: int = 20_000
    seed: int = 1


@dataclass(frozen=True)
class Loaded:
    """What lies on the topic."""

    records: int
    event_bytes: float


def records_of(backlog: Backlog, partitions: int, end: datetime) -> Iterator[tuple[int, bytes, bytes]]:
    """(partition, key, value), in order of time; the last events end at `end`."""
    chance = random.Random(backlog.seed)  # noqa: S311 (test data, not secrets)
    users = [f"u_{chance.getrandbits(128):032x}" for _ in range(backlog.users)]
    keys = [user.encode() for user in users]
    homes = [partition_for(key, partitions) for key in keys]
    boot, seqs = f"{backlog.seed:08x}", [0] * partitions
    begin = end - timedelta(seconds=backlog.events / backlog.rate + 1)

    def control(kind: type[Hello] | type[Goodbye], partition: int, moment: datetime) -> bytes:
        seqs[partition] += 1
        common = {"schema_version": SCHEMA_VERSION, "event_id": uuid7(), "timestamp": moment, "collector_id": "bench"}
        return encode(kind(**common, boot=boot, seq=seqs[partition] - 1))  # type: ignore[arg-type]

    for partition in range(partitions):
        yield partition, b"bench", control(Hello, partition, begin)
    prefix = uuid7()[:23]
    step = timedelta(microseconds=1_000_000 / backlog.rate)
    for number in range(backlog.events):
        who = chance.randrange(backlog.users)
        partition = homes[who]
        stamp = (begin + number * step).isoformat(timespec="microseconds").replace("+00:00", "Z")
        blocked = chance.random() < 0.01
        text = EVENT % (
            prefix,
            number,
            stamp,
            boot,
            seqs[partition],
            who,
            users[who],
            "block" if blocked else "allow",
            0 if blocked else chance.randrange(1, 400),
            2.0 if blocked else chance.lognormvariate(6, 0.5),
            "true" if blocked else "false",
            "blocked_input" if blocked else "ok",
            chance.randrange(10, 400),
            "" if blocked else f'"ttft_ms":{chance.lognormvariate(4, 0.5):.3f},',
            chance.getrandbits(128),
        )
        seqs[partition] += 1
        yield partition, keys[who], text.encode()
    for partition in range(partitions):
        yield partition, b"bench", control(Goodbye, partition, end)


async def load(kafka: KafkaConfig, backlog: Backlog) -> Loaded:
    """Writes the backlog to iw.events, as the publisher does: whole batches, zstd, idempotent."""
    partitions = (await ensure_topics(kafka))[kafka.topic("events")]
    producer = make_producer(kafka, client_id="bench")
    await producer.start()
    try:
        writer = BatchWriter(producer, kafka.topic("events"))
        records = size = 0
        for partition, key, value in records_of(backlog, partitions, datetime.now(UTC)):
            await writer.append(key, value, partition)
            records, size = records + 1, size + len(value)
        await writer.flush(60)
    finally:
        await producer.stop()
    return Loaded(records, size / records)
