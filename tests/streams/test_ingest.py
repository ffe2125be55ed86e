"""Ingest stores every event once, wherever it is killed."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from collector.event import AuditEvent, Rejection, decode
from collector.kafka import ConsumerRecord, KafkaConfig, TopicPartition, ensure_topics
from detectors.config import DetectConfig
from detectors.finding import Finding
from detectors.time import Flag, PartitionClock
from sinks.clickhouse.rows import StoredEvent, StoredRecord
from sinks.clickhouse.store import open_store
from sinks.config import StoreConfig
from streams import ingest as ingest_module
from streams.config import StreamsConfig
from streams.ingest import Ingest, IngestInUse
from streams.progress import Progress
from tests.streams import traffic
from tests.streams.worker import Worker, wait_until

TIME = DetectConfig().time
START_US = 1_700_000_000_000_000


class Killed(BaseException):
    """SIGKILL, as far as one process can play it."""


@dataclass
class Log:
    """A topic and a store, with a chance of SIGKILL at every step between them."""

    records: Mapping[TopicPartition, list[ConsumerRecord]]
    chance: random.Random
    death: float
    committed_at: dict[TopicPartition, int] = field(default_factory=dict)
    tokens: dict[str, list[tuple[int, int, Flag]]] = field(default_factory=dict)
    counted: Counter[tuple[int, int]] = field(default_factory=Counter)
    flags: dict[tuple[int, int], Flag] = field(default_factory=dict)
    kept: dict[str, list[StoredRecord]] = field(default_factory=dict)
    dead: bool = False
    at: dict[TopicPartition, int] = field(default_factory=dict)

    def may_die(self) -> None:
        if self.dead or self.chance.random() < self.death:
            self.dead = True
            raise Killed

    # The consumer.
    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def assign(self, tps: Sequence[TopicPartition]) -> None:
        self.at = dict.fromkeys(tps, 0)

    def assignment(self) -> set[TopicPartition]:
        return set(self.at)

    def highwater(self, tp: TopicPartition) -> int:
        return len(self.records[tp])

    async def beginning_offsets(self, tps: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(tps, 0)

    async def end_offsets(self, tps: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return {tp: len(self.records[tp]) for tp in tps}

    async def committed(self, tp: TopicPartition) -> int | None:
        return self.committed_at.get(tp)

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self.at[tp] = offset

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[ConsumerRecord]]:
        self.may_die()
        fetched = {}
        for tp, at in self.at.items():
            records = self.records[tp][at : at + self.chance.randrange(1, 2 * max_records)]
            if records:
                fetched[tp] = records
                self.at[tp] = records[-1].offset + 1
        if not fetched:
            raise asyncio.CancelledError  # all is read: the test is over
        return fetched

    async def commit(self, offsets: Mapping[TopicPartition, tuple[int, str]]) -> None:
        self.may_die()
        for tp, (offset, _) in offsets.items():
            assert offset > self.committed_at.get(tp, 0), "a commit went back"
            self.committed_at[tp] = offset
        self.may_die()

    # The store.
    def insert_events(self, rows: Sequence[StoredEvent], *, token: str) -> None:
        self.may_die()
        seen = [(row.partition, row.offset, row.flag) for row in rows]
        if self.tokens.setdefault(token, seen) is seen:
            self.counted.update((partition, offset) for partition, offset, _ in seen)
            self.flags |= {(partition, offset): flag for partition, offset, flag in seen}
        assert self.tokens[token] == seen, f"other rows under {token}"
        self.may_die()

    def insert_records(self, rows: Sequence[StoredRecord], *, token: str) -> None:
        self.may_die()
        seen = self.kept.setdefault(token, list(rows))
        assert seen == list(rows), f"other records under {token}"

    def insert_findings(self, findings: Sequence[Finding], *, token: str) -> None: ...

    def insert_status(self, records: Sequence[Mapping[str, object]], *, token: str) -> None: ...


def _log(seed: int) -> dict[TopicPartition, list[ConsumerRecord]]:
    """Two partitions of events with duplicates, late ones, one from the future and one that is no event."""
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    records: dict[TopicPartition, list[ConsumerRecord]] = {TopicPartition("iw.events", p): [] for p in (0, 1)}
    made = traffic.spike(seed, 2, START_US, calm_s=20, spike_s=5, per_second=4)
    for number, (key, value, partition) in enumerate(made):
        lane = records[TopicPartition("iw.events", partition)]
        append_ms = START_US // 1000 + number * 10 - (90_000 if number == 40 else 0)
        values = [value] * (2 if chance.random() < 0.1 else 1) + ([b"no event"] if chance.random() < 0.05 else [])
        for each in values:
            lane.append(ConsumerRecord("iw.events", partition, len(lane), append_ms, 1, key, each, None, 0, 0, ()))
    return records


def _undisturbed(records: Mapping[TopicPartition, Sequence[ConsumerRecord]]) -> dict[tuple[int, int], Flag]:
    flags: dict[tuple[int, int], Flag] = {}
    for tp, lane in records.items():
        clock = PartitionClock(TIME)
        for record in lane:
            if record.value == b"no event":
                continue
            event = decode(record.value)
            flag = clock.observe(event, append_ms=record.timestamp, offset=record.offset)
            if isinstance(event, AuditEvent | Rejection):
                flags[tp.partition, record.offset] = flag
    return flags


@pytest.mark.parametrize("seed", range(40))
async def test_every_event_is_stored_once_wherever_ingest_is_killed(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any step, any number of times: each event counts once, with the flag of an undisturbed run."""
    print(f"seed {seed}")
    log = Log(_log(seed), random.Random(seed), death=0.08)  # noqa: S311
    kafka = KafkaConfig(partitions={"events": 2})
    streams = StreamsConfig(ingest_rows_max=7, ingest_interval_ms=10)
    monkeypatch.setattr(ingest_module, "make_consumer", lambda *_, **__: log)
    monkeypatch.setattr(ingest_module, "SAVE_INTERVAL_S", -1 if seed % 2 else 0.05)
    monkeypatch.setattr(asyncio, "to_thread", _here)
    intend, save = Progress.intend, Progress.save

    def mortal_intend(self: Progress, first: int, last: int) -> None:
        log.may_die()
        intend(self, first, last)
        log.may_die()

    def mortal_save(self: Progress, saved: object) -> None:
        if not log.dead:
            save(self, saved)  # type: ignore[arg-type]

    monkeypatch.setattr(Progress, "intend", mortal_intend)
    monkeypatch.setattr(Progress, "save", mortal_save)
    lives = 0
    while lives < 1000:
        lives += 1
        log.dead = False
        ingest = Ingest(kafka, streams, TIME, log, data_dir=tmp_path)
        try:
            await ingest._events()
        except Killed:
            continue
        except asyncio.CancelledError:
            break
    assert lives > 3, "it was never killed"
    assert log.flags == _undisturbed(log.records)
    assert set(log.counted.values()) == {1}
    assert {"taken", "duplicate", "quarantined"} <= set(log.flags.values())


