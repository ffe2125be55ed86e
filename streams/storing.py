"""Putting things into the store from an event loop, through its outages; and the plain copy of two topics into it."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
import structlog

from collector.kafka import (
    AIOKafkaConsumer,
    ConsumerRecord,
    KafkaConfig,
    KafkaError,
    OffsetAndMetadata,
    TopicPartition,
    make_consumer,
)
from detectors.finding import Finding
from detectors.finding import decode as decode_finding
from sinks.clickhouse.rows import StoredEvent, StoredRecord, status_columns
from streams.config import StreamsConfig
from streams.deadletter import DeadLetters, Unusable

log = structlog.get_logger(__name__)

RETRY_DELAY_S: Final = 0.2
RETRY_DELAY_S_MAX: Final = 10.0


class EventStore(Protocol):
    """The store, as far as ingest needs it. Calls block; they raise for what may pass, and are made again."""

    def insert_events(self, rows: Sequence[StoredEvent], *, token: str) -> None:
        """Stores events, once for a token."""

    def insert_records(self, rows: Sequence[StoredRecord], *, token: str) -> None:
        """Stores records of lanes as they were on the wire."""

    def insert_findings(self, findings: Sequence[Finding], *, token: str) -> None:
        """Stores revisions of findings; the same one twice is one."""

    def insert_status(self, records: Sequence[Mapping[str, object]], *, token: str) -> None:
        """Stores health records; the newest of a process is kept."""


class Insertions:
    """Makes one call after another in a thread, each until it succeeds."""

    def __init__(self) -> None:
        self.why = ""
        """Why the store takes nothing at the moment; empty while it does."""
        self.retries = 0

    async def make(self, insert: Callable[..., None], rows: Sequence[Any], token: str) -> None:
        """Returns when `insert(rows, token=token)` has. Waits while the store is away, and says so once."""
        delay_s = RETRY_DELAY_S
        while True:
            try:
                await asyncio.to_thread(insert, rows, token=token)
            except Exception as error:  # noqa: BLE001  # whatever the store raises, the rows must get there
                if not self.why:
                    log.warning("the store takes nothing, trying on", token=token, error=_one_line(error))
                self.why = f"the store takes nothing: {_one_line(error)}"
                self.retries += 1
                await asyncio.sleep(delay_s * random.uniform(0.5, 1))  # noqa: S311  # jitter
                delay_s = min(2 * delay_s, RETRY_DELAY_S_MAX)
            else:
                if self.why:
                    log.info("the store takes rows again", token=token)
                self.why = ""
                return


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def token_of(topic: str, partition: int, first: int, last: int) -> str:
    """The name under which the store knows a batch."""
    return f"{topic}:{partition}:{first}-{last}"


async def commit(consumer: AIOKafkaConsumer, partition: TopicPartition, offset: int) -> None:
    """Commits, or says that it could not: the next commit carries this offset too."""
    try:
        await consumer.commit({partition: OffsetAndMetadata(offset, "")})
    except KafkaError as error:
        log.warning("offset not committed", topic=partition.topic, error=type(error).__name__)


def finding_of(raw: bytes) -> Finding:
    """Raises Unusable, which never quotes the record."""
    try:
        return decode_finding(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unusable(f"no finding: {type(error).__name__}") from None


def status_of(raw: bytes) -> Mapping[str, object]:
    """Raises Unusable for anything that the store would refuse."""
    try:
        record = msgspec.json.decode(raw, type=dict[str, object])
        status_columns([record])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise Unusable(f"no health record: {type(error).__name__}") from None
    return record


class Copying:
    """Copies iw.findings and iw.status into the store, in order, at least once. What can't be read is a dead letter."""

    def __init__(
        self,
        kafka: KafkaConfig,
        streams: StreamsConfig,
        store: EventStore,
        letters: DeadLetters,
        insertions: Insertions,
    ) -> None:
        self.copied = 0
        self._kafka, self._streams = kafka, streams
        self._letters, self._insertions = letters, insertions
        self._kinds: dict[str, tuple[Callable[[bytes], Any], Callable[..., None]]] = {
            kafka.topic("findings"): (finding_of, store.insert_findings),
            kafka.topic("status"): (status_of, store.insert_status),
        }
        self._counts = {kafka.topic("findings"): kafka.count("findings"), kafka.topic("status"): kafka.count("status")}
        self._consumer: AIOKafkaConsumer | None = None
        self._done: dict[TopicPartition, int] = {}

    async def run(self) -> None:
        """Copies until cancelled."""
        tps = [TopicPartition(topic, p) for topic, count in self._counts.items() for p in range(count)]
        consumer = make_consumer(self._kafka, group_id=f"{self._kafka.topic_prefix}-store")
        await consumer.start()
        try:
            # One process owns the store, so it takes all partitions and no group has to agree.
            consumer.assign(tps)
            self._done = {tp: await consumer.committed(tp) or 0 for tp in tps}
            self._consumer = consumer
            while True:
                fetched = await consumer.getmany(timeout_ms=1000, max_records=self._streams.ingest_rows_max)
                for tp, records in fetched.items():
                    await self._copy(tp, records)
                    self._done[tp] = records[-1].offset + 1
                    await commit(consumer, tp, records[-1].offset + 1)
        finally:
            await consumer.stop()

    def lag(self) -> int:
        """Records appended and not copied yet."""
        return lag_of(self._consumer, self._done)

    def started(self) -> bool:
        """Whether the lag is known."""
        return fetched_all(self._consumer)

    async def _copy(self, tp: TopicPartition, records: Sequence[ConsumerRecord]) -> None:
        parse, insert = self._kinds[tp.topic]
        usable, unusable = [], []
        for record in records:
            if record.value is None:
                continue  # a deleted key of a compacted topic
            try:
                usable.append(parse(record.value))
            except Unusable as error:
                unusable.append((record, str(error)))
        await self._letters.put(unusable)
        if usable:
            token = token_of(tp.topic, tp.partition, records[0].offset, records[-1].offset)
            await self._insertions.make(insert, usable, token)
            self.copied += len(usable)


def lag_of(consumer: AIOKafkaConsumer | None, done: Mapping[TopicPartition, int]) -> int:
    """Records appended and not handled yet, of the partitions fetched from so far.

    `done` holds the next offset to handle of each partition.
    """
    ends = ((tp, consumer.highwater(tp)) for tp in consumer.assignment()) if consumer is not None else ()
    return sum(max(end - done.get(tp, 0), 0) for tp, end in ends if end is not None)


def fetched_all(consumer: AIOKafkaConsumer | None) -> bool:
    """Whether every partition was fetched from at least once, so that the lag is known."""
    return consumer is not None and all(consumer.highwater(tp) is not None for tp in consumer.assignment())
