"""The publisher and the journal: µs a request, events a CPU-second into a real Kafka, and what a stalled broker costs.

    .venv/bin/python -m tests.bench.publisher --json

`begin_finish_us`: CPU of the calling thread for one begin and one finish, Kafka being fed meanwhile.
`events_per_cpu_s`: requests over the CPU of the whole process until Kafka has acknowledged all, producer included.
`drain_per_cpu_s`: the journal of a dead process, read, sent and acknowledged: the sender alone.
`stalled_p99_us`: wall time of begin + finish while the broker is stopped by a signal.
The last line printed is one JSON object.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from collector.config import JournalConfig, PublisherConfig
from collector.event import AuditEvent, GuardResult, Hello
from collector.identity import Pseudonyms
from collector.journal import RECORD, Journal, Reader
from collector.kafka import KafkaConfig, ensure_topics, make_producer
from collector.lanes import Book
from collector.minhash import MinHash
from collector.publisher import Publisher, system_clock_us
from collector.recovery import recover
from collector.sender import Sender
from collector.tickets import Meta
from tests.conftest import RunningBroker

NAMES = Pseudonyms(bytes(range(32)))
TEXT = "the quick system answers users with short helpful messages " * 2
KNOWN: dict[str, object] = {
    "tenant": "default",
    "user_id": NAMES.user("alice"),
    "session_id": NAMES.session("s1"),
    "prompt_hash": NAMES.digest(TEXT),
    "turn_hash": NAMES.digest(TEXT),
    "minhash": NAMES.minhash(TEXT),
    "route": "/v1/chat/completions",
    "operation": "chat",
    "key_id": "key_1",
    "api_key": NAMES.api_key("key_1"),
    "http_request_id": "019a0000-0000-7000-8000-0000000000f0",
    "view": "messages",
    "key_epoch": NAMES.epoch,
    "prompt_tokens": 100,
    "max_tokens": 100,
}
LEARNT: dict[str, Any] = {
    "status": "ok",
    "guardrail_results": [
        GuardResult(guard="ngrams", version="1", stage="input", decision="allow", score=0.1, latency_ms=0.2)
    ],
    "response_tokens": 20,
    "latency_ms": 20.5,
    "finish_reason": "stop",
    "ttft_ms": 1.5,
}


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    """Min, median and max."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def ask(publisher: Publisher, turn: int) -> None:
    """One request."""
    publisher.finish(publisher.begin(key=f"u_{turn % 97}", known=KNOWN), **LEARNT)


def live(kafka: KafkaConfig, folder: Path, requests: int) -> tuple[float, float]:
    """(µs of the calling thread a request, requests a CPU-second of the process), fed to Kafka as it goes."""
    publisher = Publisher(
        kafka, PublisherConfig(), JournalConfig(dir=folder), collector_id="bench", model_version="tiny@1"
    )
    publisher.start()
    cpu_s, thread_s = time.process_time(), time.thread_time()
    for turn in range(requests):
        ask(publisher, turn)
    thread_s = time.thread_time() - thread_s
    while publisher.lag():
        time.sleep(0.01)
    cpu_s = time.process_time() - cpu_s
    publisher.stop()
    return thread_s / requests * 1e6, requests / cpu_s


