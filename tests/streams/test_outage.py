"""Back-pressure: the broker away for long, slow, or the disk full. All wait, say so, resume, and lose nothing."""

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from collector.config import JournalConfig, PublisherConfig
from collector.event import AuditEvent, GuardResult, decode
from collector.kafka import KafkaConfig, ensure_topics
from collector.publisher import Publisher
from detectors.config import DetectConfig
from detectors.finding import Finding
from sinks.clickhouse.rows import StoredEvent
from sinks.clickhouse.store import open_store
from sinks.config import StoreConfig
from streams.config import StreamsConfig
from streams.ingest import Ingest
from tests.conftest import RunningBroker
from tests.streams import traffic
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka
ROLES = ("stage1", "stage2", "ingest", "deliver")
PER_SECOND = 40


class Requests:
    """A collector that goes on publishing, whatever Kafka does: 40 requests a second, one in three blocked."""

    def __init__(self, kafka: KafkaConfig, folder: Path) -> None:
        journal = JournalConfig(dir=folder / "journal")
        self.publisher = Publisher(kafka, PublisherConfig(), journal, collector_id="c", model_version="tiny@0")
        self.ids: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish)

    def start(self) -> None:
        """Opens the lanes, and begins."""
        self.publisher.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends; True from the publisher means that Kafka has everything."""
        self._stop.set()
        self._thread.join()
        assert self.publisher.stop(60)

    def _publish(self) -> None:
        while not self._stop.wait(1 / PER_SECOND):
            number = len(self.ids)
            user = f"u_{number % 60:032x}"
            blocked = number % 3 == 0
            guard = GuardResult(guard="patterns", version="1", stage="input", decision="block" if blocked else "allow")
            known = {"tenant": "acme", "user_id": user, "turn_hash": f"hmac:{number:064x}"}
            ticket = self.publisher.begin(key=user, known=known)
            event = self.publisher.finish(
                ticket,
                status="blocked_input" if blocked else "ok",
                blocked=blocked,
                guardrail_results=[guard],
                prompt_hash=f"hmac:{number:064x}",
            )
            self.ids.append(event.event_id)


async def _through_an_outage(kafka: KafkaConfig, folder: Path, outage: Any) -> None:
    """The whole pipe runs, `outage()` passes, and all is as if nothing had been."""
    await ensure_topics(kafka)
    began_s = time.monotonic()
    requests = Requests(kafka, folder)
    workers = [Worker(role, kafka, folder) for role in ROLES]
    one, two, ingest, deliver = workers
    try:
        for worker in workers:
            worker.start()
        wait_until(lambda: all(worker.metric("ready") == 1 for worker in workers), "all are ready", 90, *workers)
        await asyncio.to_thread(requests.start)
        await asyncio.sleep(4)
        await outage(workers)
        await asyncio.sleep(4)
        await asyncio.to_thread(requests.stop)
        drained = lambda: one.metric("engine_pending") == 0 == one.metric("lag_records")  # noqa: E731
        wait_until(drained, "every second is judged", 120, *workers)
        wanted, found = await traffic.caught_up(kafka, one, two, timeout_s=90)
        idle = lambda: ingest.metric("lag_records") == deliver.metric("lag_records") == 0  # noqa: E731
        wait_until(idle, "all is stored and delivered", 60, *workers)
        assert one.metric("late_total") == 0
        assert all(worker.metric("ready") == 1 for worker in workers)
        assert [worker.stop() for worker in workers] == [0] * len(workers)
    finally:
        requests._stop.set()
        for worker in workers:
            worker.__exit__()
    assert found == wanted
    assert found.findings
    log = await traffic.read(kafka, kafka.topic("events"), kafka.count("events"))
    counted = Counter(event.event_id for r in log if type(event := decode(r.value)) is AuditEvent)
    assert counted.keys() == set(requests.ids)
    store = open_store(StoreConfig(url=str(ingest.folder / "store")))
    try:
        assert store.query("SELECT uniqExact(event_id) AS n FROM events") == [{"n": len(requests.ids)}]
    finally:
        store.close()
    lines = {worker.role: len(worker.log.read_text().splitlines()) for worker in workers}
    print("requests", len(requests.ids), "log lines", lines)
    assert max(lines.values()) < 60 + time.monotonic() - began_s, "an outage must not flood the log"
    assert "Traceback" not in "".join(worker.log.read_text() for worker in workers)


async def _away(broker: RunningBroker, workers: Sequence[Worker], seconds: float) -> None:
    await asyncio.to_thread(broker.kill9)
    try:
        await asyncio.sleep(seconds)
        for worker in workers:
            assert worker.process.poll() is None, f"{worker.role} ended:\n{worker.log.read_text()[-3000:]}"
            assert worker.get("healthz") == "alive\n"
    finally:
        await asyncio.to_thread(broker.start)
    said = {worker.role: worker.log.read_text() for worker in workers}
    assert all("warning" in text or "error" in text for text in said.values()), "each says that Kafka is away"


@pytest.mark.long
async def test_a_broker_away_for_twenty_seconds_is_waited_for(
    broker: RunningBroker, kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    """Requests go on into the journal; afterwards none is lost, none late, none counted twice, and findings are those
    of the log."""
    await _through_an_outage(kafka_config, tmp_path, lambda workers: _away(broker, workers, 20))


@pytest.mark.soak
async def test_a_broker_away_for_ten_minutes_is_waited_for(
    broker: RunningBroker, kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    """The same, for as long as the time rules promise."""
    await _through_an_outage(kafka_config, tmp_path, lambda workers: _away(broker, workers, 600))


@pytest.mark.long
async def test_a_slow_broker_is_waited_for(broker: RunningBroker, kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Stopped for longer than the sessions and let go again, four times: the same."""

    async def bursts(_workers: Sequence[Worker]) -> None:
        for pause_s in (1, 3, 2, 4):
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(pause_s)
            finally:
                os.kill(broker.pid, signal.SIGCONT)
            await asyncio.sleep(1.5)

    await _through_an_outage(kafka_config, tmp_path, bursts)


