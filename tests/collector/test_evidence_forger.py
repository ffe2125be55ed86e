"""Somebody who can write to the log but not sign adds records, takes some away, and trips the verifier; he is seen.

Beside it: what an honest log may look like, and is sound.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from collector import event as events
from collector.chain import origin, part_hash, record_hash, rotation_bytes
from collector.checkpoints import Checkpoints
from collector.event import (
    AuditEvent,
    Change,
    Checkpoint,
    Ended,
    Goodbye,
    Heartbeat,
    Hello,
    Integrity,
    decode,
    encode,
    timestamp_us,
)
from collector.journal import Journal
from collector.lane_check import HOLES_MAX, REPEATS_MAX, LaneCheck
from collector.lanes import Book
from collector.recovery import Estate, close_estate
from collector.trust import TrustedKeys
from collector.uuid7 import uuid7
from collector.verification import UNSIGNED_MAX, Verification
from tests.collector.booking import KNOWN, NOW_US, Clock, config_in, open_book
from tests.collector.signed_log import PARTITIONS, SIGNER, Log, chance, raws, verify, write_boot, write_log
from tests.collector.test_evidence import STRANGER, _changed

BLANK: dict[str, Any] = {
    "tenant": "default", "session_id": "", "user_id": "u_" + "6" * 32, "prompt_hash": "", "model_version": "tiny@1",
    "guardrail_results": [], "response_tokens": 1, "latency_ms": 1.0, "blocked": False, "status": "ok",
}  # fmt: skip


class Forger:
    """Appends records to a lane, each with the hash of the one before it, `step_us` apart."""

    def __init__(  # noqa: PLR0917  # in the order of the record's fields
        self, records: list[bytes], boot: str, seq: int, head: str, at_us: int, step_us: int = 1
    ) -> None:
        self.records, self.boot, self.seq, self.head = records, boot, seq, head
        self.at_us, self.step_us = at_us, step_us

    def add(self, kind: type[Any] = AuditEvent, **fields: Any) -> None:
        """The next record."""
        stamp = {"schema_version": "1.0", "event_id": uuid7(), "timestamp": events.from_timestamp_us(self.at_us)}
        stamp |= {"collector_id": "host-1", "boot": self.boot, "seq": self.seq, "chain": self.head}
        raw = encode(kind(**stamp, **(BLANK if kind is AuditEvent else {}), **fields))
        # What the encoder leaves out where it is empty can be written all the same.
        raw = raw if self.head else raw.replace(b'"seq":%d' % self.seq, b'"seq":%d,"chain":""' % self.seq)
        self.records.append(raw)
        self.head, self.seq, self.at_us = record_hash(raw).hex(), self.seq + 1, self.at_us + self.step_us


def last_us(log: Log) -> int:
    """When a log ends."""
    return timestamp_us(decode(log[0][-1]).timestamp)


def boot_of(log: Log, *, count: int, step_us: int = 1, partitions: int = PARTITIONS, ended: bool = False) -> None:
    """Append a boot that nobody signed."""
    for partition in range(partitions):
        records = log.setdefault(partition, [])
        forger = Forger(records, "boot-9", 0, origin("host-1", "boot-9", partition), last_us(log), step_us)
        forger.add(Hello)
        for _ in range(count):
            forger.add()
        if ended:
            forger.add(Goodbye)


def told(log: Log, **options: Any) -> tuple[str, set[str]]:
    """The verdict, and what each problem is called."""
    report = verify(log, **options)
    return report.verdict, {problem.what for problem in report.problems}


@pytest.mark.parametrize("kind", [AuditEvent, Heartbeat])
@pytest.mark.parametrize("place", ["before the goodbye", "after it"])
def test_nothing_can_be_added_at_the_end_of_a_boot(tmp_path: Path, place: str, kind: type[Any]) -> None:
    """Behind the last checkpoint there are only goodbyes, and behind those nothing, however it is linked."""
    log = write_log(tmp_path, 1)
    goodbye = decode(log[0][-1])
    if place == "before the goodbye":
        log[0].pop()
        beats = [raw for raw in log[0] if raw[9:12] == b"hea"]
        head = record_hash(beats[-1]).hex() if kind is Heartbeat else goodbye.chain
        forger = Forger(log[0], "boot-2", goodbye.seq, head, last_us(log))
    else:
        forger = Forger(log[0], "boot-2", goodbye.seq + 1, "", last_us(log))
    for _ in range(3):
        forger.add(kind)
    if place == "before the goodbye":
        forger.head = goodbye.chain if kind is Heartbeat else forger.head
        forger.add(Goodbye)
    verdict, kinds = told(log)
    assert (verdict, "inserted" in kinds) == ("broken", True)


def test_a_collector_says_its_last_word_and_goodbye_in_one_breath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is taken once: what comes from other threads comes before, or finds the lanes ended."""
    book = open_book(tmp_path, Clock(), segment_bytes=1_000_000, bytes_max=10_000_000)
    done: list[str] = []
    put, enter = Book.put, type(book.section).__enter__
    monkeypatch.setattr(Book, "put", lambda *asked: (done.append(asked[2].__name__), put(*asked))[1])
    monkeypatch.setattr(type(book.section), "__enter__", lambda lock: (done.append("lock"), enter(lock))[1])
    Checkpoints(book, SIGNER).end()
    assert done == ["lock", "Checkpoint", "Checkpoint", "Goodbye", "Goodbye"]
    book.journal.close()


