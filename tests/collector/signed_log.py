"""What the tests of the chain share: a log of two boots as their journals hold it, signed, by partition."""

import random
from pathlib import Path

from collector.checkpoints import Checkpoints
from collector.event import AuditEvent, Ended, Heartbeat, Hello
from collector.journal import RECORD, RECORD_HEAD, Journal, Reader
from collector.lanes import Book
from collector.signing import Signer
from collector.trust import TrustedKeys
from collector.verification import Report, Verification
from tests.collector.booking import KNOWN, Clock, config_in

Log = dict[int, list[bytes]]
"""Partition to its records in order."""
SIGNER = Signer(bytes(range(32)))
PARTITIONS = 2


def chance(seed: int) -> random.Random:
    """Repeatable."""
    return random.Random(seed)  # noqa: S311  # no secret


def raws(journal: Journal) -> Log:
    """The records in a journal."""
    found: Log = {}
    for entry in Reader(journal.folder, lambda: journal.end).entries():
        if entry.body[0] == RECORD:
            _, key_length, partition, _ = RECORD_HEAD.unpack_from(entry.body)
            found.setdefault(partition, []).append(entry.body[RECORD_HEAD.size + key_length :])
    return found


def write_boot(
    folder: Path,
    boot: str,
    clock: Clock,
    randomness: random.Random,
    *,
    signer: Signer | None = SIGNER,
    ended: tuple[Ended, ...] = (),
    events: int = 120,
    stop: bool = True,
) -> tuple[Log, Checkpoints]:
    """One boot: events, heartbeats and checkpoints as they come."""
    journal = Journal(config_in(folder, segment_bytes=1_000_000, bytes_max=100_000_000), boot)
    book = Book(journal, collector_id="host-1", model_version="tiny@1", clock_us=clock)
    for partition in range(PARTITIONS):
        book.control(partition, Hello, ended=list(ended))
    checkpoints = Checkpoints(book, signer)
    for _ in range(events):
        clock.us += randomness.randrange(1, 1_000_000)
        partition = randomness.randrange(PARTITIONS)
        ticket = book.begin(f"u_{randomness.randrange(9)}", partition, KNOWN)
        book.finish(ticket, AuditEvent, {"status": "ok", "response_tokens": randomness.randrange(99)})
        if randomness.random() < 0.3:
            book.control(randomness.randrange(PARTITIONS), Heartbeat)
        if randomness.random() < 0.06:
            checkpoints.make()
    if stop:
        checkpoints.end()
    log = raws(journal)
    journal.close()
    return log, checkpoints


def write_log(folder: Path, seed: int, *, signer: Signer | None = SIGNER) -> Log:
    """Two boots, one after the other; the second names the first."""
    clock, randomness = Clock(), chance(seed)
    first, checkpoints = write_boot(folder, "boot-1", clock, randomness, signer=signer)
    second, _ = write_boot(folder, "boot-2", clock, randomness, signer=signer, ended=(checkpoints.ended(),))
    return {partition: first[partition] + second[partition] for partition in first}


def verify(
    log: Log, *, pinned: tuple[str, ...] = (SIGNER.public_key,), revoked: dict[str, int] | None = None, **options: bool
) -> Report:
    """What a log is worth, the places being those in its lists."""
    verification = Verification(TrustedKeys(pinned, revoked), **options)
    for partition, records in sorted(log.items()):
        verification.feed(partition, records, range(len(records)))
    return verification.report()
