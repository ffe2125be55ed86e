"""The book of lanes: gives each record of one boot its time, lane and number, and writes it to the journal.

Rules T1 to T3 of docs/time.md: timestamps never go back, a lane's `seq` has no holes, a silent lane gets heartbeats.
Each record names the hash of the one before it (`collector.chain`).
The publisher keeps a book for its own boot; recovery keeps one for a boot that died. Thread-safe, also against a
finaliser that the garbage collector runs in the middle of it; the lock is held for µs, never while Kafka is waited for.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar

import msgspec
import structlog

from collector import event as events
from collector.chain import LaneChain, origin
from collector.event import AuditEvent, Checkpoint, Goodbye, Heartbeat, Integrity, Rejection
from collector.journal import RESERVED_BYTES, Journal, JournalFull, Position, ack_body, lane_body
from collector.tickets import UNENCODABLE, Closed, Counters, Meta, Ticket, begin_body
from collector.uuid7 import uuid7

log = structlog.get_logger(__name__)

RECORD_BYTES_MAX: Final = events.EVENT_BYTES_MAX - 256
"""What Kafka's framing leaves of a message for key and value."""
KEY_CHARS_MAX: Final = 128
"""A key is a pseudonym."""
_BLANK: Final[Mapping[str, Any]] = {
    "tenant": "",
    "session_id": "",
    "user_id": "",
    "prompt_hash": "",
    "guardrail_results": [],
    "response_tokens": 0,
    "blocked": False,
}
"""The fields an event must have, where the caller knows nothing better."""
_LATENCY_MS_MAX: Final = 1e10

_encoder = msgspec.json.Encoder()
AnyRecordT = TypeVar("AnyRecordT", bound=events.Record)


class Lane(LaneChain):
    """One lane of the book."""

    __slots__ = ("beat_end", "ended", "moved_s", "told_us")

    def __init__(self, head: str) -> None:
        super().__init__(head)
        self.moved_s = 0.0
        self.beat_end = Position(0, 0)
        """Where the last heartbeat ends in the journal."""
        self.told_us = 0
        """What time its last checkpoint signed."""
        self.ended = False


class _Section:
    """The lock, and whose it is: a thread must not enter twice, and must be able to tell."""

    __slots__ = ("_lock", "owner")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.owner = 0
        self._lock.release()