def test_a_boot_that_nobody_signed_is_not_sound(tmp_path: Path) -> None:
    """With a goodbye it is broken; without it could be one that began just now, so the log proves nothing."""
    for ended, verdict in ((True, ("broken", {"truncated"})), (False, ("unproven", set()))):
        log = write_log(tmp_path / str(ended), 1)
        boot_of(log, count=20, ended=ended)
        assert told(log) == verdict


@pytest.mark.parametrize(("count", "step_us"), [(5, 60_000_000), (UNSIGNED_MAX + 1, 1)])
def test_an_end_without_checkpoints_is_taken_for_seconds_and_thousands_alone(
    tmp_path: Path, count: int, step_us: int
) -> None:
    """A running boot's tail is made up: beyond what a collector may leave unsigned, the log is not sound."""
    log, _ = write_boot(tmp_path, "boot-1", Clock(), chance(3), stop=False)
    assert told(log) == ("sound", set())
    head = record_hash([raw for raw in log[0] if raw[9:12] != b"hea"][-1]).hex()
    forger = Forger(log[0], "boot-1", decode(log[0][-1]).seq + 1, head, last_us(log) + step_us, step_us)
    for _ in range(count):
        forger.add()
    assert told(log) == ("unproven", set())


def test_a_lane_is_not_ended_by_a_checkpoint_of_others(tmp_path: Path) -> None:
    """One copy of a checkpoint says that it is the last, a goodbye after it: the other lanes' copies say no."""
    log = write_log(tmp_path, 1)
    numbers = {record.number for raw in log[0] if isinstance(record := decode(raw), Checkpoint)}
    at = next(
        at
        for at, raw in enumerate(log[1])
        if isinstance(record := decode(raw), Checkpoint) and record.boot == "boot-2" and record.number in numbers
    )
    record = msgspec.structs.replace(decode(log[1][at]), final=True)
    forger = Forger([*log[1][:at], encode(record)], "boot-2", record.seq + 1, record_hash(encode(record)).hex(), NOW_US)
    forger.add(Goodbye)
    assert told({**log, 1: forger.records}) == ("broken", {"forged"})


@pytest.mark.parametrize("fields", [{"path": ["zz"], "lanes": 2}, {"hints": "!", "lanes": 1}, {"subject_hash": "zz"}])
def test_no_record_trips_the_verifier(tmp_path: Path, fields: dict[str, Any]) -> None:
    """What is no hash where one belongs is told like any other forgery, and the rest is read."""
    log = write_log(tmp_path, 1)
    boot_of(log, count=1)
    last = decode(log[0][-1])
    forger = Forger(log[0], "boot-9", last.seq + 1, record_hash(log[0][-1]).hex(), last_us(log))
    if "subject_hash" in fields:
        forger.add(Integrity, problem="refused by Kafka", **fields)
    else:
        forger.add(Checkpoint, number=1, at_us=NOW_US, next=last.seq + 1, records=9, **fields)
        record = decode(log[0][-1])
        assert isinstance(record, Checkpoint)
        log[0][-1] = encode(msgspec.structs.replace(record, root=part_hash(0, record).hex()))
    assert told(log)[0] == "broken"
    assert verify(log).records == sum(map(len, log.values()))


