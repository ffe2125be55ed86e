"""Sealed bytes: what the key opens, and nobody else."""

import hashlib
from pathlib import Path

import pytest

from collector.sealing import SEALED_BYTES_MAX, NotOpened, Seal

PLACE = b"iw.events-3-4711"


NOISE = hashlib.shake_256(b"noise").digest(SEALED_BYTES_MAX)


@pytest.mark.parametrize("raw", [b"", b"\xff not json", NOISE], ids=["empty", "short", "longest"])
def test_opens_to_what_was_sealed(raw: bytes) -> None:
    """The same key and place give the bytes back, and nothing of them shows while sealed."""
    seal = Seal(b"k" * 64)
    sealed = seal.seal(raw, PLACE)
    assert seal.open(sealed, PLACE) == raw
    assert len(sealed) == len(raw) + 16
    assert not raw or raw not in sealed


def test_repetition_gives_the_same_bytes() -> None:
    """A letter written twice is the same letter; another place makes it another."""
    seal = Seal(b"k" * 64)
    assert seal.seal(b"raw", PLACE) == Seal(b"k" * 64).seal(b"raw", PLACE)
    assert seal.seal(b"raw", PLACE) != seal.seal(b"raw", b"iw.events-3-4712")


def test_long_bytes_are_cut() -> None:
    """A letter holds at most 64 KiB of its record."""
    seal = Seal(b"k" * 64)
    assert seal.open(seal.seal(b"x" * (SEALED_BYTES_MAX + 1), PLACE), PLACE) == b"x" * SEALED_BYTES_MAX


def test_changed_moved_or_foreign_bytes_do_not_open() -> None:
    """One flipped bit, another place, another key, or bytes that were never sealed."""
    seal = Seal(b"k" * 64)
    sealed = seal.seal(b"canary", PLACE)
    flipped = bytes([sealed[0] ^ 1]) + sealed[1:]
    attempts = ((seal, flipped, PLACE), (seal, sealed, b"other"), (Seal(b"j" * 64), sealed, PLACE), (seal, b"", PLACE))
    for key, content, place in attempts:
        with pytest.raises(NotOpened) as error:
            key.open(content, place)
        assert "canary" not in str(error.value)


def test_key_file(tmp_path: Path) -> None:
    """A key of 128 hex digits is taken; a file that is absent, short or no hex is named, its content never shown."""
    file = tmp_path / "deadletter.key"
    file.write_text("5a" * 64 + "\n")
    assert Seal.from_file(file).open(Seal.from_file(file).seal(b"x", PLACE), PLACE) == b"x"
    for content in ("abcd", "zz" * 64, "käse"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"deadletter\.key is not 128 hex digits") as error:
            Seal.from_file(file)
        assert content not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot read the sealing key .*absent"):
        Seal.from_file(tmp_path / "absent")
