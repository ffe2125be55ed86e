"""What the tests of the lanes and of recovery share: a book, a clock that a test sets, the journal read back."""

from pathlib import Path

from collector import event as events
from collector.checkpoints import Checkpoints
from collector.config import JournalConfig
from collector.event import AnyRecord, Hello
from collector.journal import RECORD, RECORD_HEAD, Journal, Reader
from collector.lanes import Book
from collector.recovery import Estate, close_estate

NOW_US = 1_760_000_000_000_000


KNOWN: dict[str, object] = {"tenant": "default", "user_id": "u_" + "1" * 32}


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.us = NOW_US

    def __call__(self) -> int:
        return self.us


def config_in(folder: Path, **changes: object) -> JournalConfig:
    return JournalConfig.model_validate({"dir": folder, "segment_bytes": 4096, "bytes_max": 65_536} | changes)


def open_book(folder: Path, clock: Clock, **changes: object) -> Book:
    journal = Journal(config_in(folder, **changes), "boot-1")
    book = Book(journal, collector_id="host-1", model_version="tiny@1", clock_us=clock)
    for partition in range(2):
        book.control(partition, Hello)
    return book


def written(journal: Journal) -> list[tuple[int, int, AnyRecord]]:
    """What lies in the journal for Kafka: partition, seq, record."""
    found = []
    for entry in Reader(journal.folder, lambda: journal.end).entries():
        if entry.body[0] == RECORD:
            _, key_length, partition, seq = RECORD_HEAD.unpack_from(entry.body)
            found.append((partition, seq, events.decode(entry.body[RECORD_HEAD.size + key_length :])))
    return found


def recovered(folder: Path, clock: Clock) -> tuple[Estate, Book]:
    """The journal of the dead `boot-1`, closed as recovery closes it."""
    journal = Journal(config_in(folder), "boot-1", fresh=False)
    estate = Estate(journal.folder, journal.end)
    book = Book(
        journal,
        collector_id=estate.meta.collector_id,
        model_version=estate.meta.model_version,
        clock_us=clock,
        lanes=estate.lanes,
        last_us=estate.last_us,
    )
    close_estate(estate, book, Checkpoints(book, None, number=estate.checkpoints, root=estate.root))
    return estate, book
