"""What lies in the journals of a folder, without touching it: segments, damage, and what Kafka does not have.

A dead boot's last record may be cut short: that is what a death leaves, and its request is told as lost. Anything else
that can't be read is damage. Memory: one segment, and the requests without an end.
"""

import fcntl
import os
from collections import Counter
from pathlib import Path

import msgspec

from collector.journal import ACK, BEGIN, META, RECORD, Position, parse, segment_numbers
from collector.recovery import Estate

NAMES = {META: "meta", BEGIN: "begin", RECORD: "record", ACK: "ack"}


class SegmentCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One file."""

    name: str
    size_bytes: int
    entries: int
    kinds: dict[str, int]
    damaged_bytes: int
    damaged_at: int
    """Where the first damage begins; -1: nowhere."""
    torn_bytes: int
    """At the very end of the last segment: a record that was not written whole."""


class BootCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One process's journal."""

    boot: str
    in_use: bool
    """Its process lives; then the last entries may be written while we read."""
    collector_id: str
    records: int
    unacknowledged: int
    open_requests: int
    lanes: dict[int, int]
    """Partition to the next `seq`."""
    damaged: bool
    segments: list[SegmentCheck]


def check_journals(folder: Path) -> list[BootCheck]:
    """Every boot's journal under `folder`, the oldest first. Raises OSError."""
    if not folder.is_dir():
        return []
    boots = [path for path in folder.iterdir() if (path / "lock").is_file()]
    return [check_journal(path) for path in sorted(boots, key=lambda path: path.stat().st_mtime_ns)]


def check_journal(folder: Path) -> BootCheck:
    """One boot's journal. Raises OSError."""
    numbers = segment_numbers(folder)
    segments = [_segment(folder / f"{number:08d}.seg", last=number == numbers[-1]) for number in numbers]
    end = Position(numbers[-1], segments[-1].size_bytes) if numbers else Position(0, 0)
    estate = Estate(folder, end)
    unacknowledged = sum(lane.next - estate.acked.get(partition, 0) for partition, lane in estate.lanes.items())
    return BootCheck(
        boot=folder.name,
        in_use=_in_use(folder),
        collector_id=estate.meta.collector_id,
        records=sum(segment.kinds.get("record", 0) for segment in segments),
        unacknowledged=unacknowledged,
        open_requests=len(estate.begun),
        lanes={partition: lane.next for partition, lane in sorted(estate.lanes.items())},
        damaged=any(segment.damaged_bytes for segment in segments),
        segments=segments,
    )


def _segment(file: Path, *, last: bool) -> SegmentCheck:
    data = file.read_bytes()
    kinds: Counter[str] = Counter()
    damaged = [(start, end) for start, body, end in _entries(data, kinds) if body is None]
    torn = damaged.pop() if last and damaged and damaged[-1][1] == len(data) else (0, 0)
    return SegmentCheck(
        name=file.name,
        size_bytes=len(data),
        entries=kinds.total(),
        kinds=dict(kinds),
        damaged_bytes=sum(end - start for start, end in damaged),
        damaged_at=damaged[0][0] if damaged else -1,
        torn_bytes=torn[1] - torn[0],
    )


def _entries(data: bytes, kinds: Counter[str]) -> list[tuple[int, bytes | None, int]]:
    entries = list(parse(data, final=True))
    kinds.update(NAMES[body[0]] for _, body, _ in entries if body is not None)
    return entries


def _in_use(folder: Path) -> bool:
    handle = os.open(folder / "lock", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
