"""The book of lanes and what recovery reads from its journal: every begun request has exactly one end."""

import contextlib
import os
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector import event as events
from collector.config import JournalConfig
from collector.event import AnyRecord, AuditEvent, BadEvent, Goodbye, Heartbeat, Hello, Integrity, Rejection
from collector.journal import RECORD, RECORD_HEAD, Journal, JournalFull, Position, Reader
from collector.lanes import RECORD_BYTES_MAX, Book
from collector.recovery import Estate, close_estate
from collector.tickets import Closed, Ticket

NOW_US = 1_760_000_000_000_000
KNOWN: dict[str, object] = {"tenant": "default", "user_id": "u_" + "1" * 32}


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.us = NOW_US

    def __call__(self) -> int:
        return self.us


def _config(folder: Path, **changes: object) -> JournalConfig:
    return JournalConfig.model_validate({"dir": folder, "segment_bytes": 4096, "bytes_max": 65_536} | changes)


def _book(folder: Path, clock: Clock, **changes: object) -> Book:
    journal = Journal(_config(folder, **changes), "boot-1")
    book = Book(journal, collector_id="host-1", model_version="tiny@1", clock_us=clock)
    for partition in range(2):
        book.control(partition, Hello)
    return book


def _lanes(journal: Journal) -> list[tuple[int, int, AnyRecord]]:
    """What lies in the journal for Kafka: partition, seq, record."""
    found = []
    for entry in Reader(journal.folder, lambda: journal.end).entries():
        if entry.body[0] == RECORD:
            _, key_length, partition, seq = RECORD_HEAD.unpack_from(entry.body)
            found.append((partition, seq, events.decode(entry.body[RECORD_HEAD.size + key_length :])))
    return found


def _recovered(folder: Path, clock: Clock) -> tuple[Estate, Book]:
    """The journal of the dead `boot-1`, closed as recovery closes it."""
    journal = Journal(_config(folder), "boot-1", fresh=False)
    estate = Estate(journal.folder, journal.end)
    book = Book(
        journal,
        collector_id=estate.meta.collector_id,
        model_version=estate.meta.model_version,
        clock_us=clock,
        seqs=estate.seqs,
        last_us=estate.last_us,
    )
    close_estate(estate, book)
    return estate, book


def test_an_event_is_what_was_known_and_what_was_learnt(tmp_path: Path) -> None:
    """Fields at finish go over those at begin; time, lane and number come from the book; the second finish is free."""
    clock = Clock()
    book = _book(tmp_path, clock)
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
    assert _lanes(book.journal)[2:] == [(1, 1, expected)]
    assert (book.counters.events, book.open) == (1, {})
    book.journal.close()


def test_time_never_goes_back(tmp_path: Path) -> None:
    """A clock that jumps back does not: later records carry the latest time given."""
    clock = Clock()
    book = _book(tmp_path, clock)
    for jump_us in (5, -3_600_000_000, 1, 3_600_000_010):
        clock.us += jump_us
        book.control(0, Heartbeat)
    times = [events.timestamp_us(record.timestamp) - NOW_US for _, _, record in _lanes(book.journal)]
    assert times == [0, 0, 5, 5, 5, 16]
    book.journal.close()


def test_threads_share_a_book(tmp_path: Path) -> None:
    """Four threads at once: each lane is contiguous and in order of time, and each request has its one event."""
    book = _book(tmp_path, Clock(), bytes_max=10_000_000)
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
    written = _lanes(book.journal)
    for lane in range(2):
        records = [record for partition, _, record in written if partition == lane]
        assert [record.seq for record in records] == list(range(len(records)))
        assert [seq for partition, seq, _ in written if partition == lane] == list(range(len(records)))
        assert records == sorted(records, key=lambda record: record.timestamp)
    assert Counter(r.event_id for _, _, r in written if isinstance(r, AuditEvent)) == Counter(ids)
    assert len(set(ids)) == 400
    book.journal.close()


def test_a_finaliser_inside_the_lock_has_its_turn_after(tmp_path: Path) -> None:
    """The garbage collector may run a finaliser that finishes another request, in the middle of our own section."""
    clock = Clock()
    book = _book(tmp_path, clock)
    dropped, asked = book.begin("u_1", 0, KNOWN), book.begin("u_2", 0, KNOWN)
    inner: list[AuditEvent] = []
    book._clock_us = lambda: (
        (  # the one call of ours that is made with the lock held
            inner or inner.append(book.finish(dropped, AuditEvent, {"status": "aborted"})) or NOW_US  # type: ignore[func-returns-value]
        )
        and NOW_US
    )
    book.finish(asked, AuditEvent, {"status": "ok"})
    written = [(seq, record.event_id) for _, seq, record in _lanes(book.journal) if isinstance(record, AuditEvent)]
    assert written == [(1, asked.event_id), (2, dropped.event_id)]
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
    book = _book(tmp_path, Clock(), bytes_max=10_000_000)
    ticket = book.begin("u_1", 0, KNOWN)
    book.finish(ticket, AuditEvent, {"status": "ok"} | fields)
    good = book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})
    told, after = [record for partition, _, record in _lanes(book.journal) if partition == 0][1:]
    assert isinstance(told, Integrity)
    assert (told.problem, told.subject_id, told.seq, after) == (problem, ticket.event_id, 1, good)
    assert book.counters.oversized + book.counters.invalid == 1
    estate = Estate(book.journal.folder, book.journal.end)
    assert estate.begun == {}
    book.journal.close()


