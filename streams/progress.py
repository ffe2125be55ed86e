"""What ingest keeps on disk for one partition: its clock, and the batch that is about to be inserted.

Files are replaced whole, so SIGKILL leaves the old or the new one. They are not synced: after loss of power more is
read again, and a batch may be cut elsewhere; the store then replaces doubled rows, but counts them twice by the minute.
"""

import os
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog
from msgspec import Struct

from detectors.time import ClockState

log = structlog.get_logger(__name__)

FORMAT: Final = 1


class Saved(Struct):
    """The clock of a partition and the offset it goes on from. Everything before that offset is in the store."""

    next: int
    clock: ClockState
    format: int = FORMAT


class Intent(Struct):
    """The batch that was about to be inserted, both offsets included. Everything before `first` is in the store."""

    first: int
    last: int


_Kept = TypeVar("_Kept", Saved, Intent)


class Progress:
    """The two files of one partition."""

    def __init__(self, folder: Path, topic: str, partition: int) -> None:
        self._clock = folder / f"{topic}-{partition}.clock"
        self._intent = folder / f"{topic}-{partition}.intent"

    def load(self) -> tuple[Saved | None, Intent | None]:
        """Each None where it is missing or can't be read: then more is read again."""
        saved = _load(self._clock, Saved)
        return saved if saved is not None and saved.format == FORMAT else None, _load(self._intent, Intent)

    def save(self, saved: Saved) -> None:
        """Replaces the clock."""
        _replace(self._clock, msgspec.msgpack.encode(saved))

    def intend(self, first: int, last: int) -> None:
        """Replaces the intent; the batch before it must be in the store."""
        _replace(self._intent, msgspec.msgpack.encode(Intent(first, last)))

    def forget(self) -> None:
        """The topic was made anew: nothing of the old one applies."""
        self._clock.unlink(missing_ok=True)
        self._intent.unlink(missing_ok=True)


def _load(file: Path, kind: type[_Kept]) -> _Kept | None:
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("file not readable, the topic is read again", file=str(file), error=type(error).__name__)
        return None


def _replace(file: Path, raw: bytes) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_bytes(raw)
    beside.replace(file)