class Book:
    """The lanes of one boot. See the module's docstring for what holds."""

    def __init__(
        self,
        journal: Journal,
        *,
        collector_id: str,
        model_version: str,
        clock_us: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
        lanes: dict[int, Lane] | None = None,
        last_us: int = 0,
        counters: Counters | None = None,
    ) -> None:
        self.journal, self.collector_id, self.boot = journal, collector_id, journal.boot
        self.counters = counters or Counters()
        self.open: dict[str, Ticket] = {}
        self.wake: Callable[[], None] = _nothing
        """Called after a record was written."""
        self._model_version = model_version
        self._clock_us, self._monotonic, self._last_us = clock_us, monotonic, last_us
        self.lanes = {} if lanes is None else lanes
        """By partition. To be changed within `section` alone."""
        self.signed: tuple[int, str] = (0, "")
        """How many checkpoints there were, and the root of the last."""
        self.section = _Section()
        self._closed = False
        self._drop_oldest = journal.drop_oldest
        journal.head = self._head
        self._deferred: deque[tuple[Ticket, type[AuditEvent], dict[str, Any]]] = deque()
        alive = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _abandon(alive()))

    @property
    def last_us(self) -> int:
        """The latest timestamp given: nothing earlier follows in any lane."""
        return self._last_us

    def lag(self, acked: Mapping[int, int]) -> int:
        """Records journalled and not acknowledged."""
        return sum(lane.next - acked.get(partition, 0) for partition, lane in list(self.lanes.items()))

    def close(self) -> list[Ticket]:
        """No more begins; returns the requests that are still open."""
        with self.section:
            self._closed = True
            return list(self.open.values())

    def abandon(self) -> None:
        """In a forked child, which has the files but not the sender: what it wrote would mix with the parent's.

        The files are closed, else the parent's lock would outlive the parent.
        """
        self.section, self._closed, self.open = _Section(), True, {}
        self.journal.close()

    def begin(self, key: str, partition: int, known: Mapping[str, object]) -> Ticket:
        """Journal that a request is about to be worked on.

        Raises JournalFull at the journal's bound (or the disk's), Closed, and ValueError for a long key; nothing is
        begun then.
        """
        if len(key) > KEY_CHARS_MAX:
            raise ValueError(f"a key has at most {KEY_CHARS_MAX} characters")
        ticket = Ticket(uuid7(), key.encode(), partition, self._clock_us(), known)
        body = ticket.body = begin_body(ticket, key)
        with self.section:
            if self._closed:
                raise Closed("the publisher has stopped: no request may begin")
            if self._drop_oldest:
                self._make_room(len(body))
            self.journal.append(body, reserve_bytes=(len(self.open) + 1) * RESERVED_BYTES, bounded=True)
            ticket.segment = self.journal.end.segment
            self.open[ticket.event_id] = ticket
        return ticket

    def reopen(self, ticket: Ticket) -> None:
        """Take over a request that a dead boot began and that its journal already holds."""
        self.open[ticket.event_id] = ticket

    def finish(self, ticket: Ticket, shape: type[AuditEvent], fields: dict[str, Any]) -> AuditEvent:
        """Stamp and journal the event of `ticket`; a second call gives the first one's event.

        Raises JournalFull where the disk is full: the ticket stays open. An event that no reader would take (too large,
        a field out of bounds) is replaced by an integrity record in its place, and counted.
        """
        if self.section.owner == threading.get_ident():
            # A finaliser that the garbage collector ran inside our own section: its turn comes right after.
            self._deferred.append((ticket, shape, fields))
            return self._event(ticket, shape, fields, self._last_us, self.lanes[ticket.partition])
        with self.section:
            event = ticket.event or self._close(ticket, shape, fields)
        self.wake()
        while self._deferred:
            try:
                later = self._deferred.popleft()
            except IndexError:
                break
            self.finish(*later)
        return event

    def _close(self, ticket: Ticket, shape: type[AuditEvent], fields: dict[str, Any]) -> AuditEvent:
        if ticket.event_id not in self.open:
            raise Closed("the publisher is stopped: the request is in no journal that is open")
        now_us, lane = self._now_us(), self.lanes[ticket.partition]
        event = self._event(ticket, shape, fields, now_us, lane)
        self._write(ticket.partition, lane, ticket.key, self._sound(event, ticket, now_us, lane))
        ticket.event = event
        del self.open[ticket.event_id]
        if shape is Rejection:
            self.counters.rejections += 1
        else:
            self.counters.events += 1
        return event

    def _event(
        self, ticket: Ticket, shape: type[AuditEvent], fields: dict[str, Any], now_us: int, lane: Lane
    ) -> AuditEvent:
        latency_ms = min(_LATENCY_MS_MAX, max(0, now_us - ticket.started_us) / 1000)
        blank = {**_BLANK, "model_version": self._model_version, "latency_ms": latency_ms}
        return shape(**{**blank, **ticket.known, **fields, **self._stamp(now_us, lane, ticket.event_id)})

    def _sound(self, event: AuditEvent, ticket: Ticket, now_us: int, lane: Lane) -> bytes:
        """The event's bytes; an integrity record's where no reader would take them."""
        raw = b""
        try:
            raw = events.encode(event)
            if len(raw) + len(ticket.key) <= RECORD_BYTES_MAX:
                events.decode(raw)
                return raw
            self.counters.oversized += 1
            problem = "event too large"
        except (events.BadEvent, *UNENCODABLE):
            self.counters.invalid += 1
            problem = "event out of bounds"
        log.error("an audit event can't be sent as it is; an integrity record takes its place", problem=problem)
        return events.encode(self._integrity(problem, now_us, lane, subject_id=event.event_id, size_bytes=len(raw)))

    def _integrity(self, problem: str, now_us: int, lane: Lane, **fields: Any) -> Integrity:
        return Integrity(problem=problem, **self._stamp(now_us, lane, uuid7()), **fields)

    def _stamp(self, now_us: int, lane: Lane, event_id: str) -> dict[str, Any]:
        return {
            "schema_version": events.SCHEMA_VERSION,
            "event_id": event_id,
            "timestamp": events.from_timestamp_us(now_us),
            "collector_id": self.collector_id,
            "boot": self.boot,
            "seq": lane.next,
            "chain": lane.head,
        }

    def control(self, partition: int, shape: type[AnyRecordT], key: bytes = b"", **fields: Any) -> AnyRecordT:
        """Stamp and journal a record that is no request's; opens the lane where it is new.

        Raises JournalFull, and Closed after the lane's goodbye.
        """
        with self.section:
            record = self.put(partition, shape, key, fields)
        self.wake()
        return record

    def put(self, partition: int, shape: type[AnyRecordT], key: bytes, fields: dict[str, Any]) -> AnyRecordT:
        """`control`, for whoever holds `section`."""
        lane = self.lanes.get(partition)
        if lane is None:
            lane = self.lanes[partition] = Lane(origin(self.collector_id, self.boot, partition))
        if lane.ended:
            raise Closed("the lane has ended")
        stamp = self._stamp(self._now_us(), lane, uuid7())
        if shape is Heartbeat:
            stamp["chain"] = lane.beat_head
        record = shape(**stamp, **fields)
        self._write(partition, lane, key, _encoder.encode(record), shape)
        if shape is Heartbeat:
            lane.beat_end = self.journal.end
        lane.ended = shape is Goodbye
        return record

    def silent(self, silence_s: float, sent: Position) -> list[int]:
        """The lanes that want a heartbeat: silent so long, and their last one is before `sent`, what Kafka has.

        So while Kafka is away at most one heartbeat a lane waits in the journal.
        """
        limit = self._monotonic() - silence_s
        return [p for p, lane in self.lanes.items() if lane.moved_s <= limit and lane.beat_end <= sent]

    def mark(self, acked: dict[int, int]) -> tuple[Position, Position]:
        """Journal that Kafka has these lanes up to here. It only saves sending again after a crash.

        Returns the journal's end before and after.
        """
        with self.section:
            before = self.journal.end
            try:
                self.journal.append(ack_body(acked))
            except JournalFull:
                log.warning("no room in the journal to mark what Kafka has")
            return before, self.journal.end

    def release(self, before: Position) -> None:
        """Drop the segments before a place; requests begun there and still open are written again at the end."""
        with self.section:
            self._release(before.segment)

    def sync(self) -> None:
        """fsync what was written so far; the lock is not held meanwhile. Raises OSError."""
        with self.section:
            handles = self.journal.handles_to_sync()
        for handle in handles:
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _release(self, segment: int) -> None:
        for ticket in self.open.values():
            if ticket.segment < segment:
                self.journal.append(ticket.body)
                ticket.segment = self.journal.end.segment
        self.journal.remove_before(segment)

    def _make_room(self, size: int) -> None:
        """Drop the oldest segments until a record of `size` bytes fits. The sender counts what it finds missing."""
        limit = self.journal.bytes_max - size - (len(self.open) + 2) * RESERVED_BYTES
        while self.journal.bytes > limit and self.journal.first < self.journal.end.segment:
            log.warning("the journal is full: dropping its oldest segment", folder=str(self.journal.folder))
            self._release(self.journal.first + 1)

    def _head(self) -> bytes:
        seqs = {partition: lane.next for partition, lane in self.lanes.items()}
        heads = {partition: (lane.head, lane.beat_head) for partition, lane in self.lanes.items()}
        meta = Meta(self.collector_id, self._model_version, seqs, self._last_us, heads, *self.signed)
        return _encoder.encode(meta)

    def _now_us(self) -> int:
        self._last_us = max(self._clock_us(), self._last_us)
        return self._last_us

    def _write(
        self, partition: int, lane: Lane, key: bytes, raw: bytes, shape: type[events.Record] = AuditEvent
    ) -> None:
        seq = lane.next
        self.journal.append(lane_body(partition, seq, key, raw))
        lane.add(raw, seq, beat=shape is Heartbeat, fresh=shape is not Checkpoint)
        lane.moved_s = self._monotonic()


def _abandon(book: Book | None) -> None:
    if book is not None:
        book.abandon()


def _nothing() -> None:
    """Nobody waits."""
