"""Promises (a) and (b) on a real broker, in four cells; the simulator has them all (tests/sim/test_sameness.py)."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from collector.event import decode, encode
from collector.kafka import KafkaConfig, ensure_topics
from streams.config import StreamsConfig
from streams.stage import StageWorker
from streams.stage1 import stage1
from tests.sim.answer import bare
from tests.sim.logs import CONFIG, Shape, short_log
from tests.sim.traffic import START_US
from tests.streams import traffic
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka

YEAR_S: Final = 365 * 86_400
"""The made-up traffic is of a day to come, and a broker's clock is not ours to set: so it is moved to the past."""


@dataclass(frozen=True)
class Cell:
    """One way to run the same events."""

    partitions: int
    workers: int
    batch: int
    restart: bool = False
    replay: bool = False


CELLS = (Cell(1, 1, 1), Cell(4, 2, 500), Cell(16, 1, 50_000, restart=True), Cell(4, 1, 500, replay=True))


def _records(partitions: int) -> list[tuple[bytes, bytes, int]]:
    moved = []
    for log in short_log(Shape(0, partitions)).partitions:
        for record in log:
            found = decode(record.value)
            past = found.timestamp.fromtimestamp(found.timestamp.timestamp() - YEAR_S, found.timestamp.tzinfo)
            moved.append((b"", encode(msgspec.structs.replace(found, timestamp=past)), record.partition))
    return moved


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_a_cell_gives_the_same_answer(kafka_config: KafkaConfig, tmp_path: Path, cell: Cell) -> None:
    """(a): byte for byte what the engines alone give for this log; (b): the findings that one partition gives."""
    kafka = kafka_config.model_copy(update={"partitions": {"events": cell.partitions}})
    await ensure_topics(kafka)
    records = _records(cell.partitions)
    options: dict[str, Any] = {"batch_records_max": cell.batch, "tick_after_s": 300}
    ones = [Worker("stage1", kafka, tmp_path, name=f"one-{n}", detect=CONFIG, **options) for n in range(cell.workers)]
    two = Worker("stage2", kafka, tmp_path, detect=CONFIG, **options)
    try:
        for worker in (*ones, two):
            worker.start()
        share = cell.partitions / cell.workers
        shared = lambda: all(worker.metric("partitions") == share for worker in ones)  # noqa: E731
        await asyncio.to_thread(wait_until, shared, "the partitions are dealt out", 60, *ones, two)
        half = len(records) // 2 if cell.restart else len(records)
        await traffic.send(kafka, records[:half])
        if cell.restart:
            for worker in (*ones, two):
                worker.kill9()
                worker.start()
            await traffic.send(kafka, records[half:])
        if cell.replay:
            await _read_again(kafka, tmp_path, len(records))
        wanted, found = await traffic.caught_up(kafka, *ones, two, detect=CONFIG)
    finally:
        for worker in (*ones, two):
            worker.__exit__()
    assert found == wanted
    plain = kafka.model_copy(update={"partitions": {"events": 1}})
    log = [
        traffic.Appended(partition, offset, START_US // 1000, value)
        for offset, (_, value, partition) in enumerate(_records(1))
    ]
    alone = traffic.expected(plain, CONFIG, log)
    assert bare(found.findings.values()) == bare(alone.findings.values())
    assert len(found.findings) > 10


async def _read_again(kafka: KafkaConfig, folder: Path, records: int) -> None:
    """Another group reads the log from its beginning, beside the first, and writes all of it once more."""
    stage = stage1(kafka, CONFIG, kafka.count("events"), kafka.count("rollups"))._replace(role="again")
    worker = StageWorker(stage, kafka, StreamsConfig(tick_after_s=300, batch_records_max=500), folder / "again")
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    async with asyncio.timeout(60):
        while worker.reading().totals["records"] < records:  # noqa: ASYNC110  # a metric can only be asked
            await asyncio.sleep(0.1)
    stop.set()
    await running
