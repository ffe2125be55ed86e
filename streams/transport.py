"""Faust's Kafka transport, with a batch as message: one Faust event for each chunk fetched from a partition.

Assignment, rebalance, commits, tables and their recovery stay Faust's. This file brings three things of its own:
`BatchConsumer` hands over whole chunks and commits what the stage has settled; the clients are made by
`collector.kafka`, so that security has one config; and a commit that fails while the broker is away is retried, where
Faust would crash. Faust's fetch path may repeat or drop a chunk around a recovery: `batch.Sequencer` mends that.

Where a partition is read from is decided by the stage's own state (`Positions`), never by the committed offset alone.
Beside three files of `collector/` the only one that imports aiokafka. What it uses of Faust that is not public is
listed in `streams/surface.py`; where the installed Faust lacks any of it, `streams/plain.py` stands in for this file.
"""

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import faust
import structlog
from aiokafka.errors import IllegalStateError, KafkaError
from faust.transport import drivers
from faust.transport.drivers import aiokafka as driver
from faust.transport.utils import DefaultSchedulingStrategy
from faust.types import TP

from collector.kafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    KafkaConfig,
    OffsetAndMetadata,
    TopicPartition,
    make_consumer,
    make_producer,
)
from streams import fetch
from streams.batch import Batch, Positions, Sequencer
from streams.config import StreamsConfig
from streams.metrics import Histogram

__all__ = ["Batch", "BatchApp", "BatchConsumer", "BatchScheduler", "Positions", "Sequencer", "Transport"]

log = structlog.get_logger(__name__)

SCHEME: Final = "inferwatch"
"""The URL scheme of this transport: `inferwatch://HOST:PORT`."""


class BatchSchema(faust.Schema[bytes, bytes]):
    """Passes a batch on as it is; each stage decodes its own records."""

    def compile(self, app: Any, **_: Any) -> Callable[..., Awaitable[Any]]:
        """The decoder that Faust calls once for each batch."""
        create_event = app.create_event

        async def decode(message: Any, *, propagate: bool = False) -> Any:  # noqa: ARG001  # Faust's signature
            return create_event(None, message.value, message.headers, message)

        return decode


class BatchScheduler(DefaultSchedulingStrategy):
    """Folds the fetched records of the batch topic into batches; all other topics (changelogs) pass as usual."""

    def __init__(self, topic: str, records_max: int) -> None:
        self._topic, self._records_max = topic, records_max

    def iterate(self, records: Mapping[TP, list[Any]]) -> Iterator[tuple[TP, Any]]:
        """(partition, batch or record) in the order in which they are handed on."""
        others = {}
        for tp, fetched in records.items():
            if tp.topic != self._topic:
                others[tp] = fetched
                continue
            for start in range(0, len(fetched), self._records_max):
                yield tp, Batch(tp.topic, tp.partition, fetched[start : start + self._records_max])
        yield from super().iterate(others)


class _ReadOffsets(defaultdict[TP, int | None]):
    """Faust drops what it believes it has read, by an offset that it may write after a seek rewound it.

    That filter is switched off (None: deliver). Of the batch topic the Sequencer alone judges what was applied, and of
    a changelog Faust's recovery itself passes over what it has seen.
    """

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def __getitem__(self, tp: TP) -> int | None:
        return None