def test_too_much_known_is_left_out_of_the_begin(tmp_path: Path) -> None:
    """A begin has a limit too: beyond it only the id is kept, and the lost event says so by being blank."""
    clock = Clock()
    book = _book(tmp_path, clock, bytes_max=10_000_000)
    ticket = book.begin("u_1", 0, {"tenant": "t", "reason": "x" * 70_000})
    book.journal.close()
    _, book = _recovered(tmp_path, clock)
    lost = next(record for _, _, record in _lanes(book.journal) if isinstance(record, AuditEvent))
    assert (lost.event_id, lost.status, lost.tenant) == (ticket.event_id, "lost", "")
    odd = book.begin("u_1", 0, {"tenant": "\ud800", "session_id": object()})
    assert msgspec.json.decode(odd.body[1:])["known"] == {}
    with pytest.raises(ValueError, match="at most 128"):
        book.begin("k" * 129, 0, {})
    book.journal.close()


def test_what_was_begun_and_not_finished_is_lost_once(tmp_path: Path) -> None:
    """After a death: the same id, what was known, its start by its latency; then goodbye on every lane; twice the same.

    Recovery that itself dies and is run again adds nothing.
    """
    clock = Clock()
    book = _book(tmp_path, clock)
    done, lost = book.begin("u_1", 0, KNOWN), book.begin("u_2", 1, {**KNOWN, "route": "/r"})
    clock.us += 1000
    book.finish(done, AuditEvent, {"status": "ok"})
    book.journal.close()

    clock.us += 9000
    estate, book = _recovered(tmp_path, clock)
    assert (list(estate.begun), estate.damaged_bytes, estate.meta.collector_id) == ([lost.event_id], 0, "host-1")
    first = _lanes(book.journal)
    book.journal.close()
    added = [(partition, seq, type(record).__name__) for partition, seq, record in first[3:]]
    assert added == [(1, 1, "AuditEvent"), (0, 2, "Goodbye"), (1, 2, "Goodbye")]
    told = first[3][2]
    assert isinstance(told, AuditEvent)
    assert (told.event_id, told.status, told.route, told.latency_ms) == (lost.event_id, "lost", "/r", 10.0)
    assert {r.reason for _, _, r in first if isinstance(r, Goodbye)} == {"recovered"}

    clock.us += 9000
    estate, book = _recovered(tmp_path, clock)
    assert (estate.begun, _lanes(book.journal)) == ({}, first)
    book.journal.close()


def test_a_damaged_record_is_told_and_its_request_lost(tmp_path: Path) -> None:
    """A flipped bit in an event's record: its request is told as lost, the damage as integrity, the rest is whole."""
    clock = Clock()
    book = _book(tmp_path, clock)
    tickets = [book.begin("u_1", 0, KNOWN) for _ in range(3)]
    for ticket in tickets:
        book.finish(ticket, AuditEvent, {"status": "ok"})
    book.journal.close()
    path = book.journal.folder / "00000001.seg"
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(tickets[1].event_id.encode())] ^= 1
    path.write_bytes(raw)
    _, book = _recovered(tmp_path, clock)
    ends = {r.event_id: r.status for _, _, r in _lanes(book.journal) if isinstance(r, AuditEvent)}
    assert ends == {t.event_id: s for t, s in zip(tickets, ("ok", "lost", "ok"), strict=True)}
    told = [record for _, _, record in _lanes(book.journal) if isinstance(record, Integrity)]
    assert [(r.problem, r.size_bytes > 100) for r in told] == [("journal damaged", True)]
    book.journal.close()


def test_a_long_request_outlives_its_segment(tmp_path: Path) -> None:
    """Segments are dropped once acknowledged; a begin in them that is still open is written again."""
    clock = Clock()
    book = _book(tmp_path, clock)
    long = book.begin("u_9", 1, KNOWN)
    for _ in range(100):
        book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})
        book.release(Position(book.journal.end.segment, 0))
    assert book.journal.first > 1
    assert book.journal.bytes < 2 * 4096
    book.journal.close()
    estate, book = _recovered(tmp_path, clock)
    assert list(estate.begun) == [long.event_id]
    book.journal.close()


def _fill(book: Book) -> list[Ticket]:
    """Begin until the journal refuses."""
    admitted: list[Ticket] = []
    with contextlib.suppress(JournalFull):
        while len(admitted) < 1000:
            admitted.append(book.begin("u_1", 0, KNOWN))
    return admitted


