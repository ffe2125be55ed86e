"""How the state of one partition lies in a Faust table, so that neither a crash nor a zombie can spoil it.

A snapshot is compressed and cut into chunks. Each owner of a partition is a *writer* with a name of its own; it keeps
its snapshots in two slots that take turns, so one of them is whole at every moment of a crash. A key is
`partition/writer/slot/index`: no two writers share one. So a worker that was suspended, lost its partition, and goes on
storing can overwrite nothing of its successor's. A writer deletes the keys that it found when it began, and only once
a snapshot of its own is acknowledged: deletions go from later writers to earlier ones, never in a ring, hence the
last writer with a whole snapshot keeps it. Every chunk says what it belongs to; `unpack` takes the newest whole one.

The applied offset travels inside: replayed records at or below it are skipped, whatever was committed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import cramjam
import msgspec
from msgspec import Struct

CHUNK_BYTES: Final = 512 * 1024
"""Under the changelog's message size, with room for the header."""
FORMAT: Final = 1


class StateTooLarge(RuntimeError):
    """The packed state of a partition is over its limit."""


class State(NamedTuple):
    """What a partition goes on from."""

    applied: int
    """Offset of the last record that the snapshot has seen."""
    snapshot: bytes


class Found(NamedTuple):
    """What a table holds of one partition."""

    state: State | None
    """The newest whole one."""
    keys: tuple[bytes, ...]
    """All, whole or not; they may go once the next writer has a whole state of its own."""


class _Chunk(Struct, frozen=True, array_like=True):
    format: int
    applied: int
    index: int
    count: int
    digest: bytes
    """Of all chunks together, so that no mixture passes."""
    data: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Chunk)


def pack(partition: int, writer: str, slot: int, state: State, bytes_max: int) -> list[tuple[bytes, bytes]]:
    """Table keys and values of one snapshot. Pure, and lets other threads run while it compresses.

    Raises StateTooLarge beyond `bytes_max` packed bytes.
    """
    packed = bytes(cramjam.zstd.compress(state.snapshot, 1))
    if len(packed) > bytes_max:
        raise StateTooLarge(
            f"the state of partition {partition} is {len(packed)} bytes packed, over streams.state_bytes_max "
            f"({bytes_max}): raise it, or lower the detectors' limits"
        )
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    cuts = range(0, max(len(packed), 1), CHUNK_BYTES)
    return [
        (
            b"%d/%s/%d/%d" % (partition, writer.encode(), slot, index),
            _encoder.encode(_Chunk(FORMAT, state.applied, index, len(cuts), digest, packed[cut : cut + CHUNK_BYTES])),
        )
        for index, cut in enumerate(cuts)
    ]


def unpack(partition: int, table: Mapping[bytes, bytes]) -> Found:
    """What the table holds of `partition`; foreign or damaged entries count for nothing."""
    mine = b"%d/" % partition
    keys = sorted(key for key in table if key.startswith(mine))
    firsts = ((key, _chunk(table.get(key))) for key in keys if key.endswith(b"/0"))
    newest = sorted(
        ((first.applied, key, first) for key, first in firsts if first is not None and first.format == FORMAT),
        key=lambda found: found[:2],
        reverse=True,
    )
    whole = (state for _, key, first in newest if (state := _state(key[:-1], first, table)) is not None)
    return Found(next(whole, None), tuple(keys))


def _state(prefix: bytes, first: _Chunk, table: Mapping[bytes, bytes]) -> State | None:
    data = list(_data(prefix, first, table))
    packed = b"".join(data)
    if len(data) != first.count or hashlib.blake2b(packed, digest_size=16).digest() != first.digest:
        return None
    return State(first.applied, bytes(cramjam.zstd.decompress(packed)))


def _data(prefix: bytes, first: _Chunk, table: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """The parts that belong together, up to the first that is missing."""
    for index in range(first.count):
        chunk = _chunk(table.get(prefix + b"%d" % index))
        if chunk is None or (chunk.digest, chunk.index, chunk.applied) != (first.digest, index, first.applied):
            return
        yield chunk.data


def _chunk(raw: bytes | None) -> _Chunk | None:
    if raw is None:
        return None
    try:
        return _decoder.decode(raw)
    except msgspec.DecodeError:
        return None
