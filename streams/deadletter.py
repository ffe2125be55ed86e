"""The dead letter: a record that could not be used, told with its reason and its place, so that the stream goes on.

Its bytes may hold text, so they are sealed (AES-256-GCM, the place as associated data) with the key in
`kafka.deadletter_key_file`. Without a key they are not copied: they lie at the place that the letter names, as long as
the topic keeps them.
Delivery: at least once; the key is the place, so a repetition is known as such.
"""

import base64
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import orjson
import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from collector.kafka import ConsumerRecord, KafkaConfig, partition_for
from streams.output import Outgoing, Output

log = structlog.get_logger(__name__)

REASON_CHARACTERS_MAX: Final = 300
SEALED_BYTES_MAX: Final = 64 * 1024
"""Of a longer record only the beginning is sealed."""
TOLD_MAX: Final = 20
"""Letters told one by one in the log; then only counted."""
_NONCE_BYTES: Final = 12


class Unusable(ValueError):
    """A record that can't be used. The message says why and never quotes it."""


class DeadLetters:
    """Writes letters for one process."""

    def __init__(self, kafka: KafkaConfig, role: str) -> None:
        """Raises ValueError, one sentence, where the key file can't be used."""
        self.count = 0
        self._role = role
        self._key = letter_key(kafka)
        self._output = Output(kafka, kafka.topic("deadletter"))
        self._partitions = kafka.count("deadletter")

    async def put(self, unusable: Sequence[tuple[ConsumerRecord, str]]) -> None:
        """(record, reason) pairs. Returns when the letters are stored; waits while the broker is away."""
        letters = []
        for record, reason in unusable:
            place = _place(record.topic, record.partition, record.offset)
            value = letter(record, reason, self._role, self._key)
            letters.append(Outgoing(place, value, partition_for(place, self._partitions)))
            self.count += 1
            if self.count <= TOLD_MAX:
                log.warning("dead letter", source=place.decode(), reason=reason[:REASON_CHARACTERS_MAX])
        await self._output.write(letters)

    async def close(self) -> None:
        """Frees the producer."""
        await self._output.close()


def letter_key(kafka: KafkaConfig) -> AESGCM | None:
    """The key that seals letters; None where none is configured. Raises ValueError, which never quotes the file."""
    file = kafka.deadletter_key_file
    if file is None:
        return None
    try:
        digits = file.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise ValueError(f"cannot read kafka.deadletter_key_file {file}: {error.strerror}") from None
    if not re.fullmatch("[0-9a-fA-F]{64}", digits):
        raise ValueError(f"kafka.deadletter_key_file {file} does not hold 64 hexadecimal digits")
    return AESGCM(bytes.fromhex(digits))


def letter(
    record: ConsumerRecord,
    reason: str,
    role: str,
    key: AESGCM | None = None,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> bytes:
    """The letter as JSON, with `sealed` (base64 of nonce and ciphertext) where there is a key."""
    raw = record.value or b""
    told: dict[str, object] = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "appended": datetime.fromtimestamp(record.timestamp / 1000, UTC).isoformat(timespec="milliseconds"),
        "by": role,
        "reason": reason[:REASON_CHARACTERS_MAX],
        "size_bytes": len(raw),
    }
    if key is not None:
        nonce = random_bytes(_NONCE_BYTES)
        place = _place(record.topic, record.partition, record.offset)
        told["sealed"] = base64.b64encode(nonce + key.encrypt(nonce, raw[:SEALED_BYTES_MAX], place)).decode()
    return orjson.dumps(told)


def unseal(raw: bytes, key: AESGCM) -> bytes:
    """The first 64 KiB of the record that a letter tells of. Raises Unusable for another key or a changed letter."""
    try:
        told = orjson.loads(raw)
        sealed = base64.b64decode(told["sealed"], validate=True)
        place = _place(told["topic"], told["partition"], told["offset"])
        return key.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], place)
    except (KeyError, TypeError, ValueError):
        raise Unusable("no sealed dead letter") from None
    except InvalidTag:
        raise Unusable("the dead letter was sealed with another key, or changed since") from None


def _place(topic: str, partition: int, offset: int) -> bytes:
    return f"{topic}-{partition}-{offset}".encode()
