"""The journal: what the collector owes to Kafka, on disk before the engine works and before an answer leaves.

Each process has one folder `DIR/BOOT/` of numbered segments, locked with flock while it lives. Written with write(2),
no buffer of ours between: what `append` returned from survives SIGKILL of this process. Loss of power may take what the
kernel had not written yet; `fsync_ms` bounds that.

Format of a record: magic, length of the body, CRC-32 of the body (all little-endian), body. The first byte of a body is
its type. The magic holds a byte that UTF-8 never does, so that after damage the next good record is found by looking
for it. Only audit events and what is known of them at `begin` are written here: never a prompt's text.
"""

import fcntl
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from collector.config import JournalConfig

MAGIC: Final = b"\xf7IWJ"
_HEAD: Final = struct.Struct("<4sII")
BODY_BYTES_MAX: Final = 512 * 1024
"""Larger than any event with its key; a longer length is damage."""
_CHUNK_BYTES: Final = 1024 * 1024
RESERVED_BYTES: Final = 4096
"""Room kept for the event of each request under way, so that what was admitted can be finished."""

META: Final = 1
"""Head of a segment: who writes it (JSON)."""
BEGIN: Final = 2
"""A request about to be worked on (JSON)."""
RECORD: Final = 3
"""A lane's record: `RECORD_HEAD`, key, encoded record."""
ACK: Final = 4
"""What Kafka has: `ACK_ENTRY` for each lane that moved."""
RECORD_HEAD: Final = struct.Struct("<BHIQ")
"""Type, length of the key, partition, seq."""
ACK_ENTRY: Final = struct.Struct("<IQ")
"""Partition, first seq not acknowledged."""
_SEGMENT_NAME: Final = re.compile(r"[0-9]{8,}\.seg\Z")
_TYPES: Final = frozenset((META, BEGIN, RECORD, ACK))


class JournalFull(RuntimeError):
    """The journal's bound is reached or the disk takes no more: nothing was written, the request must be refused."""


class JournalBusy(RuntimeError):
    """Another living process holds the folder."""


class Position(NamedTuple):
    """A place between two records."""

    segment: int
    offset: int


class Entry(NamedTuple):
    """One good record, its body's type included, and the place after it."""

    body: bytes
    after: Position


def frame(body: bytes) -> bytes:
    """The record as it lies on disk."""
    return _HEAD.pack(MAGIC, len(body), zlib.crc32(body)) + body


def lane_body(partition: int, seq: int, key: bytes, value: bytes) -> bytes:
    """The body of a RECORD."""
    return RECORD_HEAD.pack(RECORD, len(key), partition, seq) + key + value


def ack_body(acked: dict[int, int]) -> bytes:
    """The body of an ACK."""
    return bytes((ACK,)) + b"".join(ACK_ENTRY.pack(partition, seq) for partition, seq in acked.items())


