"""A worker with the state of a million users: what storing it holds up, and how soon a restarted worker is ready."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from collector.kafka import ConsumerRecord, KafkaConfig, ensure_topics
from streams.config import StreamsConfig
from streams.output import Outgoing
from streams.shard import Refused
from streams.stage import Stage, StageFailed, StageWorker
from tests.streams import traffic

pytestmark = pytest.mark.kafka

STATE_BYTES = 25 * 1024 * 1024
"""Of one of four partitions: 100 bytes for each of a million users in all."""
READY_S_MAX = 15
HELD_UP_S_MAX = 1.0


class LargeShard:
    """Counts records; its state is half noise, as packed numbers are."""

    def __init__(self, partition: int) -> None:
        noise = random.Random(partition).randbytes(STATE_BYTES // 2)  # noqa: S311  # repeatable, no secret
        self._ballast = noise + bytes(STATE_BYTES - len(noise))
        self.count = 0
        self.seen_s: list[float] = []

    def observe(self, records: Sequence[ConsumerRecord]) -> list[Refused]:
        self.count += len(records)
        self.seen_s.append(time.monotonic())
        return []

    def take(self) -> list[Outgoing]:
        return []

    def snapshot(self) -> bytes:
        return self.count.to_bytes(8, "big") + self._ballast

    def restore(self, raw: bytes) -> None:
        self.count = int.from_bytes(raw[:8], "big")
        if raw[8:] != self._ballast:
            raise ValueError("another state")

    def watermark_us(self) -> int | None:
        return None

    def counters(self) -> Mapping[str, int]:
        return {"counted": self.count}


@pytest.mark.long
async def test_a_large_state_holds_nothing_up_and_is_quickly_back(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """100 MiB over four partitions: batches go on while it is stored; a new worker has it all within 15 s."""
    await ensure_topics(kafka_config)
    shards: list[LargeShard] = []

    def make(partition: int) -> LargeShard:
        shards.append(LargeShard(partition))
        return shards[-1]

    stage = Stage("stage1", kafka_config.topic("events"), 4, kafka_config.topic("rollups"), make)
    streams = StreamsConfig(session_timeout_s=6, tick_after_s=300)
    worker, stop = StageWorker(stage, kafka_config, streams, tmp_path), asyncio.Event()
    running, started_s = asyncio.create_task(worker.run(stop)), time.monotonic()
    sent = 0
    end_s = time.monotonic() + 60
    while worker.reading().totals["states"] < 8 or sent < 400:
        assert time.monotonic() < end_s, worker.reading()
        await traffic.send(kafka_config, [(b"", b"x", partition) for partition in range(4)])
        sent += 4
        await asyncio.sleep(0.05)
    moments = sorted(moment for shard in shards for moment in shard.seen_s)
    held_up_s = max(later - earlier for earlier, later in pairwise(moments))
    while sum(worker.settled().values()) < sent:
        assert time.monotonic() < end_s, worker.settled()
        await asyncio.sleep(0.1)
    size, took_s = worker.reading().totals["state_bytes"], time.monotonic() - started_s
    stop.set()
    await running

    shards.clear()
    began_s = time.monotonic()
    again, stop = StageWorker(stage, kafka_config, streams, tmp_path / "new"), asyncio.Event()
    running = asyncio.create_task(again.run(stop))
    while not again.reading().ready:
        assert time.monotonic() - began_s < 60
        await asyncio.sleep(0.05)
    ready_s = time.monotonic() - began_s
    counted = sum(shard.count for shard in shards)
    stop.set()
    await running
    print(
        f"{size / 2**20:.0f} MiB written; longest wait between batches {held_up_s:.2f} s; ready after {ready_s:.1f} s"
    )
    assert counted == sent
    assert size <= streams.state_bytes_per_s * took_s + STATE_BYTES, "the changelog is paced"
    assert ready_s < READY_S_MAX
    assert held_up_s < HELD_UP_S_MAX


async def test_a_state_over_its_limit_ends_the_worker_with_one_sentence(
    kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    """It says which partition, how large, and which setting; nothing half is left behind."""
    await ensure_topics(kafka_config)
    stage = Stage("stage1", kafka_config.topic("events"), 4, kafka_config.topic("rollups"), LargeShard)
    streams = StreamsConfig(tick_after_s=300, state_bytes_max=1024 * 1024)
    await traffic.send(kafka_config, [(b"", b"x", 2)])
    with pytest.raises(StageFailed, match=r"state of partition 2 is \d+ bytes packed, over streams.state_bytes_max"):
        async with asyncio.timeout(60):
            await StageWorker(stage, kafka_config, streams, tmp_path).run(asyncio.Event())
    changelog = f"{kafka_config.topic_prefix}-stage1-state-changelog"
    assert await traffic.read(kafka_config, changelog, 4) == []
