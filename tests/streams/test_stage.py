"""One worker in this process on a real broker, with a fetch path that loses what it is told to lose."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import RecordsToDelete
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread

from collector.kafka import KafkaConfig, TopicPartition, ensure_topics
from collector.login import admin_client
from detectors.config import DetectConfig
from streams.config import StreamsConfig
from streams.stage import StageFailed, StageWorker
from streams.stage1 import EventShard, stage1
from tests.streams import traffic

pytestmark = pytest.mark.kafka

QUICK = StreamsConfig(session_timeout_s=2, state_interval_s=0.1, tick_after_s=300, batch_records_max=50)


@asynccontextmanager
async def _worker(kafka: KafkaConfig, folder: Path) -> AsyncIterator[StageWorker]:
    stage = stage1(kafka, DetectConfig(), kafka.count("events"), kafka.count("rollups"))
    worker, stop = StageWorker(stage, kafka, QUICK, folder), asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    try:
        yield worker
    finally:
        stop.set()
        await running


async def _until(true: Callable[[], bool], what: str, timeout_s: float = 40) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.05)


def _done(worker: StageWorker) -> Callable[[], bool]:
    return lambda: worker.reading().ready and worker.reading().lag == 0


async def test_a_fetch_path_that_loses_chunks_is_mended(
    kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of the events and of the changelog go missing, the last one too: all is read again, and counts once."""
    await ensure_topics(kafka_config)
    records = traffic.spike(19, 4, time.time_ns() // 1000 - 3600 * traffic.SECOND_US, calm_s=60, spike_s=10)
    half = len(records) // 2
    await traffic.send(kafka_config, records[:half])
    async with _worker(kafka_config, tmp_path) as worker:
        await _until(_done(worker), "the first half")
        await _until(lambda: worker.reading().totals["states"] >= 4, "state is stored")
    lost: list[str] = []
    fetch = AIOKafkaConsumerThread.getmany

    async def lossy(self: Any, active: Any, timeout: float) -> Any:  # noqa: ASYNC109  # Faust's signature
        fetched = await fetch(self, active, timeout)
        kept = {}
        for tp, chunk in fetched.items():
            if lost.count(tp.topic) < 3:
                lost.append(tp.topic)
            else:
                kept[tp] = chunk
        return kept

    await traffic.send(kafka_config, records[half:])
    monkeypatch.setattr(AIOKafkaConsumerThread, "getmany", lossy)
    async with _worker(kafka_config, tmp_path) as worker:
        await _until(_done(worker), "the rest, in spite of the losses")
        await _until(lambda: sum(worker.settled().values()) == len(records), "all is stored")
    assert len(lost) == 6
    assert len(set(lost)) == 2
    wanted, found = await traffic.caught_up(kafka_config, timeout_s=0)
    assert found.rollups == wanted.rollups
    assert found.rollups


async def test_half_a_batch_is_never_stored(
    kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that fails between applying a batch and writing what it gave stores nothing of it; the next one does."""
    await ensure_topics(kafka_config)
    await traffic.send(kafka_config, traffic.spike(23, 4, time.time_ns() // 1000 - 3600 * traffic.SECOND_US, calm_s=30))
    with monkeypatch.context() as broken:
        broken.setattr(EventShard, "take", lambda _: 1 / 0)
        with pytest.raises(StageFailed, match="stage1 can't go on: division by zero"):
            async with _worker(kafka_config, tmp_path) as worker:
                await _until(lambda: worker.failed, "the failure")
    changelog = await traffic.read(kafka_config, f"{kafka_config.topic_prefix}-stage1-state-changelog", 4)
    assert changelog == []
    async with _worker(kafka_config, tmp_path) as worker:
        await _until(_done(worker), "all")
    wanted, found = await traffic.caught_up(kafka_config, timeout_s=0)
    assert found.rollups == wanted.rollups


async def test_what_was_deleted_unread_is_counted_and_gone_past(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Retention overtook a worker that was away: it goes on at the earliest record there is, and counts the rest."""
    await ensure_topics(kafka_config)
    records = traffic.spike(29, 4, time.time_ns() // 1000 - 3600 * traffic.SECOND_US, calm_s=30, spike_s=5)
    half = len(records) // 2
    await traffic.send(kafka_config, records[:half])
    async with _worker(kafka_config, tmp_path) as worker:
        await _until(_done(worker), "the first half")
        await _until(lambda: sum(worker.settled().values()) == half, "all of it is stored")
        stood_at = worker.settled()[0]
    await traffic.send(kafka_config, records[half:])
    topic = TopicPartition(kafka_config.topic("events"), 0)
    async with admin_client(kafka_config) as admin:
        await admin.delete_records({topic: RecordsToDelete(stood_at + 7)})
    async with _worker(kafka_config, tmp_path) as worker:
        await _until(lambda: sum(worker.settled().values()) == len(records), "all there is")
        reading = worker.reading()
    assert (reading.totals["lost_records"], reading.drops) == (7, 7)
    holes = reading.levels["engine_holes"]
    assert holes > 0, "the lane's own numbers tell of the loss too"
