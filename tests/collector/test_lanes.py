"""The book of lanes: time, lane and number of every record, whatever is asked of it."""

import contextlib
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from collector import event as events
from collector.chain import record_hash
from collector.event import AuditEvent, BadEvent, Heartbeat, Hello, Integrity
from collector.journal import JournalFull
from collector.lanes import RECORD_BYTES_MAX, Book
from collector.recovery import Estate
from collector.tickets import Closed, Ticket
from tests.collector.booking import KNOWN, NOW_US, Clock, open_book, written


def test_an_event_is_what_was_known_and_what_was_learnt(tmp_path: Path) -> None:
    """Fields at finish go over those at begin; time, lane and number come from the book; the second finish is free."""
    clock = Clock()
    book = open_book(tmp_path, clock)
    hello = events.encode(written(book.journal)[1][2])
    ticket = book.begin("u_1", 1, {**KNOWN, "route": "/a", "max_tokens": 8})
    clock.us += 2500
    event = book.finish(ticket, AuditEvent, {"status": "ok", "response_tokens": 3, "route": "/b"})
    expected = AuditEvent(
        schema_version="1.0",
        event_id=ticket.event_id,
        timestamp=events.from_timestamp_us(NOW_US + 2500),
        collector_id="host-1",
        boot="boot-1",
        seq=1,
        chain=record_hash(hello).hex(),
        tenant="default",
        session_id="",
        user_id="u_" + "1" * 32,
        prompt_hash="",
        model_version="tiny@1",
        guardrail_results=[],
        response_tokens=3,
        latency_ms=2.5,
        blocked=False,
        status="ok",
        route="/b",
        max_tokens=8,
    )
    assert event == expected
    assert book.finish(ticket, AuditEvent, {"status": "error"}) is event
    assert written(book.journal)[2:] == [(1, 1, expected)]
    assert (book.counters.events, book.open) == (1, {})
    book.journal.close()


def test_time_never_goes_back(tmp_path: Path) -> None:
    """A clock that jumps back does not: later records carry the latest time given."""
    clock = Clock()
    book = open_book(tmp_path, clock)
    for jump_us in (5, -3_600_000_000, 1, 3_600_000_010):
        clock.us += jump_us
        book.control(0, Heartbeat)
    times = [events.timestamp_us(record.timestamp) - NOW_US for _, _, record in written(book.journal)]
    assert times == [0, 0, 5, 5, 5, 16]
    book.journal.close()


def test_threads_share_a_book(tmp_path: Path) -> None:
    """Four threads at once: each lane is contiguous and in order of time, and each request has its one event."""
    book = open_book(tmp_path, Clock(), bytes_max=10_000_000)
    ids: list[str] = []

    def work(worker: int) -> None:
        for turn in range(100):
            ticket = book.begin(f"u_{worker}", turn % 2, KNOWN)
            ids.append(book.finish(ticket, AuditEvent, {"status": "ok"}).event_id)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = written(book.journal)
    for lane in range(2):
        records = [record for partition, _, record in found if partition == lane]
        assert [record.seq for record in records] == list(range(len(records)))
        assert [seq for partition, seq, _ in found if partition == lane] == list(range(len(records)))
        assert records == sorted(records, key=lambda record: record.timestamp)
    assert Counter(r.event_id for _, _, r in found if isinstance(r, AuditEvent)) == Counter(ids)
    assert len(set(ids)) == 400
    book.journal.close()


def test_a_finaliser_inside_the_lock_has_its_turn_after(tmp_path: Path) -> None:
    """The garbage collector may run a finaliser that finishes another request, in the middle of our own section."""
    clock = Clock()
    book = open_book(tmp_path, clock)
    dropped, asked = book.begin("u_1", 0, KNOWN), book.begin("u_2", 0, KNOWN)
    inner: list[AuditEvent] = []
    book._clock_us = lambda: (
        (  # the one call of ours that is made with the lock held
            inner or inner.append(book.finish(dropped, AuditEvent, {"status": "aborted"})) or NOW_US  # type: ignore[func-returns-value]
        )
        and NOW_US
    )
    book.finish(asked, AuditEvent, {"status": "ok"})
    found = [(seq, record.event_id) for _, seq, record in written(book.journal) if isinstance(record, AuditEvent)]
    assert found == [(1, asked.event_id), (2, dropped.event_id)]
    assert dropped.event is not None
    assert (dropped.event.status, book.open) == ("aborted", {})
    book.journal.close()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"minhash": "A" * 1000, "reason": "x" * RECORD_BYTES_MAX}, "event too large"),
        ({"reason": "x" * 300}, "event out of bounds"),
        ({"response_tokens": -1}, "event out of bounds"),
        ({"latency_ms": float("nan")}, "event out of bounds"),
        ({"user_id": "\ud800"}, "event out of bounds"),
        ({"prompt_tokens": object()}, "event out of bounds"),
        ({"prompt_tokens": 2**70}, "event out of bounds"),
    ],
)
def test_an_event_nobody_would_take_becomes_an_integrity_record(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    """In its place and number, counted, with the id of the event; the next event is not harmed."""
    book = open_book(tmp_path, Clock(), bytes_max=10_000_000)
    ticket = book.begin("u_1", 0, KNOWN)
    book.finish(ticket, AuditEvent, {"status": "ok"} | fields)
    good = book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})
    told, after = [record for partition, _, record in written(book.journal) if partition == 0][1:]
    assert isinstance(told, Integrity)
    assert (told.problem, told.subject_id, told.seq, after) == (problem, ticket.event_id, 1, good)
    assert book.counters.oversized + book.counters.invalid == 1
    estate = Estate(book.journal.folder, book.journal.end)
    assert estate.begun == {}
    book.journal.close()


