"""Checkpoints: signs where all lanes of a boot stand, and remembers how boots ended.

A checkpoint is made every so often, before the journal lets go of a segment, and at the end of a boot. Hashing and
signing happen with the book's lock free; requests wait for the few µs that the copies take. What a crash leaves without
a checkpoint is in the journal still, and recovery signs it. Between a boot's last checkpoint and its goodbyes there is
nothing, so that whoever adds a record there is seen.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec

from collector.chain import (
    hints_of,
    merkle_path,
    merkle_root,
    part_hash,
    rotation_bytes,
    signed_bytes,
    split_leaves,
)
from collector.event import Change, Checkpoint, Ended, Goodbye, from_timestamp_us
from collector.journal import folder_lock
from collector.lanes import Book
from collector.signing import Signer

LANE_US: Final = 60_000_000
"""A lane is told a checkpoint this often though nothing but heartbeats came; a verifier takes one behind for cut."""
ENDED_MAX: Final = 64
_LEDGER: Final = "ended.json"


class _Stand(NamedTuple):
    """Where one lane stood."""

    partition: int
    due: bool
    first: int
    next: int
    leaves: bytes
    beats: int
    head: str
    beat_head: str


class Checkpoints:
    """Makes the checkpoints of one book. Thread-safe."""

    def __init__(self, book: Book, signer: Signer | None, *, number: int = 0, root: str = "") -> None:
        self.signer = signer
        self._book = book
        self._at_us = book.last_us
        self._one_at_a_time = threading.Lock()
        book.signed = (number, root)

    def pending(self) -> int:
        """The most records that a lane has without a checkpoint."""
        return max((len(lane.seqs) for lane in list(self._book.lanes.values())), default=0)

    def ended(self) -> Ended:
        """How the boot ended."""
        return Ended(boot=self._book.boot, root=self._book.signed[1], at_us=self._at_us)

    def make(self) -> bool:
        """Sign all lanes and tell those with something new; False where nothing was new.

        Raises JournalFull where the disk is full: what a lane was not told is signed again by the next one.
        """
        with self._one_at_a_time:
            with self._book.section:
                stands = self._stands(final=False)
            if not any(stand.due for stand in stands):
                return False
            signed = self._sign(stands, final=False)
            with self._book.section:
                self._tell(*signed)
        self._book.wake()
        return True

    def end(self, reason: Literal["stopped", "recovered"] = "stopped") -> None:
        """Sign all lanes for the last time and say goodbye on those that have not ended. Raises JournalFull: again."""
        with self._one_at_a_time, self._book.section:
            stands = self._stands(final=True)
            self._tell(*self._sign(stands, final=True))
            for stand in stands:
                if stand.due:
                    self._book.put(stand.partition, Goodbye, b"", {"reason": reason})
        self._book.wake()

    def rotated(self, signer: Signer) -> None:
        """From now on this key signs; a change tells it, signed by the key before and this one. Raises JournalFull."""
        said = rotation_bytes(signer.before, signer.public_key)
        self._book.control(
            min(self._book.lanes),
            Change,
            subject="signing_key",
            before=signer.before,
            after=signer.key_id,
            public_key=signer.public_key,
            signed_before=signer.signed_before,
            signed_after=signer.sign(said),
        )
        self.signer = signer

    def _stands(self, *, final: bool) -> list[_Stand]:
        return [
            _Stand(
                partition,
                (final or lane.fresh or self._book.last_us - lane.told_us >= LANE_US) and not lane.ended,
                lane.first,
                lane.next,
                bytes(lane.leaves),
                len(lane.beat_seqs),
                lane.head,
                lane.beat_head,
            )
            for partition, lane in sorted(self._book.lanes.items())
        ]

    def _sign(self, stands: Sequence[_Stand], *, final: bool) -> tuple[list[tuple[_Stand, dict[str, Any]]], int]:
        """What each lane that is due is to be told, and the time that was signed."""
        number, previous = self._book.signed
        at_us, signer = self._book.last_us, self.signer
        shared: dict[str, Any] = {
            "number": number + 1,
            "at_us": at_us,
            "final": final,
            "lanes": len(stands),
            "previous": previous,
        }
        shared |= {"key_id": signer.key_id if signer else ""}
        stamp: dict[str, Any] = {"schema_version": "", "event_id": "", "timestamp": from_timestamp_us(0), "seq": 0}
        stamp |= {"collector_id": self._book.collector_id, "boot": self._book.boot}
        parts = [self._part(stand) | {"lane": lane} for lane, stand in enumerate(stands)]
        hashes = [
            part_hash(stand.partition, Checkpoint(**stamp, **shared, **part))
            for stand, part in zip(stands, parts, strict=True)
        ]
        shared |= {"root": merkle_root(hashes).hex()}
        if signer is not None:
            shared |= {"signature": signer.sign(signed_bytes(Checkpoint(**stamp, **shared)))}
        told = [
            (stand, shared | part | {"path": [node.hex() for node in merkle_path(hashes, lane)]})
            for lane, (stand, part) in enumerate(zip(stands, parts, strict=True))
            if stand.due
        ]
        return told, at_us

    def _part(self, stand: _Stand) -> dict[str, Any]:
        leaves = split_leaves(stand.leaves)
        return {
            "first": stand.first,
            "next": stand.next,
            "records": len(leaves),
            "beats": stand.beats,
            "head": stand.head,
            "beat_head": stand.beat_head,
            "tree": merkle_root(leaves).hex(),
            "hints": hints_of(leaves),
        }

    def _tell(self, told: Iterable[tuple[_Stand, dict[str, Any]]], at_us: int) -> None:
        for stand, fields in told:
            checkpoint = self._book.put(stand.partition, Checkpoint, b"", fields)
            self._book.signed = (checkpoint.number, checkpoint.root)
            lane = self._book.lanes[stand.partition]
            lane.cover(stand.next)
            lane.fresh = len(lane.seqs) > 1
            lane.told_us = at_us
        self._at_us = at_us


def ended_boots(folder: Path) -> list[Ended]:
    """How boots with this journal folder ended that no hello has named yet, oldest first."""
    try:
        return msgspec.json.decode((folder / _LEDGER).read_bytes(), type=list[Ended])
    except (FileNotFoundError, msgspec.DecodeError):
        return []


def remember(folder: Path, ended: Ended) -> None:
    """Note how a boot ended, for the next hello. Raises OSError."""
    with folder_lock(folder):
        _write(folder, [*(one for one in ended_boots(folder) if one.boot != ended.boot), ended][-ENDED_MAX:])


def forget(folder: Path, named: Sequence[Ended]) -> None:
    """Kafka has a hello that names these. Raises OSError."""
    with folder_lock(folder):
        _write(folder, [one for one in ended_boots(folder) if one not in named])


def _write(folder: Path, ended: Sequence[Ended]) -> None:
    beside = folder / f"{_LEDGER}.new"
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(msgspec.json.encode(list(ended)))
    beside.replace(folder / _LEDGER)
