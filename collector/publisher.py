"""The publisher: every request's audit event, in the journal before it counts, in Kafka as soon as Kafka takes it.

`begin` before the engine works, `finish` before the last byte of the answer leaves. Both write to the journal (a few
µs) and never wait for Kafka; a thread with an event loop of its own feeds Kafka from the journal.

Guarantee: what `begin` returned from has exactly one event in the end: the one that `finish` made, or, where the
process died first, one with status `lost` that the next start makes. In Kafka at least once, in order per lane; a
record sent twice has the same lane and `seq`. A stop or SIGKILL loses nothing; loss of power what `fsync_ms` allows.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final, cast

import msgspec
import structlog

from collector.config import JournalConfig, PublisherConfig
from collector.event import (
    AuditEvent,
    Change,
    Goodbye,
    Heartbeat,
    Hello,
    Integrity,
    Rejection,
    from_timestamp_us,
    uuid7,
)
from collector.journal import Journal, JournalFull
from collector.kafka import (
    AIOKafkaProducer,
    BrokerAway,
    KafkaConfig,
    KafkaError,
    ensure_topics,
    make_producer,
    partition_for,
    wait_for_broker,
)
from collector.lanes import Book, Closed, Counters, Ticket
from collector.recovery import Meta, recover
from collector.sender import Sender, Tail, drop_producer

__all__ = ["ClockApart", "Closed", "Counters", "JournalFull", "Publisher", "Ticket"]

log = structlog.get_logger(__name__)

_PROBES: Final = 3
"""Records that measure the broker's clock; the one with the shortest round trip counts."""


class ClockApart(RuntimeError):
    """This host's clock is too far from the broker's."""


def system_clock_us() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


