"""Ingest: iw.events, iw.findings and iw.status into the store, as an async part of the process that owns the store.

Guarantee: every event is in the store once, and in its minute counters once, across SIGKILL at any moment. Before a
batch is inserted its offsets go to a file; after a crash that very batch is inserted again under the same token, and
the store drops it if it was there. Each row carries what rules T4 to T8 made of it (T11). The clock that decides is
saved every few seconds; what came since is read again, without inserting, to bring it up to date.

One process reads all partitions. Records that are no events are stage 1's to report; here they are only counted.
"""

import asyncio
import fcntl
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from collector.event import AnyRecord, AuditEvent, BadEvent, Heartbeat, Tick, decode, encode
from collector.kafka import AIOKafkaConsumer, ConsumerRecord, KafkaConfig, TopicPartition, ensure_topics, make_consumer
from detectors.config import TimeConfig
from detectors.time import NEVER, PartitionClock
from sinks.clickhouse.rows import StoredEvent, StoredRecord
from streams.config import StreamsConfig
from streams.deadletter import DeadLetters
from streams.health import Reading
from streams.metrics import Histogram
from streams.progress import Intent, Progress, Saved
from streams.storing import Copying, EventStore, Insertions, commit, fetched_all, lag_of, token_of

log = structlog.get_logger(__name__)

ROLE: Final = "ingest"
SAVE_INTERVAL_S: Final = 5.0
"""The clocks are saved this often; after a crash so much is read again."""


class IngestInUse(RuntimeError):
    """Another process ingests with the same folder."""


class Intake:
    """One partition of iw.events on its way into the store: cuts batches and makes rows. The caller does the rest."""

    def __init__(self, topic: str, partition: int, config: TimeConfig, progress: Progress, rows_max: int) -> None:
        self.tp = TopicPartition(topic, partition)
        self.progress = progress
        self.next = 0
        """Offset of the next record to handle."""
        self.unreadable = 0
        self.records: list[StoredRecord] = []
        """Of the last batch, what is to be kept as it was on the wire."""
        self.clock = PartitionClock(config)
        self._rows_max = rows_max
        self._waiting: list[ConsumerRecord] = []
        self._saved = 0
        self._stored_before = 0
        """Records below this are in the store: they only bring the clock up to date."""
        self._again: Intent | None = None
        """The batch that must be inserted as it was."""

    def recover(self, committed: int | None, earliest: int, end: int) -> int:
        """The offset to read from, by what the files say, or else the commit. `earliest` and `end` are the topic's."""
        saved, intent = self.progress.load()
        if max(saved.next if saved else 0, intent.last + 1 if intent else 0) > end:
            log.error(
                "the topic was made anew: ingest starts anew too", topic=self.tp.topic, partition=self.tp.partition
            )
            self.progress.forget()
            saved = intent = committed = None
        self.next = earliest
        if saved is not None:
            self.clock.restore(saved.clock)
            self.next = max(saved.next, earliest)
        known = (saved.next if saved else 0, intent.first if intent else 0, committed or 0)
        self._stored_before = max(known)
        self._again = intent if intent is not None and intent.first == self._stored_before else None
        return self.next

    def feed(self, records: Sequence[ConsumerRecord]) -> None:
        """Records as fetched, in order."""
        self._waiting.extend(records)

    def batch(self) -> list[ConsumerRecord]:
        """The records to handle next; none where there are none, or where the batch to repeat is not there whole."""
        waiting = self._waiting
        if not waiting:
            return []
        before = waiting[0].offset + self._rows_max
        if waiting[0].offset < self._stored_before:
            before = self._stored_before
        elif self._again is not None and waiting[0].offset <= self._again.last:
            if waiting[-1].offset < self._again.last:
                return []
            before = self._again.last + 1
        cut = next((index for index, record in enumerate(waiting) if record.offset >= before), len(waiting))
        batch, self._waiting = waiting[:cut], waiting[cut:]
        return batch

    def rows(self, batch: Sequence[ConsumerRecord]) -> list[StoredEvent]:
        """Applies a batch to the clock, and gives the rows to insert; none where they are stored already."""
        rows: list[StoredEvent] = []
        self.records = []
        for record in batch:
            try:
                event = decode(record.value or b"")
            except BadEvent:
                self.unreadable += 1
                continue
            flag = self.clock.observe(event, append_ms=record.timestamp, offset=record.offset)
            if record.offset < self._stored_before:
                continue
            if isinstance(event, AuditEvent):
                rows.append(StoredEvent(event, record.partition, record.offset, record.timestamp, flag))
            self._keep(event, record)
        self.clock.troubles()  # stage 1's to tell; ingest wants the flags alone
        self.next = batch[-1].offset + 1
        return rows

    def _keep(self, event: AnyRecord, record: ConsumerRecord) -> None:
        """The chain needs every record but heartbeats; most events can be written again from their columns."""
        raw = record.value or b""
        if isinstance(event, Heartbeat | Tick) or (isinstance(event, AuditEvent) and encode(event) == raw):
            return
        kind = type(event).__struct_config__.tag
        self.records.append(StoredRecord(raw, str(kind), record.partition, record.offset, record.timestamp))

    def stored(self) -> bool:
        """The rows of the last batch are in the store. True where that is news: commits must never go back."""
        news = self.next > self._stored_before
        self._stored_before = max(self._stored_before, self.next)
        return news

    def save(self) -> None:
        """Saves the clock, unless rows that it has seen are still on their way."""
        if self._stored_before >= self.next > self._saved:
            self.progress.save(Saved(self.next, self.clock.state))
            self._saved = self.next


