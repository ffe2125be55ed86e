"""iw.commands: the writing end for people, and the forwarder that carries commands into the log of stage 2.

Stage 2 reads one log, iw.rollups; a command counts from its place in that log, so a replay decides alike. The owner of
a partition appends every record of the same partition of iw.commands to it, as it lies, and goes on from the last one
that the partition's state has seen: after a crash some come twice, which the engine knows by their offset; with new
state all of iw.commands comes again, which outlives iw.rollups. Whether a command is good is for the engine to say.

Delivery: at least once, in order. A flood is limited to `RECORDS_MAX` records in `POLL_S` a worker; behind it others
wait.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, Protocol

import structlog

from collector.kafka import (
    AIOKafkaConsumer,
    ConsumerRecord,
    KafkaConfig,
    KafkaError,
    TopicPartition,
    ensure_topics,
    make_consumer,
    partition_for,
    wait_for_broker,
)
from detectors.commands import COMMAND_BYTES_MAX
from detectors.rollup import Command, encode
from streams.output import Outgoing, Output

log = structlog.get_logger(__name__)

POLL_S: Final = 0.2
RETRY_DELAY_S: Final = 2.0
RECORDS_MAX: Final = 100
KEY: Final = b"command"


class NotWritten(ConnectionError):
    """Kafka did not acknowledge the command in time; whether it has it is not known."""


class Commanded(Protocol):
    """An engine that commands are for."""

    def applied(self, partition: int) -> tuple[int, int] | None:
        """(offset, append time in ms) of the last record of that partition of iw.commands that it has seen."""


async def send_command(kafka: KafkaConfig, tenant: str, record: bytes, *, timeout_s: float = 10.0) -> None:
    """Writes a signed command to its tenant's partition. Raises BrokerAway, TopicMismatch or NotWritten.

    Writing it again after NotWritten does no harm: a command of the same id is taken once.
    """
    await wait_for_broker(kafka, timeout_s)
    topic = kafka.topic("commands")
    partitions = (await ensure_topics(kafka))[topic]
    output = Output(kafka, topic)
    key = tenant.encode()
    try:
        async with asyncio.timeout(timeout_s):
            await output.write([Outgoing(key, record, partition_for(key, partitions))])
    except TimeoutError:
        raise NotWritten(
            f"Kafka did not acknowledge the command within {timeout_s:g} s: it may have it or not;"
            " look at `inferwatch finding list`"
        ) from None
    finally:
        await output.close()


class Forwarder:
    """Carries commands over for the partitions that have an engine here. `run` in the worker's event loop."""

    def __init__(self, kafka: KafkaConfig, engines: Mapping[int, Commanded]) -> None:
        """`engines`: those owned now, by partition; watched, so it may change."""
        self.forwarded = 0
        self._kafka = kafka
        self._topic = kafka.topic("commands")
        self._engines = engines
        self._reading: dict[int, Commanded] = {}
        self._rollups = Output(kafka, kafka.topic("rollups"))

    async def run(self) -> None:
        """Works until cancelled. What goes wrong is told and tried again: commands wait, findings don't."""
        try:
            while True:
                try:
                    await self._forward_all()
                except Exception as error:  # noqa: BLE001  # commands must not stop coming for good
                    reason = str(error) or type(error).__name__
                    log.warning("commands wait, trying on", topic=self._topic, error=reason)
                    await asyncio.sleep(RETRY_DELAY_S)
        finally:
            await self._rollups.close()

    async def _forward_all(self) -> None:
        self._reading = {}
        consumer = make_consumer(self._kafka, group_id=None)
        try:
            await consumer.start()
            while True:
                await self._follow(consumer)
                if not self._reading:
                    await asyncio.sleep(POLL_S)
                    continue
                fetched = await consumer.getmany(timeout_ms=int(POLL_S * 1000), max_records=RECORDS_MAX)
                for place, records in fetched.items():
                    if place.partition in self._reading:
                        await self._forward(place.partition, records)
                if fetched:
                    await asyncio.sleep(POLL_S)
        finally:
            with suppress(KafkaError, OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await consumer.stop()

    async def _follow(self, consumer: AIOKafkaConsumer) -> None:
        """Reads what is owned now; a partition whose engine is new is read from where that engine stands."""
        owned = dict(self._engines)
        new = {partition for partition, engine in owned.items() if self._reading.get(partition) is not engine}
        if not new and owned.keys() == self._reading.keys():
            return
        places = {partition: TopicPartition(self._topic, partition) for partition in owned}
        stood = {partition: await consumer.position(places[partition]) for partition in owned.keys() - new}
        consumer.assign(list(places.values()))
        begins = await consumer.beginning_offsets(list(places.values()))
        ends = await consumer.end_offsets(list(places.values()))
        for partition, place in places.items():
            at = stood[partition] if partition in stood else self._begin(partition, owned[partition], ends[place])
            consumer.seek(place, max(at, begins[place]))
        self._reading = owned

    def _begin(self, partition: int, engine: Commanded, end: int) -> int:
        applied = engine.applied(partition)
        if applied is None:
            return 0
        if applied[0] >= end:
            log.error("commands were deleted, or their topic was made anew: reading all", partition=partition)
            return 0
        return applied[0] + 1

    async def _forward(self, partition: int, records: list[ConsumerRecord]) -> None:
        carried = []
        for record in records:
            value = record.value or b""
            fits = value if len(value) <= COMMAND_BYTES_MAX else b""
            command = Command(partition, record.offset, record.timestamp, fits)
            carried.append(Outgoing(KEY, encode(command), partition))
        await self._rollups.write(carried)
        self.forwarded += len(carried)
