"""Writing to one topic so that it is written: retried until the broker has it, through outages and refused batches.

A write that had to be repeated may be on the topic twice, in order and with the same bytes; every reader of ours is
made for that (rollups overwrite, findings have a uid and a revision, ingest has its tokens).
"""

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import structlog

from collector.kafka import (
    RECORD_OVERHEAD_BYTES,
    AIOKafkaProducer,
    BatchRefused,
    BatchWriter,
    BrokerAway,
    KafkaConfig,
    KafkaError,
    make_producer,
)

log = structlog.get_logger(__name__)

RETRY_DELAY_S: Final = 0.1
RETRY_DELAY_S_MAX: Final = 5.0
RECORD_BYTES_MAX: Final = 1024 * 1024


class Outgoing(NamedTuple):
    """One record to write."""

    key: bytes
    value: bytes | None
    """None deletes the key, where the topic is compacted."""
    partition: int


class Output:
    """A topic and its producer. `write` returns when everything is acknowledged; several tasks take turns."""

    def __init__(self, kafka: KafkaConfig, topic: str, *, record_bytes_max: int = RECORD_BYTES_MAX) -> None:
        self.topic = topic
        self.written = 0
        self.dropped = 0
        """Records too large for the topic."""
        self._kafka = kafka
        self._record_bytes_max = record_bytes_max
        self._turn = asyncio.Lock()
        self._producer: AIOKafkaProducer | None = None
        self._writer: BatchWriter | None = None

    async def write(self, records: Sequence[Outgoing]) -> None:
        """Waits as long as the broker is away, and says so. Records over the size limit are left out and counted."""
        fitting = [record for record in records if self._fits(record)]
        async with self._turn:
            await self._write_all(fitting)

    async def _write_all(self, fitting: Sequence[Outgoing]) -> None:
        delay_s = RETRY_DELAY_S
        while fitting:
            try:
                await self._write_once(fitting)
            except (BatchRefused, BrokerAway, KafkaError, OSError) as error:
                if delay_s == RETRY_DELAY_S:
                    log.warning("cannot write, trying on", topic=self.topic, error=str(error) or type(error).__name__)
                await self._forget_producer()
                await asyncio.sleep(delay_s * random.uniform(0.5, 1))  # noqa: S311  # jitter
                delay_s = min(2 * delay_s, RETRY_DELAY_S_MAX)
            else:
                self.written += len(fitting)
                if delay_s > RETRY_DELAY_S:
                    log.info("writing again", topic=self.topic)
                return

    def _fits(self, record: Outgoing) -> bool:
        size = len(record.key) + len(record.value or b"") + RECORD_OVERHEAD_BYTES
        if size > self._record_bytes_max:
            self.dropped += 1
            log.error("record left out: too large", topic=self.topic, bytes=size, bytes_max=self._record_bytes_max)
        return size <= self._record_bytes_max

    async def _write_once(self, records: Sequence[Outgoing]) -> None:
        if self._writer is None:
            self._producer = make_producer(self._kafka, client_id=self.topic, linger_ms=0)
            await self._producer.start()
            self._writer = BatchWriter(self._producer, self.topic, record_bytes_max=self._record_bytes_max)
        for record in records:
            await self._writer.append(record.key, record.value, record.partition)
        await self._writer.flush(self._kafka.request_timeout_ms / 1000)

    async def close(self) -> None:
        """Nothing is under way between two calls of `write`, so nothing is lost."""
        await self._forget_producer()

    async def _forget_producer(self) -> None:
        producer, self._producer, self._writer = self._producer, None, None
        if producer is not None:
            with suppress(KafkaError, OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await producer.stop()