class Ingest:
    """Reads the three topics until stopped. `run` in the event loop of the process that owns the store."""

    def __init__(
        self, kafka: KafkaConfig, streams: StreamsConfig, time: TimeConfig, store: EventStore, *, data_dir: Path
    ) -> None:
        """`time` must be what stage 1 has (`detect.time`); `data_dir` keeps the progress and belongs to the store."""
        self._kafka, self._streams, self._time, self._store = kafka, streams, time, store
        self._folder = data_dir
        self._insertions = Insertions()
        self._letters = DeadLetters(kafka, ROLE)
        self._copying = Copying(kafka, streams, store, self._letters, self._insertions)
        self._intakes: dict[TopicPartition, Intake] = {}
        self._consumer: AIOKafkaConsumer | None = None
        self._stop = asyncio.Event()
        self._stored = self._handled = 0
        self._sizes = Histogram.of_records()

    async def run(self) -> None:
        """Ingests until `stop`. Raises BrokerAway, TopicMismatch or IngestInUse, each with one sentence."""
        await ensure_topics(self._kafka)
        with self._own_folder():
            tasks = [asyncio.create_task(job) for job in (self._stop.wait(), self._events(), self._copying.run())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._letters.close()

    def stop(self) -> None:
        """Ends `run` soon; what was not stored is read again at the next start."""
        self._stop.set()

    def reading(self) -> Reading:
        """The health of ingest."""
        counters: Counter[str] = Counter()
        watermarks = []
        for intake in self._intakes.values():
            counters.update(intake.clock.counters)
            counters["unreadable"] += intake.unreadable
            watermarks.append(intake.clock.watermark_us)
        late, unreadable = counters.pop("late", 0), counters.pop("unreadable", 0)
        done = {tp: intake.next for tp, intake in self._intakes.items()}
        least = min(watermarks, default=NEVER)
        started = fetched_all(self._consumer) and self._copying.started()
        return Reading(
            ready=started and not self._insertions.why,
            why=self._insertions.why or ("" if started else "starting"),
            lag=lag_of(self._consumer, done) + self._copying.lag(),
            watermark_us=None if least == NEVER else least,
            late=late,
            drops=unreadable + self._letters.count,
            totals={
                "records": self._handled,
                "stored": self._stored,
                "copied": self._copying.copied,
                "store_retries": self._insertions.retries,
                "dead_letters": self._letters.count,
                "duplicates": counters.pop("duplicate", 0),
                "quarantined": counters.pop("quarantined", 0),
            },
            histograms={"batch_records": self._sizes},
            levels={f"clock_{name}": float(value) for name, value in counters.items()},
        )

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise IngestInUse(f"another process ingests with {self._folder}: stop it first") from None
            yield

    async def _events(self) -> None:
        consumer = make_consumer(self._kafka, group_id=f"{self._kafka.topic_prefix}-ingest")
        await consumer.start()
        try:
            await self._recover(consumer)
            self._consumer = consumer
            loop = asyncio.get_running_loop()
            saved_s = loop.time()
            interval_s = self._streams.ingest_interval_ms / 1000
            while True:
                began_s = loop.time()
                fetched = await consumer.getmany(
                    timeout_ms=self._streams.ingest_interval_ms, max_records=self._streams.ingest_rows_max
                )
                for tp, records in fetched.items():
                    self._intakes[tp].feed(records)
                    await self._insert(consumer, self._intakes[tp])
                if loop.time() - saved_s > SAVE_INTERVAL_S:
                    saved_s = loop.time()
                    self._save()
                if sum(map(len, fetched.values())) < self._streams.ingest_rows_max:
                    await asyncio.sleep(interval_s - (loop.time() - began_s))
        finally:
            self._save()
            await consumer.stop()

    async def _recover(self, consumer: AIOKafkaConsumer) -> None:
        topic = self._kafka.topic("events")
        tps = [TopicPartition(topic, partition) for partition in range(self._kafka.count("events"))]
        consumer.assign(tps)
        earliest, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
        for tp in tps:
            progress = Progress(self._folder, tp.topic, tp.partition)
            intake = Intake(topic, tp.partition, self._time, progress, self._streams.ingest_rows_max)
            consumer.seek(tp, intake.recover(await consumer.committed(tp), earliest[tp], ends[tp]))
            self._intakes[tp] = intake

    async def _insert(self, consumer: AIOKafkaConsumer, intake: Intake) -> None:
        while batch := intake.batch():
            first, last = batch[0].offset, batch[-1].offset
            self._handled += len(batch)
            self._sizes.add(len(batch))
            rows = intake.rows(batch)
            if rows or intake.records:
                token = token_of(intake.tp.topic, intake.tp.partition, first, last)
                await self._insertions.make(partial(self._intend_and_insert, intake, first, last), rows, token)
                self._stored += len(rows)
            if intake.stored():
                await commit(consumer, intake.tp, last + 1)

    def _intend_and_insert(
        self, intake: Intake, first: int, last: int, rows: Sequence[StoredEvent], *, token: str
    ) -> None:
        intake.progress.intend(first, last)
        self._store.insert_records(intake.records, token=token)
        self._store.insert_events(rows, token=token)

    def _save(self) -> None:
        for intake in self._intakes.values():
            try:
                intake.save()
            except OSError as error:
                # The disk is full: more is read again after a crash, until a later one succeeds.
                log.warning("clock not saved", topic=intake.tp.topic, partition=intake.tp.partition, error=str(error))
