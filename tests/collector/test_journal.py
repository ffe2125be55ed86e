"""The journal: what was appended is read back, in order, whatever happens to the process, the disk or the bits."""

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collector import journal as journals
from collector.config import JournalConfig
from collector.event import AuditEvent
from collector.journal import (
    ACK,
    BEGIN,
    META,
    RECORD,
    Journal,
    JournalBusy,
    JournalFull,
    Position,
    Reader,
    ack_body,
    dead_boots,
    frame,
    lane_body,
    parse,
    parse_ack,
    segment_numbers,
)
from collector.tickets import Ticket
from tests.collector.booking import Clock, open_book, written
from tests.collector.signed_log import raws, verify

ROOT = Path(__file__).parent.parent.parent
BODIES = st.lists(
    st.builds(lambda kind, rest: bytes((kind,)) + rest, st.sampled_from([BEGIN, RECORD, ACK]), st.binary(max_size=300)),
    max_size=40,
)


def _config(folder: Path, **changes: object) -> JournalConfig:
    return JournalConfig.model_validate({"dir": folder, "segment_bytes": 4096, "bytes_max": 1_000_000} | changes)


def _read(journal: Journal, start: Position = Position(0, 0)) -> tuple[list[bytes], int]:  # noqa: B008  # immutable
    """All bodies but the segments' heads, and the damaged bytes."""
    reader = Reader(journal.folder, lambda: journal.end, start)
    return [entry.body for entry in reader.entries() if entry.body[0] != META], reader.damaged_bytes


def _segments(journal: Journal) -> list[Path]:
    return [journal.folder / f"{number:08d}.seg" for number in segment_numbers(journal.folder)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=BODIES, chunk=st.integers(700, 5000))
def test_what_was_appended_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, bodies: list[bytes], chunk: int
) -> None:
    """In order, over segments and read chunks of any size, from the start and from every position on the way."""
    monkeypatch.setattr(journals, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(journals, "BODY_BYTES_MAX", 600)
    journal = Journal(_config(tmp_path_factory.mktemp("j")), "b")
    for body in bodies:
        journal.append(body)
    assert _read(journal) == (bodies, 0)
    reader = Reader(journal.folder, lambda: journal.end)
    places = [entry.after for entry in reader.entries() if entry.body[0] != META]
    for index, place in enumerate(places):
        assert _read(journal, place) == (bodies[index + 1 :], 0)
    journal.close()


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), max_size=20))
def test_acknowledgements_round_trip(acked: dict[int, int]) -> None:
    """The mark is its own inverse."""
    assert parse_ack(ack_body(acked)) == acked


@given(st.binary(max_size=3000), st.booleans())
def test_any_bytes_parse_to_their_end(data: bytes, final: bool) -> None:
    """Garbage is a damaged stretch: no exception, no gap, no overlap, no endless loop."""
    at = 0
    for start, _body, end in parse(data, final=final):
        assert (start, end > start) == (at, True)
        at = end
    assert at == len(data) or not final


@settings(max_examples=200, deadline=None)
@given(bodies=BODIES, garbage=st.binary(min_size=1, max_size=50), data=st.data())
def test_garbage_between_records_harms_none_of_them(bodies: list[bytes], garbage: bytes, data: st.DataObject) -> None:
    """Bytes that somebody else wrote in between are skipped; every record around them is read."""
    place = data.draw(st.integers(0, len(bodies)))
    raw = b"".join(map(frame, bodies[:place])) + garbage + b"".join(map(frame, bodies[place:]))
    assert [body for _, body, _ in parse(raw, final=True) if body is not None] == bodies


def _small(folder: Path) -> tuple[Journal, list[bytes], bytes]:
    journal = Journal(_config(folder), "b")
    bodies = [
        lane_body(0, 0, b"", b'{"kind":"hello"}'),
        bytes((BEGIN,)) + b'{"event_id":"e1"}',
        lane_body(0, 1, b"u_1", b'{"kind":"inference","event_id":"e1"}'),
        ack_body({0: 1}),
        lane_body(3, 7, b"u_2", b'{"kind":"rejection"}' * 3),
        lane_body(3, 8, b"u_2", b'{"kind":"goodbye"}'),
    ]
    for body in bodies:
        journal.append(body)
    return journal, bodies, _segments(journal)[0].read_bytes()


