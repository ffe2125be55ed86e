"""Both stages under faults on a real broker: killed, joined, left, the broker away; the findings stay the same.

The battery of hundreds of rounds is a soak; these are one round of each kind.
"""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from collector.event import AuditEvent, decode
from collector.kafka import KafkaConfig, ensure_topics
from detectors import rollup as rollups
from tests.conftest import RunningBroker
from tests.streams import traffic
from tests.streams.traffic import Answer
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka

AN_HOUR_AGO_US = int((time.time() - 3600) * 1e6)
SMALL: dict[str, Any] = {"batch_records_max": 50, "tick_after_s": 300}
"""Small batches, so that a crash falls between two; no ticks, so that the log ends."""


def _requests(answer: Answer) -> int:
    """How many requests the block_rate partials count, over all seconds and partitions."""
    total = 0
    for raw in answer.rollups.values():
        rollup = rollups.decode(raw)
        if isinstance(rollup, rollups.Partial) and rollup.kind == "block_rate":
            total += rollup.counts.get("requests", 0)
    return total


async def test_killed_workers_change_no_finding(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """SIGKILL of both stages in mid-stream: every event counts once, every finding is the same to the byte."""
    await ensure_topics(kafka_config)
    records = traffic.spike(11, 4, AN_HOUR_AGO_US)
    step = len(records) // 8 + 1
    with (
        Worker("stage1", kafka_config, tmp_path, **SMALL) as one,
        Worker("stage2", kafka_config, tmp_path, **SMALL) as two,
    ):
        for start in range(0, len(records), step):
            await traffic.send(kafka_config, records[start : start + step])
            await asyncio.sleep(0.2)
            if start == 4 * step:
                stored = lambda: one.metric("states_total") > 0 and two.metric("states_total") > 0  # noqa: E731
                wait_until(stored, "state is stored", 60, one, two)
                # Handled but not yet stored when the worker dies; sent again below, so duplicates too.
                await traffic.send(kafka_config, records[start + step : start + step + 50])
                for worker in (one, two):
                    worker.kill9()
                    worker.start()
        wanted, found = await traffic.caught_up(kafka_config, one, two)
    assert found == wanted
    assert found.findings
    assert _requests(found) == sum(type(decode(value)) is AuditEvent for _, value, _ in records)


@pytest.mark.long
async def test_workers_may_come_and_go(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """A second worker joins and takes partitions, then the first is killed: the findings are the same."""
    await ensure_topics(kafka_config)
    records = traffic.spike(13, 4, AN_HOUR_AGO_US)
    third = len(records) // 3
    with (
        Worker("stage1", kafka_config, tmp_path, name="a", **SMALL) as first,
        Worker("stage2", kafka_config, tmp_path, **SMALL) as two,
    ):
        await traffic.send(kafka_config, records[:third])
        wait_until(lambda: first.metric("partitions") == 4, "the first worker owns all", 40, first, two)
        with Worker("stage1", kafka_config, tmp_path, name="b", **SMALL) as second:
            await traffic.send(kafka_config, records[third : 2 * third])
            shared = lambda: first.metric("partitions") == second.metric("partitions") == 2  # noqa: E731
            wait_until(shared, "the workers share the partitions", 40, first, second)
            first.kill9()
            await traffic.send(kafka_config, records[2 * third :])
            wait_until(lambda: second.metric("partitions") == 4, "the second worker owns all", 40, second, two)
            wanted, found = await traffic.caught_up(kafka_config, second, two)
    assert found == wanted
    assert found.findings


@pytest.mark.long
async def test_a_restarted_broker_is_waited_for(
    broker: RunningBroker, kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    """SIGKILL of the broker in mid-stream: the workers stay, and find the same; without it they still stop cleanly."""
    await ensure_topics(kafka_config)
    records = traffic.spike(17, 4, AN_HOUR_AGO_US)
    half = len(records) // 2
    with (
        Worker("stage1", kafka_config, tmp_path, **SMALL) as one,
        Worker("stage2", kafka_config, tmp_path, **SMALL) as two,
    ):
        await traffic.send(kafka_config, records[:half])
        wait_until(lambda: two.metric("records_total") > 50, "rollups flow", 60, one, two)
        await asyncio.to_thread(broker.kill9)
        await asyncio.sleep(2)
        await asyncio.to_thread(broker.start)
        await traffic.send(kafka_config, records[half:])
        wanted, found = await traffic.caught_up(kafka_config, one, two)
        assert found == wanted
        assert found.findings
        await asyncio.to_thread(broker.kill9)
        began_s = time.monotonic()
        one.send(signal.SIGTERM)
        two.send(signal.SIGTERM)
        try:
            stopped = [await asyncio.to_thread(worker.process.wait, 30) for worker in (one, two)]
            took_s = time.monotonic() - began_s
        finally:
            await asyncio.to_thread(broker.start)
        print(f"stopped without a broker after {took_s:.1f} s")
        assert stopped == [0, 0]
        assert len(one.log.read_text().splitlines()) < 100, "an outage must not flood the log"


async def test_an_absent_broker_is_one_sentence(tmp_path: Path) -> None:
    """With no broker at start the worker ends by itself with status 1 and one sentence, no traceback."""
    away = KafkaConfig(bootstrap_servers="127.0.0.1:9")
    with Worker("stage1", away, tmp_path, broker_timeout_s=1.0) as one:
        assert await asyncio.to_thread(one.process.wait, 30) == 1
    assert one.log.read_text().startswith("BrokerAway: no Kafka at 127.0.0.1:9 after 1 s: ")
    assert one.log.read_text().count("\n") == 1
