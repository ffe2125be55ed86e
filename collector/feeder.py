"""The thread's loop that feeds Kafka: opens the lanes, drains the journal, beats, tells its health, says when it fails.

Nothing here is waited for by a request. What goes wrong while feeding is logged and tried again: the journal keeps what
is unsent, and its bound is what finally refuses requests.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

import msgspec
import structlog

from collector.checkpoints import ENDED_MAX, Checkpoints, ended_boots, forget
from collector.config import EvidenceConfig, JournalConfig, PublisherConfig
from collector.event import Heartbeat, Hello, Integrity, from_timestamp_us
from collector.journal import Journal, JournalFull
from collector.kafka import (
    AIOKafkaProducer,
    BrokerAway,
    KafkaConfig,
    KafkaError,
    ensure_topics,
    make_producer,
    wait_for_broker,
)
from collector.lanes import Book
from collector.recovery import recover
from collector.sender import Sender, Tail, drop_producer
from collector.signing import Signer, SigningKeyProblem
from collector.tickets import Closed, Counters, Meta

log = structlog.get_logger(__name__)

_PROBES: Final = 3
"""Records that measure the broker's clock; the one with the shortest round trip counts."""
_MISHAP_PAUSE_S: Final = 1.0
_SOON: Final = 0.5
"""A lane that has been silent for this share of the time that asks for a heartbeat."""
_PENDING_S: Final = 0.25
"""How often it is looked whether a lane has many records without a checkpoint."""


class ClockApart(RuntimeError):
    """This host's clock is too far from the broker's."""