def test_a_flipped_bit_anywhere_costs_one_record_at_most(tmp_path: Path) -> None:
    """Every bit of a small journal, one at a time: the record it is in is lost and counted, no other one is."""
    journal, bodies, raw = _small(tmp_path)
    meta = 12 + 1
    starts = [meta]
    for body in bodies:
        starts.append(starts[-1] + 12 + len(body))
    for bit in range(len(raw) * 8):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        _segments(journal)[0].write_bytes(damaged)
        hit = sum(start <= bit // 8 for start in starts) - 1
        expected = [body for index, body in enumerate(bodies) if index != hit]
        size = meta if hit < 0 else 12 + len(bodies[hit])
        assert _read(journal) == (expected, size), f"bit {bit}"
    journal.close()


def test_a_journal_cut_anywhere_keeps_what_was_whole(tmp_path: Path) -> None:
    """A torn tail of every length: all whole records are read, and what is appended afterwards too."""
    first, bodies, raw = _small(tmp_path)
    first.close()
    more = lane_body(3, 9, b"", b"{}")
    whole = [len(raw) - sum(12 + len(body) for body in bodies[index:]) for index in range(len(bodies) + 1)]
    for cut in range(len(raw)):
        for path in _segments(first):
            path.unlink()
        (first.folder / "00000001.seg").write_bytes(raw[:cut])
        journal = Journal(_config(tmp_path), "b", fresh=False)
        kept = bodies[: sum(end <= cut for end in whole[1:])]
        assert _read(journal)[0] == kept, f"cut at {cut}"
        journal.append(more)
        assert _read(journal)[0] == [*kept, more], f"cut at {cut}"
        journal.close()


def test_the_bound_refuses_and_what_was_admitted_still_goes_in(tmp_path: Path) -> None:
    """At `bytes_max` a bounded append raises JournalFull and writes nothing; an unbounded one is written."""
    journal = Journal(_config(tmp_path, bytes_max=65_536), "b")
    body = bytes((BEGIN,)) + bytes(1000)
    admitted = (65_536 - 4096) // (12 + len(body) + 4)
    for _ in range(admitted):
        journal.append(body, reserve_bytes=4096, bounded=True)
    with pytest.raises(JournalFull, match="65536 bytes"):
        journal.append(body, reserve_bytes=4096, bounded=True)
    size = sum(path.stat().st_size for path in _segments(journal))
    assert (journal.bytes, size <= 65_536 - 4096) == (size, True)
    journal.append(lane_body(0, 0, b"", b"{}"))
    assert len(_read(journal)[0]) == admitted + 1
    journal.remove_before(journal.end.segment)
    assert journal.bytes == sum(path.stat().st_size for path in _segments(journal)) < 5000
    journal.append(body, reserve_bytes=4096, bounded=True)
    journal.close()


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_refuses_and_leaves_no_half_record(tmp_path: Path) -> None:
    """A write that the system cuts short is taken back and told as JournalFull; with room again the journal goes on."""
    journal = Journal(_config(tmp_path), "b")
    body = lane_body(0, 0, b"", b"x" * 500)
    journal.append(body)
    before = journal.end
    for room in (0, 1, 11, 12, 300):
        with (
            _largest_file(before.offset + room),
            pytest.raises(JournalFull, match="takes no more: "),
        ):
            journal.append(body)
        assert journal.end == before
        assert _segments(journal)[0].stat().st_size == before.offset
    journal.append(body)
    assert _read(journal) == ([body, body], 0)
    journal.close()


def test_a_full_disk_at_a_new_segment_harms_nothing(tmp_path: Path) -> None:
    """Where not even the head of a segment fits, the next append with room makes it."""
    journal = Journal(_config(tmp_path), "b")
    body = lane_body(0, 0, b"", b"x" * 5000)
    journal.append(body)
    for _ in range(3):
        with _largest_file(5), pytest.raises(JournalFull):
            journal.append(body)
    journal.append(body)
    assert _read(journal) == ([body, body], 0)
    journal.close()


def test_a_living_process_keeps_its_folder(tmp_path: Path) -> None:
    """Another process, and this one again, are refused; the boot counts as dead only when its process is gone."""
    program = (
        "import sys; from pathlib import Path; from collector.config import JournalConfig;"
        "from collector.journal import Journal;"
        "j = Journal(JournalConfig(dir=Path(sys.argv[1])), 'b'); j.append(b'\\x02x');"
        "print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    for fresh in (True, False):
        with pytest.raises(JournalBusy, match="belongs to another running process"):
            Journal(_config(tmp_path), "b", fresh=fresh)
    assert dead_boots(tmp_path) == []
    process.kill()
    process.communicate()
    assert dead_boots(tmp_path) == ["b"]
    with pytest.raises(JournalBusy, match="holds the records of an earlier process"):
        Journal(_config(tmp_path), "b")
    mine = Journal(_config(tmp_path), "b", fresh=False)
    assert _read(mine) == ([b"\x02x"], 0)
    with pytest.raises(JournalBusy):
        Journal(_config(tmp_path), "b", fresh=False)
    mine.destroy()
    assert dead_boots(tmp_path) == []


def test_nobody_takes_a_new_folder_for_a_dead_one(tmp_path: Path) -> None:
    """While one process makes or claims folders, another one looking for dead boots waits."""
    with journals.folder_lock(tmp_path):
        handle = os.open(tmp_path / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
    assert dead_boots(tmp_path / "absent") == []


def test_folders_that_are_not_ours_are_never_touched(tmp_path: Path) -> None:
    """A folder without our lock, or with another file in it, is no dead boot, whatever `dir` was set to."""
    Journal(_config(tmp_path), "ours").close()
    for name, files in {"empty": [], "other": ["lock", "notes.txt"], "bare": ["00000001.seg"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("precious")
    assert dead_boots(tmp_path) == ["ours"]
    mixed = Journal(_config(tmp_path), "mixed")
    (mixed.folder / "notes.txt").write_text("precious")
    with pytest.raises(OSError, match="not empty"):
        mixed.destroy()
    assert (mixed.folder / "notes.txt").read_text() == "precious"
    mixed.close()


def test_a_reader_passes_over_segments_that_are_gone(tmp_path: Path) -> None:
    """What drop-oldest took is not there; the rest is read, from any position before it."""
    journal = Journal(_config(tmp_path), "b")
    bodies = [lane_body(0, seq, b"", b"x" * 1500) for seq in range(20)]
    for body in bodies:
        journal.append(body)
    journal.remove_before(4)
    kept, damaged = _read(journal)
    assert (kept, damaged) == (bodies[-len(kept) :], 0)
    assert 0 < len(kept) < 20
    assert _read(journal, Position(2, 100)) == (kept, 0)
    journal.close()
    with pytest.raises(ValueError, match="four times segment_bytes"):
        JournalConfig(segment_bytes=65_536, bytes_max=100_000)


def test_a_journal_is_for_its_owner_only(tmp_path: Path) -> None:
    """Folder 0700, files 0600: events are pseudonymous, not public."""
    journal = Journal(_config(tmp_path / "j"), "b")
    journal.append(lane_body(0, 0, b"", b"{}"))
    modes = {path.stat().st_mode & 0o777 for path in journal.folder.iterdir()}
    assert (modes, journal.folder.stat().st_mode & 0o777) == ({0o600}, 0o700)
    journal.close()


def test_a_folder_that_others_can_write_to_is_no_journal(tmp_path: Path) -> None:
    """They could put a dead boot there whose records would be sent as ours."""
    for mode in (0o777, 0o770):
        tmp_path.chmod(mode)
        with pytest.raises(PermissionError, match="run chmod go-w"):
            Journal(_config(tmp_path), "b")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_of_one_megabyte_refuses_and_goes_on(tmp_path: Path) -> None:
    """ENOSPC from a real file system in mid-record: told, nothing half written, and with room it goes on."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (tmp_path / "ballast").write_bytes(b"x" * 900_000)
        book = open_book(tmp_path / "j", Clock(), segment_bytes=16_384, bytes_max=1_000_000)
        begun: list[Ticket] = []

        def fill() -> None:
            while len(begun) < 10_000:
                begun.append(book.begin("u_1", 0, {}))
                book.finish(begun[-1], AuditEvent, {"status": "ok"})

        with pytest.raises(JournalFull, match="takes no more"):
            fill()
        assert len(begun) > 10
        (tmp_path / "ballast").unlink()
        if begun[-1].event is None:
            book.finish(begun[-1], AuditEvent, {"status": "ok"})
        last = book.finish(book.begin("u_1", 0, {}), AuditEvent, {"status": "ok"})
        found = written(book.journal)
        assert [seq for partition, seq, _ in found if partition == 0] == list(range(last.seq + 1))
        assert found[-1][2] == last
        report = verify(raws(book.journal), pinned=(), whole=False)
        assert report.problems == []
        book.journal.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