def test_bytes_that_only_begin_like_a_record_are_none(tmp_path: Path) -> None:
    """The fast way does not decode; what no checkpoint covers is looked at in the end."""
    log, _ = write_boot(tmp_path, "boot-1", Clock(), chance(3), stop=False)
    raw = next(raw for raw in reversed(log[0]) if raw[9:12] == b"inf")
    seq, head = decode(log[0][-1]).seq + 1, record_hash([raw for raw in log[0] if raw[9:12] != b"hea"][-1]).hex()
    log[0].append(raw[: raw.find(b'"seq"')] + b'"seq":%d,"chain":"%b"' % (seq, head.encode()))
    assert told(log) == ("broken", {"inserted"})


def test_holes_take_no_more_memory_than_one(tmp_path: Path) -> None:
    """Eight small records whose numbers are far apart."""
    records: list[bytes] = []
    for hole in range(8):
        Forger(records, "boot-1", hole * HOLES_MAX, "0" * 64, NOW_US).add()
    verification = Verification(TrustedKeys())
    verification.feed(0, records, range(8))
    (lane,) = verification._lanes.values()
    assert len(lane._missing) == HOLES_MAX


@pytest.mark.parametrize(("back", "verdict"), [(REPEATS_MAX, "sound"), (REPEATS_MAX + 1, "broken")])
def test_a_record_is_looked_for_among_the_last_thousands_alone(tmp_path: Path, back: int, verdict: str) -> None:
    """One that is sent again is no harm; one of long ago is told, so that a flood of them holds up no verifier."""
    log, _ = write_boot(tmp_path, "boot-1", Clock(), chance(3), stop=False)
    head = record_hash([raw for raw in log[0] if raw[9:12] != b"hea"][-1]).hex()
    forger = Forger(log[0], "boot-1", decode(log[0][-1]).seq + 1, head, last_us(log))
    for _ in range(REPEATS_MAX + 9):
        forger.add()
    log[0].append(log[0][-back])
    assert told(log)[0] == verdict


def test_a_revoked_key_names_no_other(tmp_path: Path) -> None:
    """Who stole it can write any time into the change that names his own key."""
    said = rotation_bytes(SIGNER.key_id, STRANGER.public_key)
    change = Change(
        schema_version="1.0", event_id=uuid7(), timestamp=events.from_timestamp_us(1), collector_id="host-1",
        boot="boot-1", seq=0, subject="signing_key", before=SIGNER.key_id, after=STRANGER.key_id,
        public_key=STRANGER.public_key, signed_before=SIGNER.sign(said), signed_after=STRANGER.sign(said),
    )  # fmt: skip
    for revoked, known in (({}, 2), ({SIGNER.key_id: NOW_US}, 1)):
        keys = TrustedKeys([SIGNER.public_key], revoked)
        keys.learn([change])
        assert len(keys.known) == known


def _three_boots(folder: Path) -> tuple[Log, Log]:
    """The first and the last of three that followed each other."""
    clock, randomness = Clock(), chance(3)
    first, a = write_boot(folder, "boot-1", clock, randomness)
    _, b = write_boot(folder, "boot-2", clock, randomness, ended=(a.ended(),))
    third, _ = write_boot(folder, "boot-3", clock, randomness, ended=(b.ended(),))
    return first, third


def test_a_boot_is_missed_where_the_log_reaches_back_to_it(tmp_path: Path) -> None:
    """Also where the hello of the boot before it is past retention."""
    first, third = _three_boots(tmp_path)
    log = {p: first[p][40:] + third[p] for p in first}
    assert [(p.what, p.lane) for p in verify(log).problems] == [("truncated", "host-1/boot-2")]


def test_how_a_boot_ended_is_known_though_its_goodbyes_were_sent_later(tmp_path: Path) -> None:
    """Kafka was away at its stop: the next start finds nothing left to say, and still names its end and time."""
    clock = Clock()
    book = open_book(tmp_path, clock, segment_bytes=1_000_000, bytes_max=10_000_000)
    checkpoints = Checkpoints(book, SIGNER)
    checkpoints.end()
    book.journal.close()
    journal = Journal(config_in(tmp_path), "boot-1", fresh=False)
    estate = Estate(journal.folder, journal.end)
    fields: dict[str, Any] = {"lanes": estate.lanes, "last_us": estate.last_us}
    heir = Book(journal, collector_id="host-1", model_version="tiny@1", clock_us=clock, **fields)
    found = Checkpoints(heir, SIGNER, number=estate.checkpoints, root=estate.root)
    close_estate(estate, heir, found)
    journal.close()
    assert found.ended() == checkpoints.ended() == Ended(boot="boot-1", root=checkpoints.ended().root, at_us=NOW_US)


