"""What a dead boot left: every request that was begun has exactly one end."""

import random
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector import event as events
from collector.event import AuditEvent, Goodbye, Heartbeat, Integrity, Rejection
from collector.journal import Position
from collector.tickets import Ticket
from tests.collector.booking import KNOWN, Clock, open_book, recovered, written
from tests.collector.signed_log import raws, verify


def test_too_much_known_is_left_out_of_the_begin(tmp_path: Path) -> None:
    """A begin has a limit too: beyond it only the id is kept, and the lost event says so by being blank."""
    clock = Clock()
    book = open_book(tmp_path, clock, bytes_max=10_000_000)
    ticket = book.begin("u_1", 0, {"tenant": "t", "reason": "x" * 70_000})
    book.journal.close()
    _, book = recovered(tmp_path, clock)
    lost = next(record for _, _, record in written(book.journal) if isinstance(record, AuditEvent))
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
    book = open_book(tmp_path, clock)
    done, lost = book.begin("u_1", 0, KNOWN), book.begin("u_2", 1, {**KNOWN, "route": "/r"})
    clock.us += 1000
    book.finish(done, AuditEvent, {"status": "ok"})
    book.journal.close()

    clock.us += 9000
    estate, book = recovered(tmp_path, clock)
    assert (list(estate.begun), estate.damaged_bytes, estate.meta.collector_id) == ([lost.event_id], 0, "host-1")
    first = written(book.journal)
    book.journal.close()
    added = [(partition, seq, type(record).__name__) for partition, seq, record in first[3:]]
    assert added == [
        (1, 1, "AuditEvent"),
        (0, 2, "Checkpoint"),
        (1, 2, "Checkpoint"),
        (0, 3, "Goodbye"),
        (1, 3, "Goodbye"),
    ]
    told = first[3][2]
    assert isinstance(told, AuditEvent)
    assert (told.event_id, told.status, told.route, told.latency_ms) == (lost.event_id, "lost", "/r", 10.0)
    assert {r.reason for _, _, r in first if isinstance(r, Goodbye)} == {"recovered"}

    clock.us += 9000
    estate, book = recovered(tmp_path, clock)
    assert (estate.begun, written(book.journal)) == ({}, first)
    book.journal.close()


def test_a_damaged_record_is_told_and_its_request_lost(tmp_path: Path) -> None:
    """A flipped bit in an event's record: its request is told as lost, the damage as integrity, the rest is whole."""
    clock = Clock()
    book = open_book(tmp_path, clock)
    tickets = [book.begin("u_1", 0, KNOWN) for _ in range(3)]
    for ticket in tickets:
        book.finish(ticket, AuditEvent, {"status": "ok"})
    book.journal.close()
    path = book.journal.folder / "00000001.seg"
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(tickets[1].event_id.encode())] ^= 1
    path.write_bytes(raw)
    _, book = recovered(tmp_path, clock)
    ends = {r.event_id: r.status for _, _, r in written(book.journal) if isinstance(r, AuditEvent)}
    assert ends == {t.event_id: s for t, s in zip(tickets, ("ok", "lost", "ok"), strict=True)}
    told = [record for _, _, record in written(book.journal) if isinstance(record, Integrity)]
    assert [(r.problem, r.size_bytes > 100) for r in told] == [("journal damaged", True)]
    book.journal.close()


def test_a_long_request_outlives_its_segment(tmp_path: Path) -> None:
    """Segments are dropped once acknowledged; a begin in them that is still open is found again."""
    clock = Clock()
    book = open_book(tmp_path, clock)
    long = book.begin("u_9", 1, KNOWN)
    for _ in range(100):
        book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})
        book.release(Position(book.journal.end.segment, 0))
    assert book.journal.first > 1
    assert book.journal.bytes < 2 * 4096
    book.journal.close()
    estate, book = recovered(tmp_path, clock)
    assert list(estate.begun) == [long.event_id]
    book.journal.close()


def test_a_quiet_lane_keeps_its_number_when_its_segments_are_gone(tmp_path: Path) -> None:
    """The head of each segment says where all lanes stood: a lost event there goes on counting."""
    clock = Clock()
    book = open_book(tmp_path, clock)
    for _ in range(3):
        book.control(1, Heartbeat)
    lost = book.begin("u_9", 1, KNOWN)
    while book.journal.end.segment < 4:
        book.finish(book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})
    book.release(Position(4, 0))
    last_us = book.last_us
    book.journal.close()
    clock.us -= 10**9
    _, book = recovered(tmp_path, clock)
    told = [(p, seq, r) for p, seq, r in written(book.journal) if r.event_id == lost.event_id]
    assert [(p, seq, events.timestamp_us(r.timestamp) >= last_us) for p, seq, r in told] == [(1, 4, True)]
    book.journal.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), turns=st.integers(0, 120))
def test_any_history_recovers_exactly(tmp_path_factory: pytest.TempPathFactory, seed: int, turns: int) -> None:
    """After any order of begins, ends, marks and releases, a death leaves each request exactly one end."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    folder, clock = tmp_path_factory.mktemp("j"), Clock()
    book = open_book(folder, clock, bytes_max=10_000_000)
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
    estate, book = recovered(folder, clock)
    report = verify(raws(book.journal), pinned=(), whole=False)
    assert (report.verdict, report.problems) == ("unproven", [])
    assert set(estate.begun) == begun - ended
    found = written(book.journal)
    lost = Counter(r.event_id for _, _, r in found if isinstance(r, AuditEvent) and r.status == "lost")
    assert lost == Counter(begun - ended)
    for lane in range(2):
        seqs = [seq for partition, seq, _ in found if partition == lane]
        assert seqs == list(range(given[lane] + 2))[-len(seqs) :]  # a last checkpoint, and goodbye
        assert isinstance([record for partition, _, record in found if partition == lane][-1], Goodbye)
    times = [record.timestamp for _, _, record in found]
    assert times == sorted(times)
    book.journal.close()
