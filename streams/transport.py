"""Faust's Kafka transport, with a batch as message: one Faust event for each chunk fetched from a partition.

Assignment, rebalance, commits, tables and their recovery stay Faust's. This file brings four things of its own:
`BatchConsumer` hands over whole chunks and commits what the stage has settled; `Sequencer` makes delivery contiguous,
because Faust's fetch path may repeat or drop a chunk around a recovery; the clients are made by `collector.kafka`, so
that security has one config; and a commit that fails while the broker is away is retried, where Faust would crash.

Where a partition is read from is decided by the stage's own state (`Positions`), never by the committed offset alone.
Beside three files of `collector/` the only one that imports aiokafka. What it uses of Faust that is not public is listed in
`PRIVATE_SURFACE` and checked by `check_versions`.
"""

import importlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final, Protocol

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
    ConsumerRecord,
    KafkaConfig,
    OffsetAndMetadata,
    TopicPartition,
    make_consumer,
    make_producer,
)
from streams.config import StreamsConfig

log = structlog.get_logger(__name__)

SCHEME: Final = "inferwatch"
"""The URL scheme of this transport: `inferwatch://HOST:PORT`."""

TESTED: Final = {"faust-streaming": "0.15", "mode-streaming": "0.7", "aiokafka": "0.14"}
PRIVATE_SURFACE: Final = (
    ("faust.transport.drivers", "TRANSPORTS"),
    ("faust.transport.drivers.aiokafka:AIOKafkaConsumerThread", "_create_worker_consumer"),
    ("faust.transport.drivers.aiokafka:AIOKafkaConsumerThread", "_commit"),
    ("faust.transport.drivers.aiokafka:AIOKafkaConsumerThread", "_ensure_consumer"),
    ("faust.transport.drivers.aiokafka:Consumer", "_new_consumer_thread"),
    ("faust.transport.drivers.aiokafka:Producer", "_new_producer"),
    ("faust.transport.consumer:Consumer", "_read_offset"),
    ("faust.transport.consumer:Consumer", "_filter_committable_offsets"),
    ("faust.transport.consumer:Consumer", "_should_commit"),
    ("faust.tables.manager:TableManager", "recovery"),
    ("faust.tables.recovery:Recovery", "active_offsets"),
    ("faust.tables.recovery:Recovery", "active_remaining"),
    ("faust.tables.recovery:Recovery", "active_remaining_total"),
)


class UnknownVersion(RuntimeError):
    """An installed library is not of a version that the batch transport was tested with."""


def check_versions() -> None:
    """Raise UnknownVersion, saying what to install, unless the libraries are as tested and still have what is used."""
    for package, tested in TESTED.items():
        found = version(package)
        if not found.startswith(tested + "."):
            raise UnknownVersion(
                f"{package} {found} is installed, but the batch transport was tested with {tested}.x only: "
                f"install '{package}=={tested}.*'"
            )
    for where, name in PRIVATE_SURFACE:
        module, _, owner = where.partition(":")
        target = importlib.import_module(module)
        target = getattr(target, owner) if owner else target
        if not hasattr(target, name) and name not in getattr(target, "__annotations__", {}):
            raise UnknownVersion(f"{where} has no {name}: install the pinned versions of requirements/soc.txt")


class Batch:
    """The records of one partition that were fetched together, in offset order; it passes for one Faust record."""

    __slots__ = ("offset", "partition", "records", "timestamp", "timestamp_type", "topic")
    headers = key = checksum = None
    serialized_key_size = serialized_value_size = 0

    def __init__(self, topic: str, partition: int, records: Sequence[ConsumerRecord]) -> None:
        last = records[-1]
        self.topic, self.partition, self.records = topic, partition, records
        self.offset, self.timestamp, self.timestamp_type = last.offset, last.timestamp, last.timestamp_type

    @property
    def value(self) -> "Batch":
        """What the agent receives."""
        return self


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


class Sequencer:
    """Contiguous delivery of one partition: trims what was applied, refuses a hole. Pure; the caller does the seek."""

    __slots__ = ("holes", "next", "repeats")

    def __init__(self, start: int) -> None:
        self.next = start
        """The offset that must come next."""
        self.repeats = 0
        self.holes = 0

    def accept(self, records: Sequence[ConsumerRecord]) -> Sequence[ConsumerRecord] | None:
        """The records that are new, maybe none; None at a hole: seek to `next`, the missing ones are still there."""
        if records[0].offset > self.next:
            self.holes += 1
            return None
        fresh = records
        if records[0].offset < self.next:
            fresh = [record for record in records if record.offset >= self.next]
            self.repeats += len(records) - len(fresh)
        self.next = max(self.next, records[-1].offset + 1)
        return fresh


class Positions(Protocol):
    """The stage, as far as the consumer must know it."""

    def next_offset(self, partition: int) -> int | None:
        """Where the partition is read from; None while its state is not restored."""

    def settled(self) -> Mapping[int, int]:
        """Partition → offset up to which outputs are acknowledged and state is stored: what may be committed."""

    async def before_revoke(self) -> None:
        """Called before the partitions go: the last moment to store state."""


class BatchApp(faust.App):
    """A Faust app whose one source topic comes in batches."""

    def __init__(self, role: str, kafka: KafkaConfig, streams: StreamsConfig, topic: str, **options: Any) -> None:
        self.kafka, self.streams, self.batch_topic = kafka, streams, topic
        self.positions: Positions
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
        try:
            await self._ensure_consumer().commit(wanted)
        except (KafkaError, IllegalStateError) as error:
            # The state says where to go on, not the commit; the next one carries the same offsets or better.
            log.warning("offsets not committed", group=self.app.conf.id, error=type(error).__name__)
            return False
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
