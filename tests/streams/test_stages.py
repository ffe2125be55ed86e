"""Both stages as real processes on a real broker: exact under crashes, patient with bad records, quick."""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from collector.event import EVENT_BYTES_MAX, AnyRecord, AuditEvent, Heartbeat, Hello, Tick, decode, encode
from collector.kafka import KafkaConfig, ensure_topics, make_consumer
from detectors import rollup as rollups
from detectors.config import DetectConfig
from detectors.finding import decode as decode_finding
from tests.conftest import RunningBroker
from tests.streams import traffic
from tests.streams.traffic import Answer, Collector
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka

AN_HOUR_AGO_US = int((time.time() - 3600) * 1e6)


async def _caught_up(kafka: KafkaConfig, *workers: Worker, timeout_s: float = 40) -> tuple[Answer, Answer]:
    """(what the log leads to, what the stages wrote), once the two agree; else as they are after `timeout_s`.

    Ticks go on for ever, so the log is read anew each time.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        log = await traffic.read(kafka, kafka.topic("events"), kafka.count("events"))
        wanted, found = traffic.expected(kafka, DetectConfig(), log), await traffic.observed(kafka)
        # Rollups and findings can only lack what the newest ticks close.
        if wanted == found or time.monotonic() > end_s:
            return wanted, found
        for worker in workers:
            assert worker.process.poll() is None, worker.log.read_text()[-3000:]
        await asyncio.sleep(0.3)


def _requests(answer: Answer) -> int:
    """How many requests the block_rate partials count, over all seconds and partitions."""
    total = 0
    for raw in answer.rollups.values():
        rollup = rollups.decode(raw)
        if isinstance(rollup, rollups.Partial) and rollup.kind == "block_rate":
            total += rollup.counts.get("judged", 0) or rollup.counts.get("requests", 0)
    return total


async def test_poison_in_the_middle_of_a_batch_stops_nothing(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Every kind of unusable record becomes a dead letter with its reason and place; all events around it count."""
    await ensure_topics(kafka_config)
    records = traffic.spike(7, 4, AN_HOUR_AGO_US, calm_s=60, spike_s=20)
    newer = encode(next(Collector(4).control(Hello))[1]).replace(b'"1.0"', b'"2.0"')
    bad = [
        b"",
        b"not json, tell me a secret",
        b"\xff\xfe\x00bytes",
        newer,
        b'{"kind":"inference","schema_version":"1.0"}',
        b"[" * 100_000,
        b" " * (EVENT_BYTES_MAX - 300) + b"x" * 400,
    ]
    middle = len(records) // 2
    poison = [(b"", value, 2) for value in bad]
    await traffic.send(kafka_config, [*records[:middle], *poison, *records[middle:]], record_bytes_max=1 << 20)
    await traffic.send(kafka_config, [(b"", b"\xc1 no rollup", 0)], topic="rollups")
    with Worker("stage1", kafka_config, tmp_path) as one, Worker("stage2", kafka_config, tmp_path) as two:
        wanted, found = await _caught_up(kafka_config, one, two)
        letters = await traffic.read(kafka_config, kafka_config.topic("deadletter"), 1)
        assert (one.metric("dead_letters_total"), two.metric("dead_letters_total")) == (len(bad), 1)
        assert (one.stop(), two.stop()) == (0, 0)
        logged = one.log.read_text() + two.log.read_text()
    assert found == wanted
    assert found.findings, "the spike was found"
    told = sorted((json.loads(letter.value) for letter in letters), key=lambda told: (told["topic"], told["offset"]))
    reasons = [(told["topic"].rpartition(".")[2], told["partition"], told["reason"]) for told in told]
    assert [reason[:2] for reason in reasons] == [("events", 2)] * len(bad) + [("rollups", 0)]
    assert "newer than 1" in reasons[3][2]
    assert "over the 262144 allowed" in reasons[6][2]
    assert "Traceback" not in logged
    assert "secret" not in logged + "".join(str(letter.value) for letter in letters)