def parse_ack(body: bytes) -> dict[int, int]:
    """The inverse of `ack_body`."""
    return dict(ACK_ENTRY.iter_unpack(body[1 : 1 + (len(body) - 1) // ACK_ENTRY.size * ACK_ENTRY.size]))


def parse(data: bytes, *, final: bool) -> Iterator[tuple[int, bytes | None, int]]:
    """The records in `data`: (start, body, end), body None for a damaged stretch.

    Where `data` is not `final` the last stretch may be the head of a record still to be read: it is left out.
    """
    at, size = 0, len(data)
    while at < size:
        if size - at >= _HEAD.size:
            magic, length, crc = _HEAD.unpack_from(data, at)
            end = at + _HEAD.size + length
            if magic == MAGIC and 0 < length <= BODY_BYTES_MAX:
                if end <= size:
                    body = data[at + _HEAD.size : end]
                    if zlib.crc32(body) == crc and body[0] in _TYPES:
                        yield at, body, end
                        at = end
                        continue
                elif not final:
                    return
        elif not final:
            return
        resume = data.find(MAGIC, at + 1)
        if resume < 0 and not final:
            # The magic itself may be cut by the end of the data.
            resume = max(at + 1, size - len(MAGIC) + 1)
        resume = size if resume < 0 else resume
        yield at, None, resume
        at = resume


def segment_numbers(folder: Path) -> list[int]:
    """The segments of a folder, oldest first."""
    return sorted(int(path.stem) for path in folder.iterdir() if _SEGMENT_NAME.match(path.name))


def _segment(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.seg"


class Reader:
    """Reads a folder's records in order, from a position to the end that `end` tells. Memory: one chunk of 1 MiB.

    Damaged stretches are skipped and counted in `damaged_bytes`; segments that are gone are skipped. For one thread.
    """

    def __init__(self, folder: Path, end: Callable[[], Position], start: Position = Position(0, 0)) -> None:  # noqa: B008  # immutable
        self._folder = folder
        self._end = end
        self.position = start
        self.damaged_bytes = 0

    def entries(self) -> Iterator[Entry]:
        """What lies between the position and the end as it is now. `position` follows what was taken."""
        end = self._end()
        while self.position < end:
            if self.position.segment < end.segment and not _segment(self._folder, self.position.segment).exists():
                later = [number for number in segment_numbers(self._folder) if number > self.position.segment]
                self.position = Position(later[0] if later else end.segment, 0)
                continue
            yield from self._segment_entries(end)
            if self.position.segment >= end.segment:
                return
            self.position = Position(self.position.segment + 1, 0)

    def _segment_entries(self, end: Position) -> Iterator[Entry]:
        number, offset = self.position
        try:
            handle = os.open(_segment(self._folder, number), os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            stop = end.offset if number == end.segment else os.fstat(handle).st_size
            while offset < stop:
                data = os.pread(handle, min(_CHUNK_BYTES, stop - offset), offset)
                if not data:
                    return
                base, final = offset, offset + len(data) >= stop
                for at, body, after in parse(data, final=final):
                    offset = base + after
                    self.position = Position(number, offset)
                    if body is None:
                        self.damaged_bytes += after - at
                    else:
                        yield Entry(body, self.position)
        finally:
            os.close(handle)


@contextmanager
def folder_lock(directory: Path) -> Iterator[None]:
    """Held while boot folders are made, claimed or removed, so that nobody takes a new one for a dead one.

    Raises PermissionError where others could put folders there.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if directory.stat().st_mode & 0o022:
        raise PermissionError(f"{directory}: other users can write to the journal's folder; run chmod go-w {directory}")
    handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Journal:
    """One boot's folder, open for writing. Not thread-safe but for `end`: the book of lanes locks around every call.

    `append` raises JournalFull and has then written nothing. `bytes` counts all segments. The limit holds for what is
    appended with `bounded`; the events of requests already admitted go past it only where they need more than the
    `RESERVED_BYTES` that were kept for each.
    """

    def __init__(self, config: JournalConfig, boot: str, *, fresh: bool = True) -> None:
        """Make the folder; or, not `fresh`, go on behind the last segment of a dead boot.

        Raises JournalBusy where the folder is another process's or already used, FileNotFoundError where a dead boot's
        is gone, OSError where the disk says no.
        """
        self.boot = boot
        self.head: Callable[[], bytes] = bytes
        """What to write at the head of each segment: enough to go on where all earlier ones are gone."""
        self.folder = config.dir / boot
        self.bytes_max, self._segment_bytes = config.bytes_max, config.segment_bytes
        self.drop_oldest = config.when_full == "drop-oldest"
        self._handle = -1
        self._synced = config.fsync_ms > 0
        self._rolled: list[int] = []
        """Full segments that are still to be synced to disk."""
        with folder_lock(config.dir):
            if fresh:
                self.folder.mkdir(exist_ok=True, mode=0o700)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._lock)
                raise JournalBusy(f"{self.folder} belongs to another running process") from None
        self._sizes = {number: _segment(self.folder, number).stat().st_size for number in segment_numbers(self.folder)}
        if fresh and self._sizes:
            os.close(self._lock)
            raise JournalBusy(f"{self.folder} holds the records of an earlier process: start under another boot")
        self.bytes = sum(self._sizes.values())
        last = max(self._sizes, default=0)
        self.end = Position(last, self._sizes.get(last, 0))
        """The place behind the last record; replaced as a whole, so that another thread may read it."""

    @property
    def first(self) -> int:
        """The oldest segment."""
        return min(self._sizes, default=0)

    def append(self, body: bytes, *, reserve_bytes: int = 0, bounded: bool = False) -> None:
        """Write one record. With `bounded` the limit holds, `reserve_bytes` counted in. Raises JournalFull."""
        record = frame(body)
        if bounded and self.bytes + len(record) + reserve_bytes > self.bytes_max:
            raise JournalFull(f"the journal in {self.folder} is full ({self.bytes_max} bytes): Kafka must take events")
        if self.end.offset >= self._segment_bytes or self._handle < 0:
            self._roll()
        self._write(record)

    def _write(self, record: bytes) -> None:
        number, offset = self.end
        written, reason = 0, "it is full"
        try:
            written = os.pwrite(self._handle, record, offset)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        if written != len(record):
            # The next record goes to the same place, and readers never look behind `end`.
            with suppress(OSError):
                os.ftruncate(self._handle, offset)
            raise JournalFull(f"the disk under {self.folder} takes no more: {reason}")
        self._sizes[number] = offset + written
        self.bytes += written
        self.end = Position(number, offset + written)

    def _roll(self) -> None:
        number = self.end.segment + 1
        try:
            handle = os.open(_segment(self.folder, number), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as error:
            raise JournalFull(f"no new segment can be made in {self.folder}: {error.strerror}") from None
        if self._handle >= 0 and self._synced:
            self._rolled.append(self._handle)
        elif self._handle >= 0:
            os.close(self._handle)
        self._handle, self._sizes[number] = handle, 0
        self.end = Position(number, 0)
        self._write(frame(bytes((META,)) + self.head()))

    def remove_before(self, segment: int) -> None:
        """Delete the segments before `segment`, never the one being written."""
        for number in [number for number in self._sizes if number < min(segment, self.end.segment)]:
            _segment(self.folder, number).unlink(missing_ok=True)
            self.bytes -= self._sizes.pop(number)

    def handles_to_sync(self) -> list[int]:
        """What was written since the last call, for the caller to fsync and close."""
        handles, self._rolled = self._rolled, []
        return [*handles, os.dup(self._handle)] if self._handle >= 0 else handles

    def close(self) -> None:
        """Close the files and give the lock back; the folder stays for a later boot."""
        for handle in (*self._rolled, self._handle, self._lock):
            if handle >= 0:
                os.close(handle)
        self._handle = self._lock = -1
        self._rolled = []

    def destroy(self) -> None:
        """Remove the folder, our own files only: everything in it is acknowledged. Raises OSError."""
        with folder_lock(self.folder.parent):
            for number in segment_numbers(self.folder):
                _segment(self.folder, number).unlink()
            (self.folder / "lock").unlink()
            self.folder.rmdir()
            self.close()


def dead_boots(directory: Path) -> list[str]:
    """The boots in `directory` whose process is gone (nobody holds the lock), oldest first."""
    dead: list[str] = []
    if not directory.is_dir():
        return dead
    with folder_lock(directory):
        for folder in sorted(filter(_is_ours, directory.iterdir()), key=lambda path: path.stat().st_mtime_ns):
            handle = os.open(folder / "lock", os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                dead.append(folder.name)
            except OSError:
                pass
            finally:
                os.close(handle)
    return dead


def _is_ours(folder: Path) -> bool:
    """Whether this is a boot's folder: a lock, segments, and nothing else. Others are never touched."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "lock" in names and all(name == "lock" or _SEGMENT_NAME.match(name) for name in names)