class BatchApp(faust.App):
    """A Faust app whose one source topic comes in batches."""

    def __init__(self, role: str, kafka: KafkaConfig, streams: StreamsConfig, topic: str, **options: Any) -> None:
        self.kafka, self.streams, self.batch_topic = kafka, streams, topic
        fetch.enable(topic)
        self.positions: Positions
        self.commit_seconds = Histogram.of_seconds()
        super().__init__(
            f"{kafka.topic_prefix}-{role}",
            broker=f"{SCHEME}://{kafka.bootstrap_servers.split(',', 1)[0].strip()}",
            store="memory://",
            web_enabled=False,
            autodiscover=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            table_standby_replicas=0,
            stream_wait_empty=False,
            stream_buffer_maxsize=streams.batches_queued_max,
            broker_commit_interval=1.0,
            **options,
        )

    def source(self) -> Any:
        """The batch topic. Acks are off: what may be committed is what the stage has settled."""
        schema = BatchSchema(key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
        return self.topic(self.batch_topic, schema=schema, acks=False)


class _ConsumerThread(driver.AIOKafkaConsumerThread):
    """Makes the consumer from our own config, and outlives a broker that is away at a commit."""

    app: BatchApp

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:  # noqa: ARG002  # Faust's signature
        app = self.app
        self._assignor = app.assignor
        return make_consumer(
            app.kafka,
            group_id=app.conf.id,
            client_id=f"inferwatch-{app.conf.id}",
            partition_assignment_strategy=[app.assignor],
            fetch_max_wait_ms=app.streams.fetch_max_wait_ms,
            max_poll_records=None,
            max_poll_interval_ms=1_000_000,
            session_timeout_ms=int(app.streams.session_timeout_s * 1000),
            heartbeat_interval_ms=int(app.streams.session_timeout_s * 1000) // 6,
            rebalance_timeout_ms=30_000,
        )

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        mine = self.assignment()
        wanted = {TopicPartition(*tp): OffsetAndMetadata(offset, "") for tp, offset in offsets.items() if tp in mine}
        began_s = time.monotonic()
        try:
            await self._ensure_consumer().commit(wanted)
        except (KafkaError, IllegalStateError) as error:
            # The state says where to go on, not the commit; the next one carries the same offsets or better.
            log.warning("offsets not committed", group=self.app.conf.id, error=type(error).__name__)
            return False
        self.app.commit_seconds.add(time.monotonic() - began_s)
        return True


class BatchConsumer(driver.Consumer):
    """Faust's consumer, for a topic that comes in batches."""

    app: BatchApp

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._read_offset = _ReadOffsets()
        self.scheduler = BatchScheduler(self.app.batch_topic, self.app.streams.batch_records_max)

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _filter_committable_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        offsets: dict[TP, int] = super()._filter_committable_offsets(tps)
        for partition, offset in self.app.positions.settled().items():
            tp = TP(self.app.batch_topic, partition)
            if self._should_commit(tp, offset):
                offsets[tp] = offset
        return offsets

    def batch_partitions(self) -> set[int]:
        """The partitions of the batch topic that this worker owns now."""
        return {tp.partition for tp in self.assignment() if tp.topic == self.app.batch_topic}

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Store state first, so that the next owner has nothing to replay; then Faust's own course."""
        await self.app.positions.before_revoke()
        await super().on_partitions_revoked(revoked)

    async def perform_seek(self) -> None:
        """Faust's seek to the committed offsets, then to where the state says."""
        await super().perform_seek()
        for partition in self.batch_partitions():
            offset = self.app.positions.next_offset(partition)
            if offset is not None:
                await self.rewind(partition, offset)

    async def rewind(self, partition: int, offset: int) -> None:
        """Read the partition from `offset` on. Does nothing where it was just lost to another worker."""
        await self._seek_quietly(TopicPartition(self.app.batch_topic, partition), offset)

    async def _seek_quietly(self, tp: TopicPartition, offset: int) -> None:
        try:
            await self.seek_wait({tp: offset})
        except IllegalStateError:
            log.info("partition is no longer ours", topic=tp.topic, partition=tp.partition)
        except (KafkaError, TimeoutError) as error:
            log.warning("seek not confirmed", topic=tp.topic, partition=tp.partition, error=type(error).__name__)

    async def mend_recovery(self) -> int:
        """Reads changelogs again from where a recovery that makes no progress stands; how many it was.

        The same fetch path may drop a chunk of a changelog, and then Faust waits for it for ever. Call it only after a
        while without progress: reading again is harmless, but costs a fetch.
        """
        recovery = self._recovery
        offsets = recovery.active_offsets
        behind = {tp: max(offsets[tp] + 1, 0) for tp, missing in recovery.active_remaining().items() if missing > 0}
        behind = {tp: offset for tp, offset in behind.items() if tp in self.assignment()}
        self.resume_partitions(behind)
        for tp, offset in behind.items():
            await self._seek_quietly(tp, offset)
        return len(behind)

    def recovery_misses(self) -> int:
        """How many changelog records the recovery under way still misses."""
        return int(self._recovery.active_remaining_total())

    @property
    def _recovery(self) -> Any:
        tables: Any = self.app.tables
        return tables.recovery

    async def bounds(self, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Partition → (earliest offset there, offset of the next record to come)."""
        tps = [TopicPartition(self.app.batch_topic, partition) for partition in partitions]
        if not tps:
            return {}
        earliest, end = await self.earliest_offsets(*tps), await self.highwaters(*tps)
        return {tp.partition: (earliest[tp], end[tp]) for tp in tps}

    def end_offset(self, partition: int) -> int | None:
        """Offset of the next record to come, as the last fetch said; None before any, and while it is being lost."""
        tp = TopicPartition(self.app.batch_topic, partition)
        try:
            end: int | None = self.highwater(tp) if tp in self.assignment() else None
        except (AssertionError, AttributeError):
            return None  # the consumer's thread took it away between the two
        return end

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's search for stuck streams reads acks, which are off here; lag and `/readyz` take its place."""


class BatchProducer(driver.Producer):
    """Faust's producer, made idempotent and from our own config."""

    app: BatchApp

    def _new_producer(self, transactional_id: str | None = None) -> AIOKafkaProducer:
        return make_producer(self.app.kafka, client_id=self.app.conf.id, transactional_id=transactional_id)


class Transport(driver.Transport):
    """What Faust finds under the URL scheme `inferwatch://`."""

    Consumer = BatchConsumer
    Producer = BatchProducer


drivers.TRANSPORTS.aliases[SCHEME] = f"{__name__}:Transport"
