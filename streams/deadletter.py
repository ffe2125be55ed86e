"""The dead letter: a record that could not be used, told with its reason and its place, so that the stream goes on.

The bytes themselves are not copied: they may hold text, and they lie at the place that the letter names for as long as
the source topic keeps them. Delivery: at least once; the key is the place, so a repetition is known as such.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

import orjson
import structlog

from collector.kafka import ConsumerRecord, KafkaConfig, partition_for
from streams.output import Outgoing, Output

log = structlog.get_logger(__name__)

REASON_CHARACTERS_MAX: Final = 300
TOLD_MAX: Final = 20
"""Letters told one by one in the log; then only counted."""


class Unusable(ValueError):
    """A record that can't be used. The message says why and never quotes it."""


class DeadLetters:
    """Writes letters for one process."""

    def __init__(self, kafka: KafkaConfig, role: str) -> None:
        self.count = 0
        self._kafka, self._role = kafka, role
        self._output = Output(kafka, kafka.topic("deadletter"))
        self._partitions = kafka.count("deadletter")

    async def put(self, unusable: Sequence[tuple[ConsumerRecord, str]]) -> None:
        """(record, reason) pairs. Returns when the letters are stored; waits while the broker is away."""
        letters = []
        for record, reason in unusable:
            key = f"{record.topic}-{record.partition}-{record.offset}".encode()
            value = letter(record, reason, self._role)
            letters.append(Outgoing(key, value, partition_for(key, self._partitions)))
            self.count += 1
            if self.count <= TOLD_MAX:
                log.warning("dead letter", source=key.decode(), reason=reason[:REASON_CHARACTERS_MAX])
        await self._output.write(letters)

    async def close(self) -> None:
        """Frees the producer."""
        await self._output.close()


def letter(record: ConsumerRecord, reason: str, role: str) -> bytes:
    """The letter as JSON. The same record and reason always give the same bytes."""
    return orjson.dumps(
        {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "appended": datetime.fromtimestamp(record.timestamp / 1000, UTC).isoformat(timespec="milliseconds"),
            "by": role,
            "reason": reason[:REASON_CHARACTERS_MAX],
            "size_bytes": len(record.value or b""),
        }
    )