def drained(kafka: KafkaConfig, folder: Path, requests: int) -> tuple[float, float]:
    """(records a CPU-second sent from a dead boot's journal, µs of CPU to read one)."""
    journal = Journal(JournalConfig(dir=folder), uuid.uuid4().hex)
    book = Book(journal, collector_id="bench", model_version="tiny@1", clock_us=system_clock_us)
    for partition in range(kafka.count("events")):
        book.control(partition, Hello)
    for turn in range(requests):
        ticket = book.begin(f"u_{turn % 97}", turn % kafka.count("events"), KNOWN)
        book.finish(ticket, AuditEvent, LEARNT)
    cpu_s = time.process_time()
    read = sum(entry.body[0] == RECORD for entry in Reader(journal.folder, lambda: journal.end).entries())
    read_us = (time.process_time() - cpu_s) / read * 1e6
    journal.close()

    async def send() -> float:
        async def connect() -> Any:
            producer = make_producer(kafka, client_id="bench", linger_ms=0)
            await producer.start()
            return producer

        await ensure_topics(kafka)
        sender = Sender(connect, kafka.topic("events"), PublisherConfig())
        await sender.producer()
        cpu_s = time.process_time()
        await recover(JournalConfig(dir=folder), sender, heir=Meta("bench"), clock_us=system_clock_us)
        cpu_s = time.process_time() - cpu_s
        await sender.close()
        return cpu_s

    return requests / asyncio.run(send()), read_us


def stalled(kafka: KafkaConfig, folder: Path, broker: RunningBroker, requests: int) -> list[float]:
    """Wall µs of each begin + finish while the broker is stopped."""
    publisher = Publisher(
        kafka, PublisherConfig(), JournalConfig(dir=folder), collector_id="bench", model_version="tiny@1"
    )
    publisher.start()
    took_us = []
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        for turn in range(requests):
            start_ns = time.perf_counter_ns()
            ask(publisher, turn)
            took_us.append((time.perf_counter_ns() - start_ns) / 1000)
            time.sleep(0.001)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    publisher.stop(30)
    return sorted(took_us)


def per_text_us(work: Callable[[str], object], chars: int) -> float:
    """CPU µs for a text of so many characters, the least of 50."""
    text, best = (TEXT * (chars // len(TEXT) + 1))[:chars], float("inf")
    for _ in range(50):
        start_ns = time.perf_counter_ns()
        work(text)
        best = min(best, (time.perf_counter_ns() - start_ns) / 1000)
    return round(best, 1)


def main() -> None:
    """Measure, print progress to stderr and the JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    parser.add_argument("--requests", type=int, default=20_000, help="requests in each run")
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        broker = RunningBroker(Path(name) / "kafka")
        broker.start()
        try:
            figures = measure(broker, Path(name), asked.requests, asked.runs, quiet=asked.json)
        finally:
            broker.stop()
    print(json.dumps(figures))


def measure(broker: RunningBroker, folder: Path, requests: int, runs: int, *, quiet: bool) -> dict[str, Any]:
    """All figures, the kinds of run interleaved."""
    lives, drains = [], []
    for run in range(runs):
        kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"b{uuid.uuid4().hex[:8]}")
        lives.append(live(kafka, folder / f"live{run}", requests))
        drains.append(drained(kafka, folder / f"dead{run}", requests))
        if not quiet:
            print(f"run {run + 1} of {runs}: {lives[-1]}, {drains[-1]}", file=sys.stderr)
    kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"b{uuid.uuid4().hex[:8]}")
    waits_us = stalled(kafka, folder / "stalled", broker, 2000)
    signer = MinHash(bytes(32), chars_max=32_768)
    return {
        "bench": "publisher",
        "requests": requests,
        "runs": runs,
        "begin_finish_us": spread([us for us, _ in lives]),
        "events_per_cpu_s": spread([rate for _, rate in lives], 0),
        "drain_per_cpu_s": spread([rate for rate, _ in drains], 0),
        "journal_read_us": spread([us for _, us in drains], 2),
        "stalled_p50_us": round(waits_us[len(waits_us) // 2], 1),
        "stalled_p99_us": round(waits_us[int(len(waits_us) * 0.99)], 1),
        "minhash_us": {str(chars): per_text_us(signer.encode, chars) for chars in (100, 1000, 8192, 32_768)},
        "digest_us": {str(chars): per_text_us(NAMES.digest, chars) for chars in (100, 32_768)},
        "versions": {"python": platform.python_version(), "aiokafka": version("aiokafka"), "kafka": "4.3.1"},
        "cores": os.cpu_count(),
        "goals": [],
    }


if __name__ == "__main__":
    main()
