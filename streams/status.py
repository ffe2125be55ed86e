"""Reads iw.status: the newest health record of every process, for `inferwatch status`."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from collector.kafka import KafkaConfig, ensure_topics, read_topic, wait_for_broker
from streams.deadletter import Unusable
from streams.storing import status_of

SILENT_S: Final = 35.0
"""Three records missed and some: the process is gone or stuck."""


async def read_status(kafka: KafkaConfig, *, timeout_s: float = 10.0) -> list[dict[str, object]]:
    """The newest record of each process that did not say goodbye, by role and id, with `age_s` and `silent` added.

    Raises BrokerAway or TopicMismatch with one sentence.
    """
    await wait_for_broker(kafka, timeout_s)
    await ensure_topics(kafka)
    return await newest_status(kafka)


async def newest_status(kafka: KafkaConfig) -> list[dict[str, object]]:
    """The same, of topics that are as they are."""
    newest: dict[str, tuple[Mapping[str, object], int]] = {}
    async for record in read_topic(kafka, "status"):
        try:
            status = status_of(record.value or b"")
        except Unusable:
            continue  # somebody else's record is not this reader's trouble
        newest[str(status["process_id"])] = (status, record.timestamp)
    now_ms = datetime.now(UTC).timestamp() * 1000
    return [
        {**record, "age_s": round(max(now_ms - at_ms, 0) / 1000, 1), "silent": now_ms - at_ms > SILENT_S * 1000}
        for record, at_ms in sorted(
            newest.values(), key=lambda pair: (str(pair[0]["role"]), str(pair[0]["process_id"]))
        )
        if record.get("state") != "stopped"
    ]