async def _here(function: object, *arguments: object, **named: object) -> object:
    return function(*arguments, **named)  # type: ignore[operator]


async def test_without_its_files_ingest_goes_on_from_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is brought up to date from the topic's beginning, and only what was not committed is inserted."""
    log = Log(_log(1), random.Random(1), death=0)  # noqa: S311
    log.committed_at = {TopicPartition("iw.events", 0): 30, TopicPartition("iw.events", 1): 0}
    monkeypatch.setattr(ingest_module, "make_consumer", lambda *_, **__: log)
    ingest = Ingest(KafkaConfig(partitions={"events": 2}), StreamsConfig(), TIME, log, data_dir=tmp_path)
    with pytest.raises(asyncio.CancelledError):
        await ingest._events()
    wanted = {place: flag for place, flag in _undisturbed(log.records).items() if place[0] == 1 or place[1] >= 30}
    assert log.flags == wanted


async def test_one_folder_has_one_ingest(tmp_path: Path) -> None:
    """The second process is told so instead of storing twice."""
    first, second = (
        Ingest(KafkaConfig(), StreamsConfig(), TIME, Log({}, random.Random(0), 0), data_dir=tmp_path)  # noqa: S311
        for _ in range(2)
    )
    with first._own_folder(), pytest.raises(IngestInUse, match="another process ingests"), second._own_folder():
        pass


@pytest.mark.kafka
async def test_a_killed_store_process_loses_and_doubles_nothing(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """SIGKILL of the process that holds chDB, three times in mid-stream: rows and minute counters are exact."""
    await ensure_topics(kafka_config)
    an_hour_ago_us = time.time_ns() // 1000 - 3600 * traffic.SECOND_US  # counters of long ago would expire at once
    records = traffic.spike(3, 4, an_hour_ago_us, calm_s=120, spike_s=20)
    events = sum(type(decode(value)) is AuditEvent for _, value, _ in records)
    step = len(records) // 4 + 1
    quick = {"ingest_interval_ms": 20, "ingest_rows_max": 100}
    with Worker("ingest", kafka_config, tmp_path, **quick) as worker:  # type: ignore[arg-type]
        progress = worker.folder / "progress"
        for start in range(0, len(records), step):
            await traffic.send(kafka_config, records[start : start + step])
            wait_until(lambda: any(progress.glob("*.intent")), "something is being stored", 60, worker)
            await asyncio.sleep(0.1)
            worker.kill9()
            worker.start()
        wait_until(
            lambda: worker.metric("ready") == 1 and worker.metric("lag_records") == 0, "all is stored", 60, worker
        )
        worker.send(signal.SIGTERM)
        assert await asyncio.to_thread(worker.process.wait, 20) == 0
    store = open_store(StoreConfig(url=str(worker.folder / "store")))
    try:
        assert store.query("SELECT count() AS n, uniqExact(event_id) AS ids FROM events") == [
            {"n": events, "ids": events}
        ]
        assert store.query("SELECT sum(events) AS n FROM events_1m") == [{"n": events}]
    finally:
        store.close()
