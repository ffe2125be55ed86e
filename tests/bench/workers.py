"""The workers that `tests/bench/stream.py` measures, each in a process of its own.

    python -m tests.bench.workers MODE BOOTSTRAP PREFIX UNTIL

`stage1` is the deployed worker; `count` the same with one detector, a windowed count for each user; `bare` an aiokafka
loop that keeps and stores the same counts; `faust_event` and `faust_table` are ordinary Faust agents. Each prints one
JSON object: events, CPU and wall seconds from the first record to the last, resident memory.
"""

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from collector.kafka import KafkaConfig
from detectors.chunk import Chunk
from detectors.config import DetectConfig
from detectors.detector import Card, Detector, StageOne, StageTwo
from detectors.registry import Registry
from detectors.rollup import Partial, Signal

SAMPLE_S = 0.05
WINDOW_S = 60
STORE_EVERY_S = 1.0


def resident_mib() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


async def measure(count: Callable[[], int], until: int, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """CPU and wall seconds of this process from the first record seen to `until` records, or `stopped()`."""
    # Sampled, not signalled: what is counted must not know that it is watched.
    while not (first := count()):  # noqa: ASYNC110
        await asyncio.sleep(SAMPLE_S)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    memory, handled = [resident_mib()], [(time.time(), first)]
    while (now := count()) < until and not stopped():
        await asyncio.sleep(SAMPLE_S)
        memory.append(resident_mib())
        handled.append((time.time(), now))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    half = len(memory) // 2
    return {
        "events": count() - first,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "rss_mib_max": max(memory),
        "rss_mib_first_half": max(memory[: half + 1]),
        "handled": handled,
    }


class CountOne(StageOne):
    """Events of each user in the current minute, and nothing else."""

    def __init__(self, registry: Registry) -> None:
        self._window, self._count = registry.column("window", np.uint32), registry.column("count", np.uint32)

    def events(self, chunk: Chunk) -> Iterable[Partial | Signal]:
        """A new minute starts a user at nothing."""
        window = chunk.second // WINDOW_S
        for each in np.unique(window):
            entity = chunk.entity[window == each]
            stale = entity[self._window.values[entity] != each]
            self._count.values[stale] = 0
            self._window.values[stale] = each
            np.add.at(self._count.values, entity, 1)
        return ()


CARD = Card(
    name="count",
    version="1",
    atlas=[],
    owasp=[],
    runbook=["", "", ""],
    key=["tenant", "user"],
    window_s=WINDOW_S,
    lookback_s=0,
)
COUNT = Detector(
    card=CARD,
    enabled=lambda _: True,
    stage_one=lambda _, registry: CountOne(registry),
    stage_two=lambda _: StageTwo(),
)


def child_stage1(kafka: KafkaConfig, until: int, *, count_only: bool) -> None:
    """The deployed worker; with `count_only` its engine has the one detector above."""
    from detectors.engine import PartitionEngine
    from streams.config import StreamsConfig
    from streams.process import run_until_stopped
    from streams.stage import StageWorker
    from streams.stage1 import EventShard, stage1

    async def main(stop: asyncio.Event) -> None:
        done = asyncio.Event()
        began_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as data_dir:
            stage = stage1(kafka, DetectConfig(), kafka.count("events"), kafka.count("rollups"))
            if count_only:
                topic, partitions = kafka.topic("events"), kafka.count("events")
                stage = stage._replace(
                    make_shard=lambda partition: EventShard(
                        PartitionEngine(
                            DetectConfig(), topic=topic, partition=partition, partitions=partitions, detectors=[COUNT]
                        ),
                        kafka.count("rollups"),
                    )
                )
            worker = StageWorker(stage, kafka, StreamsConfig(), Path(data_dir))
            running = asyncio.create_task(worker.run(done))
            measuring = asyncio.create_task(measure(lambda: worker.records, until, stop.is_set))
            while not (worker.reading().ready or running.done()):  # noqa: ASYNC110  # as an operator would
                await asyncio.sleep(SAMPLE_S)
            ready_s = time.perf_counter() - began_s
            if until:
                await asyncio.wait({running, measuring}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            reading = worker.reading()
            done.set()
            await running
        wrong = {"drops": reading.drops, "late": reading.late}
        if any(wrong.values()):
            raise RuntimeError(f"the run does not count: {wrong}")
        measured = measuring.result() if until else {}
        measuring.cancel()
        totals = {name: reading.totals[name] for name in ("written", "states", "state_bytes")}
        live = reading.levels.get("engine_entities_live", 0.0)
        print(json.dumps(measured | totals | {"ready_s": ready_s, "entities": live}), flush=True)

    run_until_stopped(main)


def child_bare(kafka: KafkaConfig, until: int, *, slim: bool) -> None:
    """aiokafka and msgspec, nothing around: the same counts, stored as often and packed the same way.

    It reads the same records as strictly as we do; `slim` reads two fields only, and takes anything for the others.
    """
    import cramjam
    import msgspec

    from collector.event import AuditEvent
    from collector.event import decode as decode_event
    from collector.kafka import BatchWriter, make_consumer, make_producer

    class Slim(msgspec.Struct, tag_field="kind", tag="inference"):
        user_id: str
        timestamp: datetime

    decode: Callable[[bytes], Any] = msgspec.json.Decoder(Slim).decode if slim else decode_event
    pack = msgspec.msgpack.Encoder().encode

    async def main() -> None:
        consumer = make_consumer(kafka, kafka.topic("events"), group_id=f"{kafka.topic_prefix}-bare{slim}")
        producer = make_producer(kafka, client_id="bare")
        await consumer.start()
        await producer.start()
        writer = BatchWriter(producer, kafka.topic("rollups"), record_bytes_max=1024 * 1024)
        counts: dict[int, dict[str, tuple[int, int]]] = {}
        seen = 0
        measuring = asyncio.create_task(measure(lambda: seen, until))
        stored_s = time.monotonic()
        while not measuring.done():
            for tp, records in (await consumer.getmany(timeout_ms=50, max_records=4_000)).items():
                mine = counts.setdefault(tp.partition, {})
                for record in records:
                    try:
                        event = decode(record.value)
                    except (msgspec.ValidationError, ValueError):
                        continue
                    if not slim and not isinstance(event, AuditEvent):
                        continue
                    minute = int(event.timestamp.timestamp()) // WINDOW_S
                    window, count = mine.get(event.user_id, (minute, 0))
                    mine[event.user_id] = (minute, count + 1 if window == minute else 1)
                seen += len(records)
            if time.monotonic() - stored_s >= STORE_EVERY_S:
                stored_s = time.monotonic()
                for partition, mine in counts.items():
                    packed = bytes(cramjam.zstd.compress(pack(mine), 3))
                    for begin in range(0, len(packed), 512 * 1024):
                        await writer.append(b"state", packed[begin : begin + 512 * 1024], partition)
                await writer.flush(30)
                await consumer.commit()
            await asyncio.sleep(0)
        os.write(1, json.dumps(measuring.result()).encode() + b"\n")
        os._exit(0)

    asyncio.run(main())


def child_faust(kafka: KafkaConfig, until: int, *, table: bool) -> None:
    """An ordinary Faust agent, as its documentation shows: it does nothing, or counts in a tumbling table."""
    import faust

    class Event(faust.Record, serializer="json"):
        event_id: str = ""
        user_id: str = ""
        session_id: str = ""
        latency_ms: float = 0.0
        response_tokens: int = 0
        blocked: bool = False

    name = f"{kafka.topic_prefix}-{'table' if table else 'event'}"
    app = faust.App(
        name,
        broker=f"kafka://{kafka.bootstrap_servers}",
        datadir=tempfile.mkdtemp(),
        web_enabled=False,
        topic_disable_leader=True,
        topic_replication_factor=1,
        topic_partitions=kafka.count("events"),
        consumer_auto_offset_reset="earliest",
        stream_wait_empty=False,
    )
    source = app.topic(kafka.topic("events"), value_type=Event, key_type=bytes, key_serializer="raw")
    counts: Any = app.Table("counts", default=int, partitions=kafka.count("events")).tumbling(WINDOW_S) if table else {}
    seen = 0

    async def count(stream: faust.StreamT[Event]) -> None:
        nonlocal seen
        async for event in stream:
            if table:
                counts[event.user_id] += 1
            seen += 1

    app.agent(source)(count)

    @app.task  # type: ignore[untyped-decorator]
    async def watch() -> None:
        os.write(1, json.dumps(await measure(lambda: seen, until)).encode() + b"\n")  # Faust takes sys.stdout away
        os._exit(0)  # Faust's own stop takes seconds, and there is nothing to save

    sys.argv = [name, "worker", "--loglevel", "error", "--without-web"]
    app.main()


def main() -> None:
    """One measured worker."""
    mode, bootstrap, prefix, until = sys.argv[1:]
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    kafka = KafkaConfig(bootstrap_servers=bootstrap, topic_prefix=prefix)
    if mode in ("stage1", "count"):
        child_stage1(kafka, int(until), count_only=mode == "count")
    elif mode in ("bare", "bare_slim"):
        child_bare(kafka, int(until), slim=mode == "bare_slim")
    else:
        child_faust(kafka, int(until), table=mode == "faust_table")


if __name__ == "__main__":
    main()
