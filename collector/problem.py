"""What a verifier tells of a log: problems, proofs, and what it reads of every record."""

from datetime import datetime
from typing import Final, Literal, TypeAlias

import msgspec

from collector.event import EPOCH

What: TypeAlias = Literal["changed", "removed", "inserted", "reordered", "truncated", "forged", "replaced"]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it was written."""

    what: What
    partition: int
    lane: str
    seq: int
    """Of the first record concerned; for what is removed, the number it had or would have."""
    place: int
    """Where it is seen: an offset of Kafka's, or a line of a file, from 0."""
    event_id: str
    why: str


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """That a record was signed, for somebody who has nothing else: see docs/evidence.md for how to check it."""

    partition: int
    record: str
    """As on the wire."""
    index: int
    path: list[str]
    """From the record's hash to the checkpoint's `tree`."""
    checkpoint: str
    """As on the wire."""


class Stamp(msgspec.Struct, frozen=True):
    """What every record says of its lane."""

    kind: str
    event_id: str
    collector_id: str
    boot: str
    seq: int
    timestamp: datetime
    chain: str = ""


_decoder: Final = msgspec.json.Decoder(Stamp)
UNREADABLE: Final = Stamp("", "", "", "", -1, EPOCH)


def stamp_of(raw: bytes) -> Stamp:
    """What a record says of its lane; `UNREADABLE` where it is none: whoever writes the log may write anything."""
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNREADABLE
