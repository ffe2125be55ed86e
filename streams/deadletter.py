"""The dead letter: a record that could not be used, told with its reason and its place, so that the stream goes on.

Its bytes may hold text, so they are sealed (`collector/sealing.py`) with the key in `kafka.deadletter_key_file`, bound
to their place. Without a key they are not copied: they lie at the place that the letter names, as long as the topic
keeps them.
Delivery: at least once; the key is the place and the bytes are always the same, so a repetition is known as such.
"""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec
import structlog
from msgspec import Struct

from collector.kafka import ConsumerRecord, KafkaConfig, partition_for
from collector.sealing import SEALED_BYTES_MAX, NotOpened, Seal
from streams.output import Outgoing, Output

log = structlog.get_logger(__name__)

REASON_CHARACTERS_MAX: Final = 300
TOLD_MAX: Final = 20
"""Letters told one by one in the log; then only counted."""


class Unusable(ValueError):
    """A record that can't be used. The message says why and never quotes it."""


class Letter(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A dead letter as it lies on iw.deadletter, JSON."""

    topic: str
    partition: int
    offset: int
    appended: str
    """When the broker took the record, ISO 8601."""
    by: str
    """The role that could not use it."""
    reason: str
    size_bytes: int
    sealed: str = ""
    """Base64 of the sealed beginning of the record, where there is a key."""
    truncated: bool = False
    """The record was longer than what is sealed."""

    @property
    def place(self) -> str:
        """TOPIC-PARTITION-OFFSET."""
        return place_of(self.topic, self.partition, self.offset).decode()


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Letter] = msgspec.json.Decoder(Letter)


class DeadLetters:
    """Writes letters for one process."""

    def __init__(self, kafka: KafkaConfig, role: str) -> None:
        """Raises ValueError, one sentence, where the key file can't be used."""
        self.count = 0
        self._role = role
        self._seal = letter_seal(kafka)
        self._output = Output(kafka, kafka.topic("deadletter"))
        self._partitions = kafka.count("deadletter")

    async def put(self, unusable: Sequence[tuple[ConsumerRecord, str]]) -> None:
        """(record, reason) pairs. Returns when the letters are stored; waits while the broker is away."""
        letters = []
        for record, reason in unusable:
            place = place_of(record.topic, record.partition, record.offset)
            value = letter(record, reason, self._role, self._seal)
            letters.append(Outgoing(place, value, partition_for(place, self._partitions)))
            self.count += 1
            if self.count <= TOLD_MAX:
                log.warning("dead letter", source=place.decode(), reason=reason[:REASON_CHARACTERS_MAX])
        await self._output.write(letters)

    async def close(self) -> None:
        """Frees the producer."""
        await self._output.close()


def letter_seal(kafka: KafkaConfig) -> Seal | None:
    """What seals letters; None where no key is configured. Raises ValueError, which never quotes the file."""
    if kafka.deadletter_key_file is None:
        return None
    try:
        return Seal.from_file(kafka.deadletter_key_file)
    except ValueError as error:
        raise ValueError(f"kafka.deadletter_key_file: {error}") from None


def letter(record: ConsumerRecord, reason: str, role: str, seal: Seal | None = None) -> bytes:
    """The letter as JSON; the same record and reason always give the same bytes."""
    raw = record.value or b""
    sealed = b"" if seal is None else seal.seal(raw, place_of(record.topic, record.partition, record.offset))
    return _encoder.encode(
        Letter(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            appended=appended_at(record.timestamp),
            by=role,
            reason=reason[:REASON_CHARACTERS_MAX],
            size_bytes=len(raw),
            sealed=base64.b64encode(sealed).decode(),
            truncated=len(raw) > SEALED_BYTES_MAX,
        )
    )


def read_letter(raw: bytes) -> Letter:
    """The inverse of `letter`. Raises Unusable for anything else."""
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unusable(f"no dead letter: {type(error).__name__}") from None


def unseal(told: Letter, seal: Seal) -> bytes:
    """The first 64 KiB of the record that a letter tells of. Raises Unusable for another key or a changed letter."""
    if not told.sealed:
        raise Unusable("the dead letter holds no bytes: there was no key when it was written")
    try:
        return seal.open(base64.b64decode(told.sealed, validate=True), told.place.encode())
    except (NotOpened, ValueError):
        raise Unusable("the dead letter was sealed with another key, or changed since") from None


def appended_at(timestamp_ms: int) -> str:
    """The broker's time of a record, as letters tell it."""
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")


def place_of(topic: str, partition: int, offset: int) -> bytes:
    """The key of a letter."""
    return f"{topic}-{partition}-{offset}".encode()