class Publisher:
    """One process's events. `start` once, then `begin` / `finish` / `reject` from any thread, `stop` once."""

    def __init__(
        self,
        kafka: KafkaConfig,
        config: PublisherConfig,
        journal: JournalConfig,
        *,
        collector_id: str,
        model_version: str,
        boot: str | None = None,
        config_digest: str = "",
        clock_us: Callable[[], int] = system_clock_us,
    ) -> None:
        self.boot = boot or uuid7()
        self.collector_id, self.model_version = collector_id, model_version
        self.counters = Counters()
        self._kafka, self._config, self._journal_config = kafka, config, journal
        self._config_digest, self._clock_us = config_digest, clock_us
        self._topic = kafka.topic("events")
        self._partitions = 0
        self._clock_offset_ms = 0.0
        self._book: Book | None = None
        self._sender: Sender | None = None
        self._tail: Tail | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._idle = False
        self._stopping = False

    # -- what the engine and the gate call

    def start(self) -> None:
        """Settle dead boots, compare clocks, open all lanes; returns when Kafka has every hello.

        Raises BrokerAway, TopicMismatch, ClockApart or OSError, each with one sentence, after at most
        `start_timeout_ms` (the settling of dead boots not counted).
        """
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="inferwatch-publisher", daemon=True)
        self._thread.start()
        opened.result()

    def begin(self, *, key: str, known: Mapping[str, object]) -> Ticket:
        """Journal that a request is about to be worked on. `key` decides its partition: the user's pseudonym.

        `known`: AuditEvent fields known by now, so that a `lost` event has them. Raises JournalFull at the journal's
        bound (refuse the request), Closed when not running.
        """
        return self._open_book().begin(key, partition_for(key.encode(), self._partitions), known)

    def finish(self, ticket: Ticket, **fields: Any) -> AuditEvent:
        """Stamp and journal the request's event; a second call returns the first one's. `fields` go over `known`.

        `latency_ms` is measured from `begin` where it is not given. Raises JournalFull where the disk is full (the
        ticket stays open, the answer must not leave), TypeError for a field that no event has.
        """
        return ticket.event or self._open_book().finish(ticket, AuditEvent, fields)

    def reject(self, *, key: str, **fields: Any) -> Rejection:
        """A request refused before the engine saw it. Raises JournalFull (counted as dropped), Closed, TypeError."""
        book = self._open_book()
        try:
            ticket = book.begin(key, partition_for(key.encode(), self._partitions), {"status": "rejected"} | fields)
        except JournalFull:
            self.counters.dropped += 1
            raise
        return cast(Rejection, book.finish(ticket, Rejection, {}))

    def change(self, *, key: str, subject: str, before: str = "", after: str = "", tenant: str = "") -> Change:
        """Tell that something changed what is normal: a model, adapter, guard, template, key or config."""
        partition = partition_for(key.encode(), self._partitions)
        fields = {"subject": subject, "before": before, "after": after, "tenant": tenant}
        return self._open_book().control(partition, Change, key.encode(), **fields)

    def lag(self) -> int:
        """Records in the journal that Kafka has not acknowledged."""
        return self._book.lag(self._tail.acked) if self._book and self._tail else 0

    def stop(self, timeout_s: float = 10) -> bool:
        """Close what is open as aborted, say goodbye on all lanes, wait for Kafka; True when it has everything.

        Otherwise the rest stays in the journal for the next start. Call it once; afterwards `begin` raises Closed.
        """
        book, thread = self._book, self._thread
        if book is None or thread is None or self._loop is None:
            return False
        book.close()
        try:
            for ticket in list(book.open.values()):
                book.finish(ticket, AuditEvent, {"status": "aborted", "reason": "the collector stopped"})
            for partition in range(self._partitions):
                book.control(partition, Goodbye)
        except JournalFull:
            log.warning("no room in the journal to say goodbye; the next start will")
        self._stopping = True
        self._loop.call_soon_threadsafe(self._wake.set)
        thread.join(timeout_s)
        if thread.is_alive():
            self._loop.call_soon_threadsafe(self._give_up)
            thread.join(5)
        complete = book.lag(self._tail.acked if self._tail else {}) == 0
        if complete:
            book.journal.destroy()
        else:
            log.warning("stopped before Kafka had everything; the next start sends it", folder=str(book.journal.folder))
            book.journal.close()
        self._book = None
        return complete

    def _open_book(self) -> Book:
        if self._book is None:
            raise Closed("the publisher is not running")
        return self._book

    # -- the thread that feeds Kafka

    def _run(self, opened: "Future[None]") -> None:
        try:
            asyncio.run(self._main(opened))
        except BaseException as error:  # noqa: BLE001  # told to whoever waits in start, or logged
            if opened.done():
                log.critical("the publisher's thread ended", error=type(error).__name__)
            else:
                opened.set_exception(error)

    async def _main(self, opened: "Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._sender = Sender(self._connect, self._topic, self._config)
        try:
            await self._open_lanes(self._sender)
            opened.set_result(None)
            beating = asyncio.create_task(self._beat())
            telling = asyncio.create_task(self._tell())
            syncing = asyncio.create_task(self._sync())
            self._feeding = asyncio.create_task(self._feed())
            await asyncio.wait([self._feeding])
            for task in (beating, telling, syncing):
                task.cancel()
        finally:
            await self._sender.close()

    async def _connect(self) -> AIOKafkaProducer:
        producer = make_producer(self._kafka, client_id=self.collector_id, linger_ms=0)
        try:
            await producer.start()
        except BaseException:
            await drop_producer(producer)
            raise
        return producer

    async def _open_lanes(self, sender: Sender) -> None:
        timeout_s = self._config.start_timeout_ms / 1000
        await wait_for_broker(self._kafka, timeout_s)
        self._partitions = (await ensure_topics(self._kafka))[self._topic]
        await self._compare_clocks()
        await recover(
            self._journal_config,
            sender,
            collector_id=self.collector_id,
            model_version=self.model_version,
            clock_us=self._clock_us,
        )
        meta = msgspec.json.encode(Meta(self.collector_id, self.model_version))
        journal = Journal(self._journal_config, self.boot, meta)
        book = Book(
            journal,
            collector_id=self.collector_id,
            model_version=self.model_version,
            clock_us=self._clock_us,
            counters=self.counters,
        )
        for partition in range(self._partitions):
            book.control(
                partition,
                Hello,
                model_version=self.model_version,
                inferwatch_version=version("inferwatch"),
                config_digest=self._config_digest,
                clock_offset_ms=self._clock_offset_ms,
            )
        self._tail = Tail(book)
        try:
            async with asyncio.timeout(timeout_s):
                await sender.drain(self._tail)
        except TimeoutError:
            journal.close()
            raise BrokerAway(f"Kafka did not take the lanes' first records within {timeout_s:g} s") from None
        book.wake = self._wake_up
        self._book = book

    async def _compare_clocks(self) -> None:
        """Raise ClockApart where this clock and the broker's differ by more than the configuration allows."""
        producer = await self._connect()
        try:
            trips = []
            for _ in range(_PROBES):
                sent_us = self._clock_us()
                stored = await self._write_status(producer, "starting")
                back_us = self._clock_us()
                trips.append((back_us - sent_us, (sent_us + back_us) / 2000 - stored))
        finally:
            await drop_producer(producer)
        self._clock_offset_ms = round(min(trips)[1], 3)
        if abs(self._clock_offset_ms) > self._config.clock_offset_max_ms:
            way = "ahead of" if self._clock_offset_ms > 0 else "behind"
            told = f"this host's clock is {abs(self._clock_offset_ms) / 1000:.1f} s {way} the Kafka broker's"
            if not self._config.clock_offset_allowed:
                raise ClockApart(f"{told}: set it right, or set clock_offset_allowed in [collector.publisher]")
            log.warning(told)

    async def _write_status(self, producer: AIOKafkaProducer, state: str) -> int:
        """Write the health record; returns the broker's append time, ms."""
        process_id = f"collector-{self.collector_id}-{self.boot}"
        record = msgspec.json.encode({"process_id": process_id, "role": "collector", "state": state, **self._health()})
        sent = await producer.send_and_wait(self._kafka.topic("status"), record, key=process_id.encode())
        return cast(int, sent.timestamp)

    def _health(self) -> dict[str, object]:
        book, counters = self._book, self.counters
        away = self._sender is not None and self._sender.away
        totals = {"events": counters.events, "rejections": counters.rejections, "oversized": counters.oversized}
        totals |= {"invalid": counters.invalid, "engine_requests": counters.engine_requests}
        return {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "version": version("inferwatch"),
            "config_digest": self._config_digest,
            "ready": book is not None and not away,
            "why": "Kafka does not take events" if away else "",
            "lag": self.lag(),
            "watermark": from_timestamp_us(book.last_us).isoformat(timespec="milliseconds") if book else "",
            "late": 0,
            "drops": counters.dropped,
            "totals": totals,
            "levels": {"in_flight": len(book.open), "journal_bytes": book.journal.bytes} if book else {},
        }

    async def _feed(self) -> None:
        """Drain the journal whenever there is something, until stopped and everything is acknowledged."""
        if self._tail is None or self._sender is None:
            return
        damaged = 0
        while True:
            stopping = self._stopping
            self._wake.clear()
            self._idle = False
            await self._sender.drain(self._tail)
            if self._tail.damaged_bytes > damaged and self._book is not None:
                size, damaged = self._tail.damaged_bytes - damaged, self._tail.damaged_bytes
                log.error("the journal was damaged on disk", bytes=size)
                self._book.control(0, Integrity, problem="journal damaged", size_bytes=size)
            if stopping and self.lag() == 0:
                return
            self._idle = True
            if self.lag() == 0:
                await self._wake.wait()
            await asyncio.sleep(self._config.linger_ms / 1000)

    def _wake_up(self) -> None:
        if self._idle and self._loop is not None:
            self._idle = False
            self._loop.call_soon_threadsafe(self._wake.set)

    def _give_up(self) -> None:
        self._feeding.cancel()

    async def _beat(self) -> None:
        """A heartbeat for each lane that is silent; looks often enough to be at most a fifth late."""
        silence_s = self._config.heartbeat_ms / 1000
        while self._book is not None and self._tail is not None:
            await asyncio.sleep(silence_s / 5)
            book = self._book
            if self._stopping or book is None:
                return
            for partition in book.silent(silence_s, self._tail.acked):
                try:
                    book.control(partition, Heartbeat, **self._beat_fields(book))
                except JournalFull:
                    break

    def _beat_fields(self, book: Book) -> dict[str, Any]:
        counters = self.counters
        return {
            "engine_requests": counters.engine_requests,
            "events": counters.events,
            "rejections": counters.rejections,
            "in_flight": len(book.open),
            "dropped": counters.dropped + counters.oversized + counters.invalid,
            "journal_bytes": book.journal.bytes,
            "guard_errors": dict(counters.guard_errors),
        }

    async def _sync(self) -> None:
        """fsync against loss of power, every `fsync_ms`, off this loop; the disk may take its time."""
        period_s = self._journal_config.fsync_ms / 1000
        written = None
        while period_s and self._book is not None:
            await asyncio.sleep(period_s)
            book = self._book
            if book is not None and written != book.journal.end:
                written = book.journal.end
                try:
                    await asyncio.to_thread(book.sync)
                except OSError as error:
                    log.error("the journal could not be synced to disk", error=type(error).__name__)

    async def _tell(self) -> None:
        """The health record, every `status_ms`, with a producer of its own: it may never hold up an event."""
        while True:
            try:
                producer = await self._connect()
                try:
                    while True:
                        async with asyncio.timeout(self._config.status_ms / 1000 + 5):
                            await self._write_status(producer, "running")
                        await asyncio.sleep(self._config.status_ms / 1000)
                finally:
                    await drop_producer(producer)
            except (KafkaError, OSError, TimeoutError):
                await asyncio.sleep(self._config.status_ms / 1000)