class _Kept:
    """A store in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, list[StoredEvent]] = {}

    def insert_events(self, rows: Sequence[StoredEvent], *, token: str) -> None:
        self.rows.setdefault(token, list(rows))

    def insert_records(self, rows: Sequence[object], *, token: str) -> None: ...

    def insert_findings(self, findings: Sequence[Finding], *, token: str) -> None: ...

    def insert_status(self, records: Sequence[Mapping[str, object]], *, token: str) -> None: ...


async def test_a_full_disk_holds_ingest_up_and_loses_nothing(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """While its progress can't be written nothing is inserted, and it says why; with room again all is stored once."""
    await ensure_topics(kafka_config)
    folder = tmp_path / "progress"
    folder.mkdir()
    full = [
        folder / f"{kafka_config.topic('events')}-{partition}.{kind}.{os.getpid()}"
        for partition in range(4)
        for kind in ("clock", "intent")
    ]
    for file in full:
        file.symlink_to("/dev/full")  # every write there ends in ENOSPC
    records = traffic.spike(5, 4, int((time.time() - 600) * 1e6), calm_s=20, spike_s=5)
    events = sum(type(decode(value)) is AuditEvent for _, value, _ in records)
    store = _Kept()
    ingest = Ingest(kafka_config, StreamsConfig(), DetectConfig().time, store, data_dir=folder)
    running = asyncio.create_task(ingest.run())
    try:
        await traffic.send(kafka_config, records)
        async with asyncio.timeout(30):
            while "No space left on device" not in ingest.reading().why:  # noqa: ASYNC110  # told by its reading only
                await asyncio.sleep(0.1)
        await asyncio.sleep(6)  # longer than clocks wait to be saved
        assert (store.rows, ingest.reading().ready, running.done()) == ({}, False, False)
        for file in full:
            file.unlink()
        async with asyncio.timeout(40):
            while sum(map(len, store.rows.values())) < events:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert ingest.reading().ready
    finally:
        ingest.stop()
        await running
    stored = Counter(row.event.event_id for rows in store.rows.values() for row in rows)
    assert (len(stored), set(stored.values())) == (events, {1})
    assert not [file for file in folder.iterdir() if file.suffix == f".{os.getpid()}"], "nothing half-written is left"