async def test_a_killed_worker_changes_no_finding(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """SIGKILL of both stages in mid-stream, twice: every event counts once, every finding is the same to the byte."""
    await ensure_topics(kafka_config)
    records = traffic.spike(11, 4, AN_HOUR_AGO_US)
    parts = [records[start : start + len(records) // 12 + 1] for start in range(0, len(records), len(records) // 12 + 1)]
    small = {"batch_records_max": 50}
    with Worker("stage1", kafka_config, tmp_path, **small) as one, Worker("stage2", kafka_config, tmp_path, **small) as two:
        for number, part in enumerate(parts):
            await traffic.send(kafka_config, part)
            if number in (4, 8):
                wait_until(lambda: one.metric("states_total") > 0 and two.metric("states_total") > 0, "state", 40, one, two)
                one.kill9()
                two.kill9()
                one.start()
                two.start()
            await asyncio.sleep(0.3)
        wanted, found = await _caught_up(kafka_config, one, two)
    assert found == wanted
    assert found.findings
    counted = Counter(type(decode(value)).__name__ for _, value, _ in records)
    assert _requests(found) == counted["AuditEvent"]


async def test_workers_may_come_and_go(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """A second worker joins and takes partitions, then the first is killed: the same findings, nothing counted twice."""
    await ensure_topics(kafka_config)
    records = traffic.spike(13, 4, AN_HOUR_AGO_US)
    third = len(records) // 3
    small = {"batch_records_max": 50}
    with (
        Worker("stage1", kafka_config, tmp_path, name="a", **small) as first,
        Worker("stage2", kafka_config, tmp_path) as two,
    ):
        await traffic.send(kafka_config, records[:third])
        wait_until(lambda: first.metric("partitions") == 4, "the first worker owns all", 40, first, two)
        with Worker("stage1", kafka_config, tmp_path, name="b", **small) as second:
            await traffic.send(kafka_config, records[third : 2 * third])
            shared = lambda: first.metric("partitions") == second.metric("partitions") == 2  # noqa: E731
            wait_until(shared, "the workers share the partitions", 40, first, second)
            first.kill9()
            await traffic.send(kafka_config, records[2 * third :])
            wait_until(lambda: second.metric("partitions") == 4, "the second worker owns all", 40, second, two)
            wanted, found = await _caught_up(kafka_config, second, two)
    assert found == wanted
    assert found.findings


async def test_an_idle_partition_gets_ticks(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """With no live lane time goes on by ticks of the partition's owner, and markers reach every rollups partition."""
    await ensure_topics(kafka_config)
    with Worker("stage1", kafka_config, tmp_path, tick_after_s=0.3) as one:
        wait_until(lambda: one.metric("written_total") >= 4 * 4 * 2, "markers from every partition", 40, one)
    log = await traffic.read(kafka_config, kafka_config.topic("events"), 4)
    assert {type(decode(record.value)) for record in log} == {Tick}
    assert {record.partition for record in log} == {0, 1, 2, 3}
    told = await traffic.read(kafka_config, kafka_config.topic("rollups"), 4)
    sources: dict[int, set[int]] = {}
    for record in told:
        marker = rollups.decode(record.value)
        assert isinstance(marker, rollups.Marker)
        assert (marker.topic, marker.partitions) == (kafka_config.topic("events"), 4)
        sources.setdefault(record.partition, set()).add(marker.partition)
    assert sources == {partition: {0, 1, 2, 3} for partition in range(4)}


async def test_a_restarted_broker_is_waited_for(broker: RunningBroker, kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """SIGKILL of the broker in mid-stream: the workers stay, and go on to the same findings when it is back."""
    await ensure_topics(kafka_config)
    records = traffic.spike(17, 4, AN_HOUR_AGO_US)
    half = len(records) // 2
    with Worker("stage1", kafka_config, tmp_path) as one, Worker("stage2", kafka_config, tmp_path) as two:
        await traffic.send(kafka_config, records[:half])
        wait_until(lambda: two.metric("written_total") >= 0 and two.metric("records_total") > 50, "flow", 40, one, two)
        await asyncio.to_thread(broker.kill9)
        await asyncio.sleep(2)
        await asyncio.to_thread(broker.start)
        await traffic.send(kafka_config, records[half:])
        wanted, found = await _caught_up(kafka_config, one, two)
    assert found == wanted
    assert found.findings


async def test_a_finding_is_quick(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """From the heartbeats that let a second close to the finding readable on its topic: measured, and printed."""
    await ensure_topics(kafka_config)
    collector = Collector(4, at_us=time.time_ns() // 1000 - 30_000_000)
    delays_ms: list[float] = []
    reader = make_consumer(kafka_config, kafka_config.topic("findings"), group_id=None, fetch_max_wait_ms=20)
    await reader.start()
    try:
        with Worker("stage1", kafka_config, tmp_path) as one, Worker("stage2", kafka_config, tmp_path) as two:
            await traffic.send(kafka_config, _encoded(collector.control(Hello)))
            wait_until(lambda: one.metric("ready") == two.metric("ready") == 1, "ready", 40, one, two)
            for tenant in range(12):
                spike = []
                for user in range(60):
                    collector.at_us += 10_000
                    spike.append(collector.event(f"user-{user}", blocked=user % 2 == 0, tenant=f"tenant-{tenant}"))
                await traffic.send(kafka_config, _encoded(spike))
                collector.at_us += 1_000_000
                beats = _encoded(collector.control(Heartbeat))
                began_s = time.monotonic()
                await traffic.send(kafka_config, beats)
                async with asyncio.timeout(10):
                    while (finding := decode_finding((await reader.getone()).value)).tenant != f"tenant-{tenant}":
                        pass
                delays_ms.append((time.monotonic() - began_s) * 1000)
                assert (finding.detector, finding.state) == ("block_rate", "open")
    finally:
        await reader.stop()
    ordered = sorted(delays_ms)
    print(f"second closes to finding readable, ms: median {statistics.median(ordered):.0f}, worst {ordered[-1]:.0f}")
    assert statistics.median(ordered) < 1000


def _encoded(records: Iterable[tuple[bytes, AnyRecord, int]]) -> list[tuple[bytes, bytes, int]]:
    return [(key, encode(record), partition) for key, record, partition in records]
