"""State in the table: whole slots only, whatever a crash leaves behind."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.state import CHUNK_BYTES, State, StateTooLarge, pack, unpack

MANY = 1 << 30


def _noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311  # repeatable, no secret


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_what_is_packed_is_unpacked(size: int) -> None:
    """A snapshot of any size comes back, with its offset, and the other slot is next."""
    state = State(41, _noise(size))
    table = dict(pack(3, 0, state, MANY))
    assert unpack(3, table) == (state, 1)
    assert unpack(4, table) == (None, 0)


def test_the_newest_whole_slot_wins() -> None:
    """Two slots take turns; the one with the higher offset is the state, the other is written next."""
    table = dict(pack(0, 0, State(10, b"old"), MANY)) | dict(pack(0, 1, State(20, b"new"), MANY))
    assert unpack(0, table) == (State(20, b"new"), 0)
    # A zombie that stores an older state over the newer one leaves the other slot, and that is whole.
    table |= dict(pack(0, 1, State(5, b"zombie"), MANY))
    assert unpack(0, table) == (State(10, b"old"), 1)


@given(st.integers(0, 3), st.booleans())
def test_a_half_written_snapshot_is_not_taken(written: int, older_was_longer: bool) -> None:
    """A crash after any number of chunks leaves the state that was whole before."""
    table = dict(pack(0, 0, State(10, _noise((5 if older_was_longer else 1) * CHUNK_BYTES, 2)), MANY))
    table |= dict(pack(0, 1, State(20, _noise(3 * CHUNK_BYTES, 3)), MANY))
    new = pack(0, 0, State(30, _noise(3 * CHUNK_BYTES + 9, 4)), MANY)
    assert len(new) == 4
    table |= dict(new[:written])
    state, slot = unpack(0, table)
    assert state is not None
    assert (state.applied, slot) == (20, 0)


@given(st.binary(max_size=200))
def test_anything_in_the_table_is_survived(raw: bytes) -> None:
    """Foreign bytes in a slot are no state, and no exception."""
    assert unpack(0, {b"0/0/0": raw, b"0/1/0": b""}) == (None, 0)


def test_a_changed_byte_is_noticed() -> None:
    """A damaged chunk makes its slot count for nothing."""
    ((key, value),) = pack(0, 0, State(1, b"state" * 50), MANY)
    damaged = value[:-3] + bytes([value[-3] ^ 1]) + value[-2:]
    assert unpack(0, {key: damaged}) == (None, 0)


def test_too_large_a_state_is_refused_by_name() -> None:
    """The limit is on packed bytes, and the message names the setting."""
    with pytest.raises(StateTooLarge, match="state_bytes_max"):
        pack(0, 0, State(1, _noise(5000)), 4096)
