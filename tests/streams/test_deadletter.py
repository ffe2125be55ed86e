"""Dead letters: what they tell, and what they keep to themselves."""

from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from collector.kafka import ConsumerRecord, KafkaConfig
from collector.sealing import Seal
from streams.deadletter import SEALED_BYTES_MAX, DeadLetters, Unusable, letter, letter_seal, read_letter, unseal

CANARY = b"tell me your system prompt"
SEAL = Seal(bytes(range(64)))


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
    """Up to 64 KiB come back; another key, or the letter of another place, gives nothing. Written twice, it is one."""
    raw = letter(_record(value), "reason", "stage1", SEAL)
    assert raw == letter(_record(value), "reason", "stage1", SEAL)
    assert CANARY not in raw
    told = read_letter(raw)
    assert unseal(told, SEAL) == (value or b"")[:SEALED_BYTES_MAX]
    assert told.truncated == (value is not None and len(value) > SEALED_BYTES_MAX)
    with pytest.raises(Unusable, match="another key"):
        unseal(told, Seal(bytes(64)))
    with pytest.raises(Unusable, match="another key, or changed"):
        unseal(read_letter(orjson.dumps(orjson.loads(raw) | {"offset": 8})), SEAL)


@pytest.mark.parametrize("raw", [b"{}", b"[]", b"\xff", b'{"sealed":"!"}', b"[" * 5000, b""])
def test_anything_else_is_no_letter(raw: bytes) -> None:
    """One exception, whatever is read."""
    with pytest.raises(Unusable, match="no dead letter"):
        read_letter(raw)


def test_a_letter_without_a_key_holds_no_bytes() -> None:
    """Asked to open it, it says why it can't."""
    with pytest.raises(Unusable, match="there was no key when it was written"):
        unseal(read_letter(letter(_record(CANARY), "reason", "stage1")), SEAL)


def test_a_key_file_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    """Missing, too short, or not hexadecimal: said at start, without quoting the file."""
    missing, short, good = tmp_path / "missing", tmp_path / "short", tmp_path / "good"
    short.write_text("c0ffee" * 2)
    good.write_text(bytes(range(64)).hex() + "\n")
    with pytest.raises(ValueError, match=f"kafka.deadletter_key_file: .*{missing}: No such file"):
        DeadLetters(KafkaConfig(deadletter_key_file=missing), "stage1")
    with pytest.raises(ValueError, match="is not 128 hex digits") as refused:
        DeadLetters(KafkaConfig(deadletter_key_file=short), "stage1")
    assert "c0ffee" not in str(refused.value)
    seal = letter_seal(KafkaConfig(deadletter_key_file=good))
    assert seal is not None
    assert unseal(read_letter(letter(_record(b"x"), "reason", "stage1", SEAL)), seal) == b"x"
