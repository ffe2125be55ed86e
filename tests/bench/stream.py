"""Stage 1 against stock Faust: events for each CPU-second of the worker process, side by side, on one real broker.

    python -m tests.bench.stream --json

Three workers read the same backlog, one after the other, in rounds: `stage1` is the deployed worker (decoding, time
rules, all detectors, rollups acknowledged, state stored); `faust_event` is an ordinary Faust agent that decodes each
event into a Record and counts it; `faust_table` also counts it in a Faust Table. Only the time from the first handled
record to the last is measured, in the worker's own process. The last line printed is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from collector.event import SCHEMA_VERSION, AnyRecord, AuditEvent, Goodbye, GuardResult, Hello, encode, uuid7
from collector.kafka import BatchWriter, KafkaConfig, ensure_topics, make_producer, partition_for
from streams.broker import Broker, BrokerSettings

SHARE = {"stage1": 1, "faust_event": 2, "faust_table": 10}
"""Each worker reads this fraction of the backlog: the slow ones need less for as long a measurement."""
MODES = tuple(SHARE)
RATE_PER_S = 2_000
USERS = 10_000
SAMPLE_S = 0.01
CHILD_TIMEOUT_S = 300


def log_of(seed: int, events: int, partitions: int, end: datetime) -> Iterator[tuple[int, bytes, AnyRecord]]:
    """(partition, key, record): one lane a partition, from hello to goodbye, `RATE_PER_S` events a second of it."""
    chance = random.Random(seed)  # noqa: S311 (test data, not secrets)
    boot, seqs = f"{seed:08x}", [0] * partitions
    begin = end - timedelta(seconds=events / RATE_PER_S + 1)

    def common(partition: int, moment: datetime) -> dict[str, object]:
        seqs[partition] += 1
        return {
            "schema_version": SCHEMA_VERSION,
            "event_id": uuid7(),
            "timestamp": moment,
            "collector_id": "bench",
            "boot": boot,
            "seq": seqs[partition] - 1,
        }

    for partition in range(partitions):
        yield partition, b"bench", Hello(**common(partition, begin), model_version="m@1")  # type: ignore[arg-type]
    for number in range(events):
        user = f"u_{chance.randrange(USERS):032x}"
        partition = partition_for(user.encode(), partitions)
        blocked = chance.random() < 0.01
        guard = GuardResult(guard="injection", version="1", stage="input", decision="block" if blocked else "allow")
        yield (
            partition,
            user.encode(),
            AuditEvent(
                **common(partition, begin + timedelta(seconds=number / RATE_PER_S)),  # type: ignore[arg-type]
                tenant="t",
                session_id=f"s_{chance.randrange(USERS):032x}",
                user_id=user,
                prompt_hash=f"hmac:{chance.getrandbits(256):064x}",
                turn_hash=f"hmac:{chance.getrandbits(256):064x}",
                model_version="m@1",
                guardrail_results=[guard],
                prompt_tokens=chance.randrange(10, 400),
                response_tokens=0 if blocked else chance.randrange(1, 400),
                max_tokens=400,
                latency_ms=chance.lognormvariate(6, 0.5),
                ttft_ms=chance.lognormvariate(4, 0.5),
                blocked=blocked,
                status="blocked_input" if blocked else "ok",
                operation="chat",
            ),
        )
    for partition in range(partitions):
        yield partition, b"bench", Goodbye(**common(partition, end))  # type: ignore[arg-type]


async def load(kafka: KafkaConfig, seed: int, events: int) -> tuple[int, int]:
    """Writes the log; (records, bytes of their values)."""
    partitions = (await ensure_topics(kafka))[kafka.topic("events")]
    producer = make_producer(kafka, client_id="bench")
    await producer.start()
    writer = BatchWriter(producer, kafka.topic("events"))
    records = size = 0
    for partition, key, record in log_of(seed, events, partitions, datetime.now(UTC)):
        value = encode(record)
        await writer.append(key, value, partition)
        records, size = records + 1, size + len(value)
    await writer.flush(60)
    await producer.stop()
    return records, size


async def measure(count: Callable[[], int], until: int) -> dict[str, float]:
    """CPU and wall seconds of this process from the first record seen to `until` records."""
    # Sampled, not signalled: what is counted must not know that it is watched.
    while not (first := count()):  # noqa: ASYNC110
        await asyncio.sleep(SAMPLE_S)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    while count() < until:  # noqa: ASYNC110
        await asyncio.sleep(SAMPLE_S)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return {"events": count() - first, "cpu_s": cpu_s, "wall_s": wall_s}


def child_stage1(kafka: KafkaConfig, until: int) -> None:
    """The deployed worker."""
    from detectors.config import DetectConfig
    from streams.config import StreamsConfig
    from streams.process import run_until_stopped
    from streams.stage import StageWorker
    from streams.stage1 import stage1

    async def main(_stop: asyncio.Event) -> None:
        done = asyncio.Event()
        with tempfile.TemporaryDirectory() as data_dir:
            stage = stage1(kafka, DetectConfig(), kafka.count("events"), kafka.count("rollups"))
            worker = StageWorker(stage, kafka, StreamsConfig(), Path(data_dir))
            running = asyncio.create_task(worker.run(done))
            measuring = asyncio.create_task(measure(lambda: worker.reading().totals["records"], until))
            await asyncio.wait({running, measuring}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            reading = worker.reading()
            done.set()
            await running
        wrong = {"drops": reading.drops, "late": reading.late, "unwritten": int(reading.totals["written"] == 0)}
        if any(wrong.values()):
            raise RuntimeError(f"the run does not count: {wrong}")
        print(json.dumps(measuring.result() | {"written": reading.totals["written"]}), flush=True)

    run_until_stopped(main)


def child_faust(kafka: KafkaConfig, until: int, *, table: bool) -> None:
    """An ordinary Faust agent, as its documentation shows."""
    import faust

    class Event(faust.Record, serializer="json"):
        event_id: str = ""
        user_id: str = ""
        session_id: str = ""
        latency_ms: float = 0.0
        response_tokens: int = 0
        blocked: bool = False

    name = f"{kafka.topic_prefix}-{'table' if table else 'event'}"
    folder = tempfile.mkdtemp()
    app = faust.App(
        name,
        broker=f"kafka://{kafka.bootstrap_servers}",
        datadir=folder,
        web_enabled=False,
        topic_disable_leader=True,
        topic_replication_factor=1,
        topic_partitions=kafka.count("events"),
        consumer_auto_offset_reset="earliest",
        stream_wait_empty=False,
    )
    source = app.topic(kafka.topic("events"), value_type=Event, key_type=bytes, key_serializer="raw")
    counts = app.Table("counts", default=int, partitions=kafka.count("events")) if table else {}
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


def run_child(mode: str, kafka: KafkaConfig, until: int) -> dict[str, float]:
    """One measured worker in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.stream", "--child", mode, "--until", str(until)]
    command += ["--bootstrap", kafka.bootstrap_servers, "--prefix", kafka.topic_prefix]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{mode} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def run(events: int, repetitions: int, seed: int) -> dict[str, Any]:
    """All rounds, interleaved; the raw figures."""
    raw: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(BrokerSettings(port=0, data_dir=Path(folder)))
        broker.start()
        try:
            for repetition in range(repetitions):
                kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"bench{repetition}")
                records, size = asyncio.run(load(kafka, seed + repetition, events))
                sizes.append(size / records)
                for mode in MODES:
                    raw[mode].append(run_child(mode, kafka, records // SHARE[mode]))
                    rate = raw[mode][-1]["events"] / raw[mode][-1]["cpu_s"]
                    print(f"round {repetition + 1}: {mode:12s} {rate:10,.0f} events per CPU-second", file=sys.stderr)
        finally:
            broker.stop()
    rates = {mode: [run["events"] / run["cpu_s"] for run in runs] for mode, runs in raw.items()}
    ratios = {
        f"stage1 / {rival}": [own / other for own, other in zip(rates["stage1"], rates[rival], strict=True)]
        for rival in MODES[1:]
    }
    return {
        "benchmark": "stream",
        "seed": seed,
        "events": events,
        "event_bytes": round(statistics.mean(sizes)),
        "users": USERS,
        "partitions": KafkaConfig().count("events"),
        "repetitions": repetitions,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("faust-streaming", "aiokafka", "msgspec")}
        | {"python": sys.version.split()[0], "kafka": "4.3.1"},
        "events_per_cpu_s": {mode: _summary(values) for mode, values in rates.items()},
        "ratios": {name: _summary(values) for name, values in ratios.items()},
        "raw": raw,
        "goals": [],
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    """Parses the command line; a child measures one worker, the parent runs them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--events", type=int, default=120_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    for hidden in ("--child", "--bootstrap", "--prefix"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if options.child:
        kafka = KafkaConfig(bootstrap_servers=options.bootstrap, topic_prefix=options.prefix)
        if options.child == "stage1":
            child_stage1(kafka, options.until)
        else:
            child_faust(kafka, options.until, table=options.child == "faust_table")
        return
    figures = run(options.events, options.repetitions, options.seed)
    if not options.json:
        for name, summary in {**figures["events_per_cpu_s"], **figures["ratios"]}.items():
            print(f"{name:24s} {summary['min']:12,.1f} {summary['median']:12,.1f} {summary['max']:12,.1f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
