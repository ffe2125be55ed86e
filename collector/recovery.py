"""Settles what dead boots left: their events are sent under their old lanes, what they began is told as lost.

A boot is dead when nobody holds its folder's lock. Its unacknowledged records go out with the same bytes; each request
begun without an end becomes an event with status `lost`; each lane ends with `goodbye`, reason `recovered`; then the
folder is removed. All of it is journalled in the dead boot's folder first, so that a death in the middle of recovery
sends the same bytes again.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec
import structlog

from collector import event as events
from collector.config import JournalConfig
from collector.event import AuditEvent, Goodbye, Integrity
from collector.journal import (
    ACK,
    BEGIN,
    META,
    RECORD,
    RECORD_HEAD,
    Journal,
    JournalBusy,
    Position,
    Reader,
    dead_boots,
    parse_ack,
)
from collector.lanes import Book
from collector.sender import Sender, Tail
from collector.tickets import Begun, Meta, Ticket

log = structlog.get_logger(__name__)


class _Glance(msgspec.Struct, frozen=True):
    """As much of a record as recovery needs."""

    kind: str = ""
    event_id: str = ""
    subject_id: str = ""
    collector_id: str = ""
    timestamp: datetime | None = None


class Estate:
    """What a journal holds, read once from end to end. Memory: the requests without an end, and the lanes."""

    def __init__(self, folder: Path, end: Position) -> None:
        self.meta = Meta()
        self.begun: dict[str, Begun] = {}
        self.seqs: dict[int, int] = {}
        """The next seq of each lane."""
        self.acked: dict[int, int] = {}
        self.ended: set[int] = set()
        """Lanes with a goodbye."""
        self.last_us = 0
        self._begun = msgspec.json.Decoder(Begun)
        self._glance = msgspec.json.Decoder(_Glance)
        self._meta = msgspec.json.Decoder(Meta)
        reader = Reader(folder, lambda: end)
        for entry in reader.entries():
            try:
                self._take(entry.body)
            except (msgspec.DecodeError, UnicodeDecodeError):
                # A good checksum over bytes that we can't read: written by another version. Counted as damage.
                reader.damaged_bytes += len(entry.body)
        self.damaged_bytes = reader.damaged_bytes
        for partition, seq in self.acked.items():
            self.seqs[partition] = max(seq, self.seqs.get(partition, 0))
        for begun in self.begun.values():
            self.seqs.setdefault(begun.partition, 0)

    def _take(self, body: bytes) -> None:
        kind = body[0]
        if kind == META:
            self.meta = self._meta.decode(body[1:])
            self.last_us = max(self.last_us, self.meta.last_us)
            for partition, seq in self.meta.seqs.items():
                self.seqs[partition] = max(seq, self.seqs.get(partition, 0))
        elif kind == BEGIN:
            begun = self._begun.decode(body[1:])
            self.begun[begun.event_id] = begun
        elif kind == ACK:
            self.acked.update(parse_ack(body))
        elif kind == RECORD:
            self._take_record(body)

    def _take_record(self, body: bytes) -> None:
        _, key_length, partition, seq = RECORD_HEAD.unpack_from(body)
        self.seqs[partition] = max(seq + 1, self.seqs.get(partition, 0))
        glance = self._glance.decode(body[RECORD_HEAD.size + key_length :])
        self.begun.pop(glance.subject_id if glance.kind == "integrity" else glance.event_id, None)
        if glance.kind == "goodbye":
            self.ended.add(partition)
        if not self.meta.collector_id:
            self.meta = Meta(glance.collector_id)
        if glance.timestamp is not None:
            self.last_us = max(self.last_us, events.timestamp_us(glance.timestamp))


async def recover(config: JournalConfig, sender: Sender, *, heir: Meta, clock_us: Callable[[], int]) -> int:
    """Settle all dead boots under `config.dir`; returns how many. Waits while Kafka is away. Raises OSError.

    `heir`: who it is told for where a journal no longer says whose it was.
    """
    boots = dead_boots(config.dir)
    for boot in boots:
        try:
            journal = Journal(config, boot, fresh=False)
        except (JournalBusy, FileNotFoundError):
            continue  # another process settles it
        try:
            await _settle(journal, sender, heir, clock_us)
        except BaseException:
            journal.close()
            raise
        journal.destroy()
    return len(boots)


async def _settle(journal: Journal, sender: Sender, heir: Meta, clock_us: Callable[[], int]) -> None:
    estate = Estate(journal.folder, journal.end)
    book = Book(
        journal,
        collector_id=estate.meta.collector_id or heir.collector_id,
        model_version=estate.meta.model_version or heir.model_version,
        clock_us=clock_us,
        seqs=estate.seqs,
        last_us=estate.last_us,
    )
    lost = close_estate(estate, book)
    tail = Tail(book, estate.acked)
    unsent = book.lag(estate.acked)
    log.info("settling the journal of a dead process", boot=journal.boot, unsent=unsent, lost=lost)
    await sender.drain(tail)


def close_estate(estate: Estate, book: Book) -> int:
    """Journal what is missing at a dead boot's end; returns the requests lost. Run again it adds nothing twice."""
    for begun in estate.begun.values():
        # Another version may have known fields that events do not have now.
        known = {name: value for name, value in begun.known.items() if name in AuditEvent.__struct_fields__}
        ticket = Ticket(begun.event_id, begun.key.encode(), begun.partition, begun.started_us, known)
        book.reopen(ticket)
        book.finish(ticket, AuditEvent, {"status": "lost", "reason": "the collector died"})
    lanes = sorted(set(estate.seqs) - estate.ended)
    if estate.damaged_bytes and lanes:
        log.error("a journal was damaged", boot=book.boot, bytes=estate.damaged_bytes)
        book.control(lanes[0], Integrity, problem="journal damaged", size_bytes=estate.damaged_bytes)
    for partition in lanes:
        book.control(partition, Goodbye, reason="recovered")
    return len(estate.begun)