def test_a_quiet_lane_keeps_its_number_when_its_segments_are_gone(tmp_path: Path) -> None:
    """The head of each segment says where all lanes stood: a lost event there goes on counting."""
    clock = Clock()
    book = _book(tmp_path, clock)
    for _ in range(3):
        book.control(1, Heartbeat)
    lost = book.begin("u_9", 1, KNOWN)
    while book.journal.end.segment < 4:
        book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})
    book.release(Position(4, 0))
    last_us = book.last_us
    book.journal.close()
    clock.us -= 10**9
    _, book = _recovered(tmp_path, clock)
    told = [(p, seq, r) for p, seq, r in _lanes(book.journal) if r.event_id == lost.event_id]
    assert [(p, seq, events.timestamp_us(r.timestamp) >= last_us) for p, seq, r in told] == [(1, 4, True)]
    book.journal.close()


def test_a_full_journal_refuses_new_requests_and_finishes_old_ones(tmp_path: Path) -> None:
    """`refuse`: JournalFull at begin, nothing begun; every request admitted before still gets its event."""
    clock = Clock()
    book = _book(tmp_path, clock)
    admitted = _fill(book)
    with pytest.raises(JournalFull):
        book.begin("u_1", 0, KNOWN)
    assert 5 < len(admitted) < 100
    assert len(book.open) == len(admitted)
    for ticket in admitted:
        book.finish(ticket, AuditEvent, {"status": "ok"})
    ends = [record.event_id for _, _, record in _lanes(book.journal) if isinstance(record, AuditEvent)]
    assert ends == [ticket.event_id for ticket in admitted]
    assert book.journal.bytes <= 65_536
    book.journal.close()


def test_drop_oldest_keeps_taking_requests_within_the_bound(tmp_path: Path) -> None:
    """`drop-oldest`: the oldest segments go, the newest events and every open request stay."""
    book = _book(tmp_path, Clock(), when_full="drop-oldest")
    open_one = book.begin("u_2", 1, KNOWN)
    last = [book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"}) for _ in range(500)][-1]
    kept = _lanes(book.journal)
    assert kept[-1][2] == last
    assert book.journal.bytes <= 65_536
    assert [seq for _, seq, _ in kept] == list(range(kept[0][1], 501))
    assert list(Estate(book.journal.folder, book.journal.end).begun) == [open_one.event_id]
    book.journal.close()


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    """A child has the parent's files but not its sender: begin and finish raise Closed there, the parent goes on."""
    book = _book(tmp_path, Clock())
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
    book = _book(tmp_path, Clock())
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), turns=st.integers(0, 120))
def test_any_history_recovers_exactly(tmp_path_factory: pytest.TempPathFactory, seed: int, turns: int) -> None:
    """After any order of begins, ends, marks and releases, a death leaves each request exactly one end."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    folder, clock = tmp_path_factory.mktemp("j"), Clock()
    book = _book(folder, clock, bytes_max=10_000_000)
    is_open: list[Ticket] = []
    begun, ended, sent = set(), set(), {0: 1, 1: 1}
    seen: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(turns):
        clock.us += rng.randint(-5, 50)
        turn = rng.random()
        if turn < 0.5:
            is_open.append(book.begin("u", rng.randrange(2), KNOWN))
            begun.add(is_open[-1].event_id)
        elif turn < 0.8 and is_open:
            ticket = is_open.pop(rng.randrange(len(is_open)))
            shape = rng.choice([AuditEvent, Rejection])
            ended.add(book.finish(ticket, shape, {"status": "ok"}).event_id)
            seen[ticket.partition].append(1)
            sent[ticket.partition] = ticket.event.seq + 1 if ticket.event else 0
        elif turn < 0.9:
            book.mark(dict(sent))
        else:
            book.release(Position(book.journal.end.segment, 0))
    book.journal.close()
    left = Counter(ticket.partition for ticket in is_open)
    given = {lane: sum(seen[lane]) + 1 + left[lane] for lane in range(2)}
    estate, book = _recovered(folder, clock)
    assert set(estate.begun) == begun - ended
    written = _lanes(book.journal)
    lost = Counter(r.event_id for _, _, r in written if isinstance(r, AuditEvent) and r.status == "lost")
    assert lost == Counter(begun - ended)
    for lane in range(2):
        seqs = [seq for partition, seq, _ in written if partition == lane]
        assert seqs == list(range(given[lane] + 1))[-len(seqs) :]
        assert isinstance([record for partition, _, record in written if partition == lane][-1], Goodbye)
    times = [record.timestamp for _, _, record in written]
    assert times == sorted(times)
    book.journal.close()


def test_a_bad_event_is_never_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An out-of-bounds field with text in it reaches neither the log nor the journal's records."""
    book = _book(tmp_path, Clock())
    book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok", "reason": "canary-7f3a91 " * 50})
    shown = capsys.readouterr()
    assert "canary" not in shown.out + shown.err
    assert b"canary" not in (book.journal.folder / "00000001.seg").read_bytes()
    with pytest.raises(BadEvent):
        events.decode(b"canary-7f3a91")
    book.journal.close()