@pytest.mark.parametrize("named_by_time", [False, True])
def test_the_beginning_of_a_lane_is_missed_where_its_partition_goes_back_further(
    tmp_path: Path, named_by_time: bool
) -> None:
    """What retention takes, it takes from the partition's beginning. Boots are named by a UUIDv7."""
    clock, randomness = Clock(), chance(3)
    first, a = write_boot(tmp_path, "boot-1", clock, randomness)
    name = uuid7(lambda: clock.us * 1000) if named_by_time else "boot-2"
    second, _ = write_boot(tmp_path, name, clock, randomness, ended=(a.ended(),))
    cut = {p: next(at + 1 for at, raw in enumerate(second[p]) if raw[9:12] == b"che") for p in second}
    one_lane = {0: first[0] + second[0][cut[0] :], 1: first[1] + second[1]}
    assert told(one_lane) == ("broken", {"truncated"})
    if named_by_time:
        assert told({p: first[p] + second[p][cut[p] :] for p in second}) == ("broken", {"truncated"})


def test_a_lane_begins_with_a_hello(tmp_path: Path) -> None:
    """A made-up one that begins with anything else is not taken for one that retention cut."""
    log = write_log(tmp_path, 1)
    Forger(log[0], "boot-9", 0, origin("host-1", "boot-9", 0), last_us(log)).add()
    assert told(log) == ("broken", {"forged"})


def test_a_boot_has_no_more_lanes_than_it_signs(tmp_path: Path) -> None:
    """Also in a part of a log."""
    log, _ = write_boot(tmp_path, "boot-1", Clock(), chance(3), stop=False)
    forger = Forger([], "boot-1", 0, origin("host-1", "boot-1", 2), last_us(log))
    forger.add(Hello)
    assert told({**log, 2: forger.records}, whole=False) == ("broken", {"truncated"})


def test_four_equal_bytes_do_not_hide_a_change_where_the_log_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that the log begins within can't be compared as a whole; a broken link in it is told all the same."""
    log = write_log(tmp_path, 5)
    checkpoints = [at for at, raw in enumerate(log[0]) if raw[9:12] == b"che"]
    log[0] = log[0][checkpoints[0] + 3 :]
    at = next(at for at, raw in enumerate(log[0]) if at > 2 and raw[9:12] == b"inf")
    real: Callable[..., Any] = LaneCheck._first_difference
    good, bad = record_hash(log[0][at])[:4], record_hash(_changed(log[0][at]))[:4]

    def ground(self: LaneCheck, hints: Any, observed: Any, place: int) -> Any:
        return real(self, hints, [good if seen == bad else seen for seen in observed], place)

    monkeypatch.setattr(LaneCheck, "_first_difference", ground)
    log[0][at] = _changed(log[0][at])
    assert told(log, whole=False) == ("broken", {"changed"})


# -- honest logs


@pytest.mark.parametrize("seed", range(3))
def test_partitions_that_are_kept_for_different_times_are_sound(tmp_path: Path, seed: int) -> None:
    """Kafka drops whole segments of each partition for itself: one may have lost a lane or some of its checkpoints."""
    log = write_log(tmp_path, seed)
    for cut in range(10, len(log[0]) - 3, 9):
        assert told({0: log[0][cut:], 1: log[1]}) == ("sound", set()), cut


def test_a_lane_that_only_beats_is_told_a_checkpoint_each_minute(tmp_path: Path) -> None:
    """However seldom its heartbeats are, it is not taken for cut."""
    clock = Clock()
    book = open_book(tmp_path, clock, segment_bytes=1_000_000, bytes_max=10_000_000)
    checkpoints = Checkpoints(book, SIGNER)
    for turn in range(120):
        clock.us += 5_000_000
        book.control(1, Heartbeat)
        book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})
        if turn % 2:
            checkpoints.make()
    log = raws(book.journal)
    book.journal.close()
    assert told(log) == ("sound", set())
    assert sum(raw[9:12] == b"che" for raw in log[1]) == 10
