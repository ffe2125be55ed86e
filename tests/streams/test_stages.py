"""Both stages as real processes on a real broker: patient with bad records, quick, and awake when nothing happens.

One pair of workers serves all tests of this file, so they say nothing of each other's records.
"""

import asyncio
import json
import statistics
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest

from collector.event import EVENT_BYTES_MAX, AnyRecord, Goodbye, Heartbeat, Hello, Tick, decode, encode
from collector.kafka import KafkaConfig, ensure_topics, make_consumer
from detectors import rollup as rollups
from detectors.finding import decode as decode_finding
from streams.status import read_status
from tests.conftest import RunningBroker
from tests.streams import traffic
from tests.streams.traffic import Collector
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka


class Pair(NamedTuple):
    """Both stages, running."""

    kafka: KafkaConfig
    one: Worker
    two: Worker


@pytest.fixture(scope="module")
def pair(broker: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both stages on topics of their own; at the end they stop cleanly and their logs are clean."""
    kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"t{uuid.uuid4().hex[:10]}")
    asyncio.run(ensure_topics(kafka))
    folder = tmp_path_factory.mktemp("pair")
    with Worker("stage1", kafka, folder) as one, Worker("stage2", kafka, folder) as two:
        wait_until(lambda: one.metric("ready") == two.metric("ready") == 1, "both stages are ready", 60, one, two)
        yield Pair(kafka, one, two)
        assert (one.stop(), two.stop()) == (0, 0)
    logs = one.log.read_text() + two.log.read_text()
    assert "Traceback" not in logs, logs


def _encoded(records: Iterable[tuple[bytes, AnyRecord, int]]) -> list[tuple[bytes, bytes, int]]:
    return [(key, encode(record), partition) for key, record, partition in records]


async def test_an_idle_partition_gets_ticks(pair: Pair) -> None:
    """With no live lane time goes on by ticks of the partition's owner, and markers reach every rollups partition."""
    wait_until(lambda: pair.one.metric("written_total") >= 4 * 4, "markers", 40, pair.one, pair.two)
    log = await traffic.read(pair.kafka, pair.kafka.topic("events"), 4)
    ticked = {record.partition for record in log if type(decode(record.value)) is Tick}
    assert ticked == {0, 1, 2, 3}
    told = await traffic.read(pair.kafka, pair.kafka.topic("rollups"), 4)
    sources: dict[int, set[int]] = {}
    for record in told:
        rollup = rollups.decode(record.value)
        if isinstance(rollup, rollups.Marker):
            assert (rollup.topic, rollup.partitions) == (pair.kafka.topic("events"), 4)
            sources.setdefault(record.partition, set()).add(rollup.partition)
    assert sources == {partition: {0, 1, 2, 3} for partition in range(4)}


async def test_a_finding_is_quick(pair: Pair) -> None:
    """From the heartbeats that let a second close to the finding readable on its topic: measured, and printed."""
    collector = Collector(4, boot="quick", at_us=time.time_ns() // 1000)
    delays_ms: list[float] = []
    reader = make_consumer(pair.kafka, pair.kafka.topic("findings"), group_id=None, fetch_max_wait_ms=20)
    await reader.start()
    try:
        await traffic.send(pair.kafka, _encoded(collector.control(Hello)))
        for tenant in range(12):
            spike = []
            for user in range(60):
                collector.at_us += 10_000
                spike.append(collector.event(f"user-{user}", blocked=user % 2 == 0, tenant=f"tenant-{tenant}"))
            await traffic.send(pair.kafka, _encoded(spike))
            collector.at_us += 1_000_000
            beats = _encoded(collector.control(Heartbeat))
            began_s = time.monotonic()
            await traffic.send(pair.kafka, beats)
            async with asyncio.timeout(10):
                while (finding := decode_finding((await reader.getone()).value)).tenant != f"tenant-{tenant}":
                    pass
            delays_ms.append((time.monotonic() - began_s) * 1000)
            assert (finding.detector, finding.state) == ("block_rate", "open")
    finally:
        await reader.stop()
        await traffic.send(pair.kafka, _encoded(collector.control(Goodbye)))
    ordered = sorted(delays_ms)
    print(f"second closes to finding readable, ms: median {statistics.median(ordered):.0f}, worst {ordered[-1]:.0f}")
    assert statistics.median(ordered) < 1000


async def test_poison_in_the_middle_of_a_batch_stops_nothing(pair: Pair) -> None:
    """Every kind of unusable record becomes a dead letter with its reason and place; all events around it count."""
    records = traffic.spike(7, 4, time.time_ns() // 1000, calm_s=30, spike_s=20)
    newer = encode(next(Collector(4).control(Hello))[1]).replace(b'"1.0"', b'"2.0"')
    bad = {
        b"": "no audit record of schema 1.x: DecodeError at the top level",
        b"not json, tell me a secret": "no audit record of schema 1.x: DecodeError at the top level",
        b"\xff\xfe\x00bytes": "no audit record of schema 1.x: DecodeError at the top level",
        newer: "schema version 2 is newer than 1, the newest read here: update inferwatch",
        b'{"kind":"inference"}': "no audit record of schema 1.x: ValidationError at the top level",
        b"[" * 100_000: "no audit record of schema 1.x: ValidationError at the top level",
        b" " * EVENT_BYTES_MAX + b"{}": "a record of 262146 bytes is over the 262144 allowed",
    }
    middle = len(records) // 2
    poison = [(b"", value, 2) for value in bad]
    await traffic.send(pair.kafka, [*records[:middle], *poison, *records[middle:]], record_bytes_max=1 << 20)
    await traffic.send(pair.kafka, [(b"", b"\xc1 no rollup", 0)], topic="rollups")
    wanted, found = await traffic.caught_up(pair.kafka, pair.one, pair.two)
    assert found == wanted
    told = [json.loads(r.value) for r in await traffic.read(pair.kafka, pair.kafka.topic("deadletter"), 1)]
    events, (rollup,) = ([t for t in told if t["topic"] == pair.kafka.topic(name)] for name in ("events", "rollups"))
    assert [(t["partition"], t["reason"], t["size_bytes"]) for t in sorted(events, key=lambda t: t["offset"])] == [
        (2, reason, len(value)) for value, reason in bad.items()
    ]
    assert (rollup["partition"], rollup["by"]) == (0, "stage2")
    assert [w.metric("dead_letters_total") for w in (pair.one, pair.two)] == [len(bad), 1]
    assert "secret" not in pair.one.log.read_text() + json.dumps(told)


async def test_every_process_tells_its_status(pair: Pair) -> None:
    """`inferwatch status` sees both workers, with lag, watermark, late, drops, version and config digest."""
    statuses = await read_status(pair.kafka)
    assert [(status["role"], status["ready"], status["silent"]) for status in statuses] == [
        ("stage1", True, False),
        ("stage2", True, False),
    ]
    assert {"process_id", "at", "version", "config_digest", "lag", "watermark", "late", "drops"} <= statuses[0].keys()
