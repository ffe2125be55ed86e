"""Settles what dead boots left: their events are sent under their old lanes, what they began is told as lost.

A boot is dead when nobody holds its folder's lock. Its unacknowledged records go out with the same bytes; each request
begun without an end becomes an event with status `lost`; a last checkpoint is signed and each lane ends with `goodbye`,
reason `recovered`; then the folder is removed. All of it is journalled in the dead boot's folder first, so that a death
in the middle of recovery sends the same bytes again.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec
import structlog

from collector import event as events
from collector.chain import origin
from collector.checkpoints import Checkpoints, remember
from collector.config import JournalConfig
from collector.event import AuditEvent, Integrity
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
from collector.lanes import Book, Lane
from collector.sender import Sender, Tail
from collector.signing import Signer
from collector.tickets import Begun, Meta, Ticket

log = structlog.get_logger(__name__)


class _Glance(msgspec.Struct, frozen=True):
    """As much of a record as recovery needs."""

    kind: str = ""
    event_id: str = ""
    subject_id: str = ""
    collector_id: str = ""
    timestamp: datetime | None = None
    next: int = 0
    number: int = 0
    root: str = ""


class Estate:
    """What a journal holds, read once from end to end. Memory: the requests without an end, and the lanes."""

    def __init__(self, folder: Path, end: Position) -> None:
        self._boot = folder.name
        self.meta = Meta()
        self.begun: dict[str, Begun] = {}
        self.lanes: dict[int, Lane] = {}
        self.checkpoints, self.root = 0, ""
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
            self._advance(partition, seq, "", "")
        for begun in self.begun.values():
            self._lane(begun.partition)
        for partition in self.ended:
            self.lanes[partition].ended = True

    def _lane(self, partition: int) -> Lane:
        lane = self.lanes.get(partition)
        if lane is None:
            lane = self.lanes[partition] = Lane(origin(self.meta.collector_id, self._boot, partition))
        return lane

    def _advance(self, partition: int, seq: int, head: str, beat_head: str) -> None:
        """The lane went at least so far, though its records are no more at hand. An empty head: the link is lost."""
        lane = self._lane(partition)
        if seq > lane.next:
            lane.cover(seq)
            lane.next, lane.head, lane.beat_head = seq, head, beat_head

    def _take(self, body: bytes) -> None:
        kind = body[0]
        if kind == META:
            self.meta = self._meta.decode(body[1:])
            self.last_us = max(self.last_us, self.meta.last_us)
            for partition, seq in self.meta.seqs.items():
                self._advance(partition, seq, *self.meta.heads.get(partition, ("", "")))
            self._signed(self.meta.checkpoints, self.meta.root)
        elif kind == BEGIN:
            begun = self._begun.decode(body[1:])
            self.begun[begun.event_id] = begun
        elif kind == ACK:
            self.acked.update(parse_ack(body))
        elif kind == RECORD:
            self._take_record(body)

    def _take_record(self, body: bytes) -> None:
        _, key_length, partition, seq = RECORD_HEAD.unpack_from(body)
        raw = body[RECORD_HEAD.size + key_length :]
        glance = self._glance.decode(raw)
        if not self.meta.collector_id:
            self.meta = Meta(glance.collector_id)
        lane = self._lane(partition)
        lane.add(raw, seq, beat=glance.kind == "heartbeat", fresh=glance.kind != "checkpoint")
        self.begun.pop(glance.subject_id if glance.kind == "integrity" else glance.event_id, None)
        if glance.kind == "goodbye":
            self.ended.add(partition)
        elif glance.kind == "checkpoint":
            lane.cover(glance.next)
            lane.fresh = len(lane.seqs) > 1  # the checkpoint itself is one
            self._signed(glance.number, glance.root)
        if glance.timestamp is not None:
            self.last_us = max(self.last_us, events.timestamp_us(glance.timestamp))

    def _signed(self, number: int, root: str) -> None:
        if number > self.checkpoints:
            self.checkpoints, self.root = number, root


async def recover(
    config: JournalConfig,
    sender: Sender,
    *,
    heir: Meta,
    clock_us: Callable[[], int],
    signer: Signer | None = None,
) -> int:
    """Settle all dead boots under `config.dir`; returns how many. Waits while Kafka is away. Raises OSError.

    `heir`: who it is told for where a journal no longer says whose it was. `signer` signs their last checkpoints.
    """
    boots = dead_boots(config.dir)
    for boot in boots:
        try:
            journal = Journal(config, boot, fresh=False)
        except (JournalBusy, FileNotFoundError):
            continue  # another process settles it
        try:
            await _settle(journal, sender, heir, clock_us, signer)
        except BaseException:
            journal.close()
            raise
        journal.destroy()
    return len(boots)


async def _settle(
    journal: Journal, sender: Sender, heir: Meta, clock_us: Callable[[], int], signer: Signer | None
) -> None:
    estate = Estate(journal.folder, journal.end)
    book = Book(
        journal,
        collector_id=estate.meta.collector_id or heir.collector_id,
        model_version=estate.meta.model_version or heir.model_version,
        clock_us=clock_us,
        lanes=estate.lanes,
        last_us=estate.last_us,
    )
    checkpoints = Checkpoints(book, signer, number=estate.checkpoints, root=estate.root)
    lost = close_estate(estate, book, checkpoints)
    tail = Tail(book, estate.acked)
    unsent = book.lag(estate.acked)
    log.info("settling the journal of a dead process", boot=journal.boot, unsent=unsent, lost=lost)
    await sender.drain(tail)
    remember(journal.folder.parent, checkpoints.ended())


def close_estate(estate: Estate, book: Book, checkpoints: Checkpoints) -> int:
    """Journal what is missing at a dead boot's end; returns the requests lost. Run again it adds nothing twice."""
    for begun in estate.begun.values():
        # Another version may have known fields that events do not have now.
        known = {name: value for name, value in begun.known.items() if name in AuditEvent.__struct_fields__}
        ticket = Ticket(begun.event_id, begun.key.encode(), begun.partition, begun.started_us, known)
        book.reopen(ticket)
        book.finish(ticket, AuditEvent, {"status": "lost", "reason": "the collector died"})
    lanes = sorted(set(estate.lanes) - estate.ended)
    if estate.damaged_bytes and lanes:
        log.error("a journal was damaged", boot=book.boot, bytes=estate.damaged_bytes)
        book.control(lanes[0], Integrity, problem="journal damaged", size_bytes=estate.damaged_bytes)
    if lanes:
        checkpoints.end("recovered")
    return len(estate.begun)
