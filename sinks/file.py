"""The file sink: OCSF Detection Findings as JSON lines, for anything that tails a file.

Guarantee: a line is written in one write(2) to a file opened for appending, so it is there whole or not at all; a piece
left by a full disk or a power cut is cut off again. What was acknowledged survives SIGKILL, with `fsync` a power cut.
A finding sent again after a crash is left out when its revision is among the last `tail_mb` of the file. Several
processes may append to one file. Rotated by size, and reopened when something else renames or removes the file.
"""

import asyncio
import errno
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

import structlog

from detectors.finding import Finding
from sinks.config import FileConfig
from sinks.delivery import SinkSetupError
from sinks.formats import ocsf

log = structlog.get_logger(__name__)

_MIB: Final = 1024 * 1024
_LOCK_WAIT_S: Final = 10.0
_LOCK_POLL_S: Final = 0.005
_OURS: Final = b'{"activity_id":'
"""How every line begins: a piece of line that begins otherwise is somebody else's and is left alone."""
_UID: Final = re.compile(rb'"metadata":\{.*?"uid":"([^"\\]+\.[0-9]+)"')


def build(config: FileConfig) -> "FileSink":
    """The sink of `[sinks.file]`. Raises `SinkSetupError` when the file can't be opened for appending."""
    sink = FileSink(config, product_version=version("inferwatch"))
    try:
        sink.open()
    except OSError as error:
        raise SinkSetupError(f"sinks.file.path {config.path} can't be appended to: {error.strerror}") from None
    return sink


class FileSink:
    """Appends lines. Memory: the ids of the revisions in the tail, about 100 bytes each, at most 8,192 a MiB."""

    name = "file"
    batch_max = 500

    def __init__(self, config: FileConfig, *, product_version: str) -> None:
        self._config = config
        self._product_version = product_version
        self._fd = -1
        self._using = threading.Lock()
        self._known: frozenset[str] = frozenset()

    def open(self) -> None:
        """Opens the file, cuts off a piece of line, and reads which findings it ends with. Raises `OSError`."""
        self._config.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._mend()
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        tail_bytes = self._config.tail_mb * _MIB
        tails = (_tail(path, tail_bytes) for path in (self._config.path, self._rotated(1)))
        self._known = frozenset(uid.decode() for tail in tails for uid in _UID.findall(tail))

    async def send(self, findings: Sequence[Finding]) -> None:
        """One line each. Raises `OSError` (disk full, no permission): nothing half-written stays."""
        lines = [
            ocsf.encode(finding, product_version=self._product_version) + b"\n"
            for finding in findings
            if f"{finding.uid}.{finding.revision}" not in self._known
        ]
        if lines:
            await asyncio.to_thread(self._append, lines)

    async def close(self) -> None:
        """Closes the file, once a write that was given up has ended: its descriptor must not be reused meanwhile."""
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        with self._using:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _append(self, lines: Sequence[bytes]) -> None:
        with self._using:
            self._append_locked(lines)

    def _append_locked(self, lines: Sequence[bytes]) -> None:
        self._lock()
        try:
            for line in lines:
                size = os.fstat(self._fd).st_size
                if size and size + len(line) > self._config.rotate_mb * _MIB:
                    self._rotate()
                    size = 0
                self._write(line, size)
            if self._config.fsync:
                os.fsync(self._fd)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _lock(self) -> None:
        """Holds the lock of the file that the path names now, opening it when it is another than before."""
        while True:
            if self._fd < 0 or not self._current():
                self._reopen()
            self._wait_for_lock()
            if self._current():
                return

    def _wait_for_lock(self) -> None:
        """Limited in time: a neighbour that keeps the lock must not take a thread of ours with every attempt."""
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise OSError(errno.EAGAIN, f"another process holds the lock of {self._config.path}") from None
                time.sleep(_LOCK_POLL_S)
            else:
                return

    def _current(self) -> bool:
        try:
            named = self._config.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._fd))

    def _reopen(self) -> None:
        """Opens the path anew; closing the old descriptor frees its lock."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self._config.path, flags, self._config.mode)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no regular file")
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._sync_folder()

    def _write(self, line: bytes, size: int) -> None:
        written = os.write(self._fd, line)
        if written < len(line):
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _rotate(self) -> None:
        """PATH becomes PATH.1, PATH.1 becomes PATH.2, and the one after `keep` goes."""
        if self._config.fsync:
            os.fsync(self._fd)
        for number in range(self._config.keep - 1, 0, -1):
            if self._rotated(number).exists():
                self._rotated(number).replace(self._rotated(number + 1))
        self._config.path.replace(self._rotated(1))
        log.info("file rotated", path=str(self._config.path))
        self._lock()

    def _rotated(self, number: int) -> Path:
        return self._config.path.with_name(f"{self._config.path.name}.{number}")

    def _mend(self) -> None:
        """Deals with a last line without its end: ours is cut off (it comes again), a stranger's gets its line end."""
        size = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, ocsf.LINE_BYTES_MAX + 1, max(0, size - ocsf.LINE_BYTES_MAX - 1))
        if not tail or tail.endswith(b"\n"):
            return
        piece = tail[tail.rfind(b"\n") + 1 :]
        if piece.startswith(_OURS) or _OURS.startswith(piece):
            os.ftruncate(self._fd, size - len(piece))
        else:
            self._write(b"\n", size)
        log.warning("last line was incomplete", path=str(self._config.path), bytes=len(piece))

    def _sync_folder(self) -> None:
        """A new name in a folder is on the disk only once the folder is."""
        if not self._config.fsync:
            return
        folder = os.open(self._config.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _tail(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit))
            return file.read(limit)
    except FileNotFoundError:
        return b""
