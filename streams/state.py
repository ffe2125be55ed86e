"""How the state of one partition lies in a Faust table: compressed, cut into chunks, in two slots that take turns.

A snapshot of many chunks is not written at once, so each is written beside the last whole one, never over it: at every
moment of a crash one slot is whole. Every chunk says what it belongs to; `unpack` takes the newest whole slot.

The applied offset travels inside: replayed records at or below it are skipped, whatever was committed.
"""

import hashlib
from collections.abc import Mapping
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


def pack(partition: int, slot: int, state: State, bytes_max: int) -> list[tuple[bytes, bytes]]:
    """Table keys and values of one snapshot. Raises StateTooLarge beyond `bytes_max` packed bytes."""
    packed = bytes(cramjam.zstd.compress(state.snapshot, 3))
    if len(packed) > bytes_max:
        raise StateTooLarge(
            f"the state of partition {partition} is {len(packed)} bytes packed, over streams.state_bytes_max "
            f"({bytes_max}): raise it, or lower the detectors' limits"
        )
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    cuts = range(0, max(len(packed), 1), CHUNK_BYTES)
    return [
        (
            b"%d/%d/%d" % (partition, slot, index),
            _encoder.encode(_Chunk(FORMAT, state.applied, index, len(cuts), digest, packed[cut : cut + CHUNK_BYTES])),
        )
        for index, cut in enumerate(cuts)
    ]


def unpack(partition: int, table: Mapping[bytes, bytes]) -> tuple[State | None, int]:
    """(newest whole state of the partition or None, slot to write next)."""
    whole = {slot: state for slot in (0, 1) if (state := _slot(partition, slot, table)) is not None}
    if not whole:
        return None, 0
    newest = max(whole, key=lambda slot: whole[slot].applied)
    return whole[newest], 1 - newest


def _slot(partition: int, slot: int, table: Mapping[bytes, bytes]) -> State | None:
    first = _chunk(table.get(b"%d/%d/0" % (partition, slot)))
    if first is None or first.format != FORMAT:
        return None
    data = [first.data]
    for index in range(1, first.count):
        chunk = _chunk(table.get(b"%d/%d/%d" % (partition, slot, index)))
        if chunk is None or (chunk.digest, chunk.index, chunk.applied) != (first.digest, index, first.applied):
            return None
        data.append(chunk.data)
    packed = b"".join(data)
    if hashlib.blake2b(packed, digest_size=16).digest() != first.digest:
        return None
    return State(first.applied, bytes(cramjam.zstd.decompress(packed)))


def _chunk(raw: bytes | None) -> _Chunk | None:
    if raw is None:
        return None
    try:
        return _decoder.decode(raw)
    except msgspec.DecodeError:
        return None