class Feeder:
    """Everything of one publisher that runs on its loop. `open`, then `run`; `finish` and `give_up` from outside."""

    def __init__(
        self,
        kafka: KafkaConfig,
        config: PublisherConfig,
        journal: JournalConfig,
        evidence: EvidenceConfig,
        *,
        meta: Meta,
        boot: str,
        config_digest: str,
        counters: Counters,
        clock_us: Callable[[], int],
    ) -> None:
        self.partitions = 0
        self._kafka, self._config, self._journal_config, self._evidence = kafka, config, journal, evidence
        self._meta, self._boot, self._config_digest = meta, boot, config_digest
        self._counters, self._clock_us = counters, clock_us
        self._topic = kafka.topic("events")
        self._sender = Sender(self._connect, self._topic, config)
        self._book: Book | None = None
        self._tail: Tail | None = None
        self.checkpoints: Checkpoints | None = None
        self._troubles: dict[str, str] = {}
        """What fails now, and with which error."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._idle = False
        self._finishing = False
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> Book:
        """Compare clocks, settle dead boots, open all lanes; returns when Kafka has every hello.

        Raises BrokerAway, TopicMismatch, ClockApart, JournalBusy, JournalFull, SigningKeyProblem, OSError.
        """
        key_file = self._evidence.signing_key_file
        signer = Signer.load(key_file) if key_file is not None else None
        if signer is None:
            log.warning("checkpoints are not signed: no signing_key_file in [collector.evidence]")
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        timeout_s = self._config.start_timeout_ms / 1000
        try:
            await wait_for_broker(self._kafka, timeout_s)
            async with asyncio.timeout(timeout_s):
                self.partitions = (await ensure_topics(self._kafka))[self._topic]
                offset_ms = await self._compare_clocks()
        except TimeoutError:
            raise self._away(f"did not answer within {timeout_s:g} s") from None
        except KafkaError as error:
            raise self._away(f"can't be used: {type(error).__name__}") from None
        await recover(self._journal_config, self._sender, heir=self._meta, clock_us=self._clock_us, signer=signer)
        journal = Journal(self._journal_config, self._boot)
        try:
            return await self._open_lanes(journal, offset_ms, timeout_s, signer)
        except BaseException:
            journal.close()
            raise

    async def _open_lanes(self, journal: Journal, offset_ms: float, timeout_s: float, signer: Signer | None) -> Book:
        ended = ended_boots(self._journal_config.dir)[:ENDED_MAX]
        book = Book(
            journal,
            collector_id=self._meta.collector_id,
            model_version=self._meta.model_version,
            clock_us=self._clock_us,
            counters=self._counters,
        )
        for partition in range(self.partitions):
            book.control(
                partition,
                Hello,
                model_version=self._meta.model_version,
                inferwatch_version=version("inferwatch"),
                config_digest=self._config_digest,
                clock_offset_ms=offset_ms,
                ended=ended,
            )
        checkpoints = Checkpoints(book, signer)
        if signer is not None and signer.before:
            checkpoints.rotated(signer)
        tail = Tail(book, before_release=checkpoints.make)
        try:
            async with asyncio.timeout(timeout_s):
                await self._sender.drain(tail)
        except TimeoutError:
            raise self._away(f"did not take the lanes' first records within {timeout_s:g} s") from None
        if ended:
            forget(self._journal_config.dir, ended)
        book.wake = self._wake_up
        self._book, self._tail, self.checkpoints = book, tail, checkpoints
        return book

    def _away(self, what: str) -> BrokerAway:
        return BrokerAway(f"Kafka at {self._kafka.bootstrap_servers} {what}")

    async def _connect(self) -> AIOKafkaProducer:
        producer = make_producer(self._kafka, client_id=self._meta.collector_id, linger_ms=0)
        try:
            await producer.start()
        except BaseException:
            await drop_producer(producer)
            raise
        return producer

    async def _compare_clocks(self) -> float:
        """This clock minus the broker's, ms. Raises ClockApart beyond what the configuration allows."""
        producer = await self._connect()
        try:
            trips = []
            for _ in range(_PROBES):
                sent_us = self._clock_us()
                stored_ms = await self._write_status(producer, "starting")
                back_us = self._clock_us()
                trips.append((back_us - sent_us, (sent_us + back_us) / 2000 - stored_ms))
        finally:
            await drop_producer(producer)
        offset_ms = round(min(trips)[1], 3)
        if abs(offset_ms) > self._config.clock_offset_max_ms:
            way = "ahead of" if offset_ms > 0 else "behind"
            told = f"this host's clock is {abs(offset_ms) / 1000:.1f} s {way} the Kafka broker's"
            if not self._config.clock_offset_allowed:
                raise ClockApart(f"{told}: set it right, or set clock_offset_allowed in [collector.publisher]")
            log.warning(told)
        return offset_ms

    # -- while the lanes are open

    async def run(self) -> None:
        """Feed until `finish` was called and Kafka has everything, or `give_up` was."""
        if self._tail is None or self._book is None or self.checkpoints is None:
            raise Closed("the lanes are not open")
        book, tail = self._book, self._tail
        works = (self._beat(book, tail), self._tell(), self._sync(book), self._sign(self.checkpoints))
        beside = [asyncio.create_task(work) for work in works]
        self._task = asyncio.create_task(self._feed(book, tail))
        try:
            await asyncio.wait([self._task])
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)

    async def close(self) -> None:
        """Drop the producer."""
        await self._sender.close()

    def finish(self) -> None:
        """End `run` when Kafka has everything. From any thread."""
        self._finishing = True
        self._call(self._wake.set)

    def give_up(self) -> None:
        """End `run` now; the journal keeps the rest. From any thread."""
        self._call(lambda: self._task.cancel() if self._task is not None else None)

    def _call(self, what: Callable[[], object]) -> None:
        # The loop may have ended meanwhile: then there is nobody to tell.
        with suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(what)

    @property
    def complete(self) -> bool:
        """Whether Kafka has everything that the journal holds."""
        return self._tail is not None and self._tail.at_end

    def lag(self) -> int:
        """Records in the journal that Kafka has not acknowledged."""
        return self._book.lag(self._tail.acked) if self._book is not None and self._tail is not None else 0

    def _wake_up(self) -> None:
        if self._idle:
            self._idle = False
            self._call(self._wake.set)

    async def _feed(self, book: Book, tail: Tail) -> None:
        damaged_bytes = 0
        while True:
            finishing = self._finishing
            self._wake.clear()
            self._idle = False
            try:
                await self._sender.drain(tail)
                if tail.damaged_bytes > damaged_bytes:
                    size_bytes, damaged_bytes = tail.damaged_bytes - damaged_bytes, tail.damaged_bytes
                    log.error("the journal was damaged on disk", bytes=size_bytes)
                    book.control(0, Integrity, problem="journal damaged", size_bytes=size_bytes)
                if not book.journal.folder.exists():
                    self._stop_for_good(book)
            except Exception as error:  # noqa: BLE001  # one mishap must not end the audit; told, and tried again
                self._mishap("feeding Kafka", error)
                await asyncio.sleep(_MISHAP_PAUSE_S)
                continue
            self._troubles.pop("feeding Kafka", None)
            if finishing and tail.at_end:
                return
            # A record that comes alone goes at once; under load each batch costs the server some 0.5 ms, however small.
            await asyncio.sleep(min(self._config.linger_ms, self._config.heartbeat_ms) / 1000)
            self._idle = True
            if tail.at_end and not self._finishing:
                await self._wake.wait()

    def _stop_for_good(self, book: Book) -> None:
        book.close()
        raise FileNotFoundError(f"{book.journal.folder} was removed while in use: no request may begin any more")

    def _mishap(self, what: str, error: Exception) -> None:
        trouble = f"{what} failed: {type(error).__name__}"
        if trouble != self._troubles.get(what):
            self._troubles[what] = trouble
            log.critical("the collector has trouble; events wait in the journal", what=what, error=type(error).__name__)

    def _try(self, what: str, do: Callable[[], object]) -> None:
        """What may fail and is tried again later; told while it fails."""
        try:
            do()
        except (JournalFull, Closed, SigningKeyProblem, OSError) as error:
            self._mishap(what, error)
        else:
            self._troubles.pop(what, None)

    async def _beat(self, book: Book, tail: Tail) -> None:
        """A heartbeat for each lane that is silent; looks often enough to be at most a fifth late."""
        silence_s = self._config.heartbeat_ms / 1000
        told = (0, 0)
        while True:
            await asyncio.sleep(silence_s / 5)
            lanes, counts = set(book.silent(silence_s, tail.position)), (self._unaudited, self._canaries_failed)
            if lanes:  # those that would be next go with them: a round for each costs much more than a heartbeat
                lanes |= set(book.silent(silence_s * _SOON, tail.position))
            if counts != told:
                lanes.add(0)  # the detector reads lane 0, and under load no lane is ever silent
            for partition in sorted(lanes):
                with suppress(JournalFull, Closed):
                    self.beat(book, partition)
                    told = told if partition else counts

    def beat(self, book: Book, partition: int) -> None:
        """A heartbeat on one lane. Raises JournalFull, Closed."""
        book.control(partition, Heartbeat, **self._beat_fields(book))

    def _beat_fields(self, book: Book) -> dict[str, Any]:
        counters = self._counters
        return {
            "engine_requests": counters.engine_requests,
            "events": counters.events,
            "rejections": counters.rejections,
            "in_flight": len(book.open),
            "dropped": counters.dropped + counters.oversized + counters.invalid + self._sender.replaced,
            "journal_bytes": book.journal.bytes,
            "guard_errors": dict(counters.guard_errors),
            "engine_finished": counters.tally.finished if counters.tally is not None else 0,
            "unaudited": self._unaudited,
            **(counters.guards.told() if counters.guards is not None else {}),
        }

    @property
    def _canaries_failed(self) -> int:
        return self._counters.guards.failed if self._counters.guards is not None else 0

    @property
    def _unaudited(self) -> int:
        return self._counters.tally.unaudited if self._counters.tally is not None else 0

    async def _sign(self, checkpoints: Checkpoints) -> None:
        """A checkpoint every `checkpoint_ms`, and when a lane has many records without one; takes up a new key."""
        loop, period_s = asyncio.get_running_loop(), self._evidence.checkpoint_ms / 1000
        made_s = loop.time()
        while True:
            await asyncio.sleep(min(period_s, _PENDING_S))
            if loop.time() - made_s < period_s and checkpoints.pending() < self._evidence.checkpoint_records:
                continue
            made_s = loop.time()
            # A key file that became bad does not end the signing with the key in hand.
            self._try("reading the signing key", lambda: self._take_up_key(checkpoints))
            self._try("signing a checkpoint", checkpoints.make)

    def _take_up_key(self, checkpoints: Checkpoints) -> None:
        """Sign with the key that now lies in the file, where that is another."""
        file, known = self._evidence.signing_key_file, checkpoints.signer
        if file is None or known is None:
            return
        signer = Signer.load(file)
        if signer.key_id != known.key_id:
            log.warning("the signing key was replaced", before=known.key_id, after=signer.key_id)
            checkpoints.rotated(signer)

    async def _sync(self, book: Book) -> None:
        """fsync against loss of power, every `fsync_ms`, off this loop; the disk may take its time."""
        period_s = self._journal_config.fsync_ms / 1000
        written = None
        while period_s:
            await asyncio.sleep(period_s)
            if written != book.journal.end:
                written = book.journal.end
                await asyncio.to_thread(self._try, "syncing the journal", book.sync)

    # -- the health record

    async def _tell(self) -> None:
        """The health record, every `status_ms`, with a producer of its own: it may never hold up an event."""
        period_s = self._config.status_ms / 1000
        while True:
            with suppress(KafkaError, OSError, TimeoutError):
                producer = await self._connect()
                try:
                    while True:
                        async with asyncio.timeout(period_s + 5):
                            await self._write_status(producer, "running")
                        await asyncio.sleep(period_s)
                finally:
                    await drop_producer(producer)
            await asyncio.sleep(period_s)

    async def _write_status(self, producer: AIOKafkaProducer, state: str) -> int:
        """Write the health record; returns the broker's append time, ms."""
        process_id = f"collector-{self._meta.collector_id}-{self._boot}"
        record = msgspec.json.encode({"process_id": process_id, "role": "collector", "state": state, **self._health()})
        sent = await producer.send_and_wait(self._kafka.topic("status"), record, key=process_id.encode())
        return int(sent.timestamp)

    def _health(self) -> dict[str, object]:
        book, counters, away = self._book, self._counters, self._sender.away
        return {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "version": version("inferwatch"),
            "config_digest": self._config_digest,
            "ready": book is not None and not away and not self._troubles,
            "why": "Kafka does not take events" if away else "; ".join(list(self._troubles.values())),
            "lag": self.lag(),
            "watermark": from_timestamp_us(book.last_us).isoformat(timespec="milliseconds") if book else "",
            "late": 0,
            "drops": counters.dropped,
            "totals": {
                "events": counters.events,
                "rejections": counters.rejections,
                "engine_requests": counters.engine_requests,
                "unaudited": self._unaudited,
                "canaries_failed": self._canaries_failed,
                "oversized": counters.oversized,
                "invalid": counters.invalid,
                "refused_batches": self._sender.refused,
            },
            "levels": {"in_flight": len(book.open), "journal_bytes": book.journal.bytes} if book else {},
            "guard_drift": counters.guards.drift if counters.guards is not None else {},
        }