def _fill(book: Book) -> list[Ticket]:
    """Begin until the journal refuses."""
    admitted: list[Ticket] = []
    with contextlib.suppress(JournalFull):
        while len(admitted) < 1000:
            admitted.append(book.begin("u_1", 0, KNOWN))
    return admitted


def test_a_full_journal_refuses_new_requests_and_finishes_old_ones(tmp_path: Path) -> None:
    """`refuse`: JournalFull at begin, nothing begun; every request admitted before still gets its event."""
    clock = Clock()
    book = open_book(tmp_path, clock)
    admitted = _fill(book)
    with pytest.raises(JournalFull):
        book.begin("u_1", 0, KNOWN)
    assert 5 < len(admitted) < 100
    assert len(book.open) == len(admitted)
    for ticket in admitted:
        book.finish(ticket, AuditEvent, {"status": "ok"})
    ends = [record.event_id for _, _, record in written(book.journal) if isinstance(record, AuditEvent)]
    assert ends == [ticket.event_id for ticket in admitted]
    assert book.journal.bytes <= 65_536
    book.journal.close()


def test_drop_oldest_keeps_taking_requests_within_the_bound(tmp_path: Path) -> None:
    """`drop-oldest`: the oldest segments go, the newest events and every open request stay."""
    book = open_book(tmp_path, Clock(), when_full="drop-oldest")
    open_one = book.begin("u_2", 1, KNOWN)
    last = [book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"}) for _ in range(500)][-1]
    kept = written(book.journal)
    assert kept[-1][2] == last
    assert book.journal.bytes <= 65_536
    assert [seq for _, seq, _ in kept] == list(range(kept[0][1], 501))
    assert list(Estate(book.journal.folder, book.journal.end).begun) == [open_one.event_id]
    book.journal.close()


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    """A child has the parent's files but not its sender: begin and finish raise Closed there, the parent goes on."""
    book = open_book(tmp_path, Clock())
    ticket = book.begin("u_1", 0, KNOWN)
    before = book.journal.end
    child = os.fork()
    if child == 0:
        code = 0
        for attempt in (lambda: book.begin("u", 0, {}), lambda: book.finish(ticket, AuditEvent, {"status": "ok"})):
            try:
                attempt()
            except Closed:
                code += 1
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert book.journal.end == before
    assert book.finish(ticket, AuditEvent, {"status": "ok"}).seq == 1
    book.journal.close()


def test_only_silent_lanes_whose_last_heartbeat_arrived_want_one(tmp_path: Path) -> None:
    """While Kafka is away at most one heartbeat a lane waits in the journal."""
    now = [100.0]
    book = open_book(tmp_path, Clock())
    book._monotonic = lambda: now[0]
    before = book.journal.end
    book.control(0, Heartbeat)
    after = book.journal.end
    book.control(1, Hello)
    now[0] = 100.2
    assert book.silent(0.25, after) == []
    now[0] = 100.25
    assert book.silent(0.25, after) == [0, 1]
    assert book.silent(0.25, before) == [1]
    book.journal.close()


def test_a_bad_event_is_never_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An out-of-bounds field with text in it reaches neither the log nor the journal's records."""
    book = open_book(tmp_path, Clock())
    book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok", "reason": "canary-7f3a91 " * 50})
    shown = capsys.readouterr()
    assert "canary" not in shown.out + shown.err
    assert b"canary" not in (book.journal.folder / "00000001.seg").read_bytes()
    with pytest.raises(BadEvent):
        events.decode(b"canary-7f3a91")
    book.journal.close()
