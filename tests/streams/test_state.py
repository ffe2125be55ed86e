"""State in the table: whole snapshots only, whatever a crash or a zombie leaves behind."""

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
    """A snapshot of any size comes back, with its offset and the names of all its keys."""
    state = State(41, _noise(size))
    table = dict(pack(3, "w", 0, state, MANY))
    assert unpack(3, table) == (state, tuple(sorted(table)))
    assert unpack(4, table) == (None, ())
    assert unpack(33, table) == (None, ())


def test_the_newest_whole_snapshot_wins() -> None:
    """Of all writers' slots the one with the highest offset is the state; all keys are found."""
    table = dict(pack(0, "a", 0, State(10, b"old"), MANY)) | dict(pack(0, "a", 1, State(20, b"new"), MANY))
    table |= dict(pack(0, "b", 0, State(15, b"zombie"), MANY))
    assert unpack(0, table) == (State(20, b"new"), (b"0/a/0/0", b"0/a/1/0", b"0/b/0/0"))


@given(st.integers(0, 3), st.booleans())
def test_a_half_written_snapshot_is_not_taken(written: int, older_was_longer: bool) -> None:
    """A crash after any number of chunks leaves the state that was whole before."""
    table = dict(pack(0, "w", 0, State(10, _noise((5 if older_was_longer else 1) * CHUNK_BYTES, 2)), MANY))
    table |= dict(pack(0, "w", 1, State(20, _noise(3 * CHUNK_BYTES, 3)), MANY))
    new = pack(0, "w", 0, State(30, _noise(3 * CHUNK_BYTES + 9, 4)), MANY)
    assert len(new) == 4
    table |= dict(new[:written])
    state = unpack(0, table).state
    assert state is not None
    assert state.applied == 20


@given(st.integers(0, 8), st.integers(0, 8))
def test_two_writers_at_once_leave_one_whole(zombie: int, successor: int) -> None:
    """A zombie and its successor both in the middle of a snapshot: the one that was whole before is still whole."""
    table = dict(pack(0, "zombie", 0, State(10, _noise(3 * CHUNK_BYTES, 2)), MANY))
    table |= dict(pack(0, "zombie", 1, State(11, _noise(3 * CHUNK_BYTES, 3)), MANY)[:zombie])
    table |= dict(pack(0, "successor", 0, State(12, _noise(3 * CHUNK_BYTES, 4)), MANY)[:successor])
    state = unpack(0, table).state
    assert state is not None
    assert state.applied == (12 if successor >= 4 else 11 if zombie >= 4 else 10)


@given(st.binary(max_size=200))
def test_anything_in_the_table_is_survived(raw: bytes) -> None:
    """Foreign bytes in a slot are no state, and no exception; their keys are found, so that they can go."""
    assert unpack(0, {b"0/w/0/0": raw, b"0/1/0": b"", b"0/": raw}) == (None, (b"0/", b"0/1/0", b"0/w/0/0"))


def test_a_changed_byte_is_noticed() -> None:
    """A damaged chunk makes its snapshot count for nothing."""
    ((key, value),) = pack(0, "w", 0, State(1, b"state" * 50), MANY)
    damaged = value[:-3] + bytes([value[-3] ^ 1]) + value[-2:]
    assert unpack(0, {key: damaged}).state is None


def test_too_large_a_state_is_refused_by_name() -> None:
    """The limit is on packed bytes, and the message names the setting."""
    with pytest.raises(StateTooLarge, match="state_bytes_max"):
        pack(0, "w", 0, State(1, _noise(5000)), 4096)
