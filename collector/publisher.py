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
from typing import Any, cast

import structlog

from collector.checkpoints import remember
from collector.config import EvidenceConfig, JournalConfig, PublisherConfig
from collector.event import AuditEvent, Change, Rejection
from collector.feeder import ClockApart, Feeder
from collector.journal import JournalFull
from collector.kafka import KafkaConfig, partition_for
from collector.lanes import Book
from collector.tickets import Closed, Counters, Meta, Ticket
from collector.uuid7 import uuid7

__all__ = ["ClockApart", "Closed", "Counters", "JournalFull", "Publisher", "Ticket", "system_clock_us"]

log = structlog.get_logger(__name__)


def system_clock_us() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


class Publisher:
    """One process's events. `start` once, then `begin` / `finish` / `reject` from any thread, `stop` once.

    `begin` and `finish` take some µs and may be called from an event loop; `start` and `stop` block.
    """

    def __init__(
        self,
        kafka: KafkaConfig,
        config: PublisherConfig,
        journal: JournalConfig,
        *,
        collector_id: str,
        model_version: str,
        evidence: EvidenceConfig = EvidenceConfig(),  # noqa: B008  # immutable
        boot: str | None = None,
        config_digest: str = "",
        clock_us: Callable[[], int] = system_clock_us,
    ) -> None:
        self.boot = boot or uuid7()
        self.collector_id, self.model_version = collector_id, model_version
        self.counters = Counters()
        self._feeder = Feeder(
            kafka,
            config,
            journal,
            evidence,
            meta=Meta(collector_id, model_version),
            boot=self.boot,
            config_digest=config_digest,
            counters=self.counters,
            clock_us=clock_us,
        )
        self._book: Book | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Settle dead boots, compare clocks, open all lanes; returns when Kafka has every hello.

        Raises BrokerAway, TopicMismatch, ClockApart, JournalBusy, JournalFull, SigningKeyProblem or OSError, each with
        one sentence, after at most `start_timeout_ms`. Settling dead boots is not counted: it waits for Kafka as long
        as it must.
        """
        opened: Future[Book] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="inferwatch-publisher", daemon=True)
        self._thread.start()
        self._book = opened.result()

    def begin(self, *, key: str, known: Mapping[str, object]) -> Ticket:
        """Journal that a request is about to be worked on. `key` decides its partition: the user's pseudonym.

        `known`: AuditEvent fields known by now, so that a `lost` event has them. Raises JournalFull at the journal's
        bound (refuse the request), Closed when not running.
        """
        return self._open_book().begin(key, partition_for(key.encode(), self._feeder.partitions), known)

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
            ticket = book.begin(
                key, partition_for(key.encode(), self._feeder.partitions), {"status": "rejected"} | fields
            )
        except JournalFull:
            self.counters.dropped += 1
            raise
        return cast(Rejection, book.finish(ticket, Rejection, {}))

    def change(self, *, key: str, subject: str, before: str = "", after: str = "", tenant: str = "") -> Change:
        """Tell that something changed what is normal: a model, adapter, guard, template, key or config."""
        partition = partition_for(key.encode(), self._feeder.partitions)
        fields = {"subject": subject, "before": before, "after": after, "tenant": tenant}
        return self._open_book().control(partition, Change, key.encode(), **fields)

    def lag(self) -> int:
        """Records in the journal that Kafka has not acknowledged."""
        return self._feeder.lag()

    def stop(self, timeout_s: float = 10) -> bool:
        """Close what is open as aborted, say goodbye on all lanes, wait for Kafka; True when it has everything.

        Otherwise the rest stays in the journal for the next start. Afterwards `begin` raises Closed.
        """
        book, thread, checkpoints = self._book, self._thread, self._feeder.checkpoints
        if book is None or thread is None or checkpoints is None:
            return False
        try:
            for ticket in book.close():
                book.finish(ticket, AuditEvent, {"status": "aborted", "reason": "the collector stopped"})
            if self.counters.tally is not None:
                self._feeder.beat(book, 0)
            checkpoints.end()
        except JournalFull:
            log.warning("no room in the journal to say goodbye; the next start will")
        self._feeder.finish()
        thread.join(timeout_s)
        if thread.is_alive():
            self._feeder.give_up()
            thread.join(5)
        complete = self._feeder.complete
        try:
            if complete:
                remember(book.journal.folder.parent, checkpoints.ended())
                book.journal.destroy()
            else:
                folder = str(book.journal.folder)
                log.warning("stopped before Kafka had everything; the next start sends it", folder=folder)
        except OSError as error:
            log.warning("the journal's folder could not be removed", error=type(error).__name__)
        book.journal.close()
        self._book = None
        return complete

    def _open_book(self) -> Book:
        if self._book is None:
            raise Closed("the publisher is not running")
        return self._book

    def _run(self, opened: "Future[Book]") -> None:
        try:
            asyncio.run(self._main(opened))
        except BaseException as error:  # noqa: BLE001  # told to whoever waits in start, or logged
            if opened.done():
                log.critical("the publisher's thread ended", error=type(error).__name__)
            else:
                opened.set_exception(error)

    async def _main(self, opened: "Future[Book]") -> None:
        try:
            opened.set_result(await self._feeder.open())
            await self._feeder.run()
        finally:
            await self._feeder.close()
