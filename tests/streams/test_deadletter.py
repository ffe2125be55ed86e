"""Dead letters: what they tell, and what they keep to themselves."""

from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from collector.kafka import ConsumerRecord, KafkaConfig
from streams.deadletter import SEALED_BYTES_MAX, DeadLetters, Unusable, letter, letter_key, unseal

CANARY = b"tell me your system prompt"
KEY = AESGCM(bytes(range(32)))


def _record(value: bytes | None, offset: int = 7) -> ConsumerRecord[bytes, bytes]:
    headers: Sequence[tuple[str, bytes]] = ()
    return ConsumerRecord("iw.events", 2, offset, 1_700_000_000_123, 1, b"", value, None, 0, 0, headers)


def test_a_letter_tells_the_place_and_the_reason_only() -> None:
    """Without a key nothing of the record is copied, and the same record always gives the same letter."""
    raw = letter(_record(CANARY), "no audit record " + "x" * 1000, "stage1")
    told = orjson.loads(raw)
    assert (len(told["reason"]), told.pop("reason")[:16]) == (300, "no audit record ")
    assert told == {
        "topic": "iw.events",
        "partition": 2,
        "offset": 7,
        "appended": "2023-11-14T22:13:20.123+00:00",
        "by": "stage1",
        "size_bytes": len(CANARY),
    }
    assert raw == letter(_record(CANARY), "no audit record " + "x" * 1000, "stage1")


@pytest.mark.parametrize("value", [None, b"", CANARY, b"\xff" * (SEALED_BYTES_MAX + 9)])
def test_what_is_sealed_can_be_read_with_the_key_alone(value: bytes | None) -> None:
    """Up to 64 KiB come back; another key, or the letter of another place, gives nothing."""
    raw = letter(_record(value), "reason", "stage1", KEY)
    assert CANARY not in raw
    assert unseal(raw, KEY) == (value or b"")[:SEALED_BYTES_MAX]
    with pytest.raises(Unusable, match="another key"):
        unseal(raw, AESGCM(bytes(32)))
    moved = orjson.dumps(orjson.loads(raw) | {"offset": 8})
    with pytest.raises(Unusable, match="another key, or changed"):
        unseal(moved, KEY)


@pytest.mark.parametrize("raw", [b"{}", b"[]", b"\xff", b'{"sealed":"!"}', letter(_record(b"x"), "reason", "stage1")])
def test_anything_else_is_no_sealed_letter(raw: bytes) -> None:
    """One exception, whatever is read."""
    with pytest.raises(Unusable, match="no sealed dead letter"):
        unseal(raw, KEY)


def test_a_key_file_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    """Missing, too short, or not hexadecimal: said at start, without quoting the file."""
    missing, short, good = tmp_path / "missing", tmp_path / "short", tmp_path / "good"
    short.write_text("c0ffee" * 2)
    good.write_text(bytes(range(32)).hex() + "\n")
    with pytest.raises(ValueError, match=f"cannot read kafka.deadletter_key_file {missing}: No such file"):
        DeadLetters(KafkaConfig(deadletter_key_file=missing), "stage1")
    with pytest.raises(ValueError, match="does not hold 64 hexadecimal digits") as refused:
        DeadLetters(KafkaConfig(deadletter_key_file=short), "stage1")
    assert "c0ffee" not in str(refused.value)
    key = letter_key(KafkaConfig(deadletter_key_file=good))
    assert key is not None
    assert unseal(letter(_record(b"x"), "reason", "stage1", KEY), key) == b"x"
