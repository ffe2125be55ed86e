"""The public path: what Faust does for a stage, done with aiokafka's documented consumer alone.

Taken where the installed Faust is not one that the batch transport was tested with. The same group of steps: join a
group, read the changelog of each partition that is ours, let the stage restore it, read from where its state says.
Exact by the same means: the stage trims what repeats, refuses holes, and its state says what is applied. Slower only in
that a rebalance stops all partitions and reads all their state again.

Its group has a name of its own, as members of one group must agree on how to share. Workers of both kinds side by side
each do all the work, and write the same bytes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Final

import structlog

from collector.kafka import (
    AIOKafkaConsumer,
    ConsumerRebalanceListener,
    KafkaConfig,
    KafkaError,
    OffsetAndMetadata,
    TopicPartition,
    make_consumer,
)
from streams.batch import Batch, Positions
from streams.config import StreamsConfig
from streams.metrics import Histogram

log = structlog.get_logger(__name__)

COMMIT_INTERVAL_S: Final = 1.0
RETRY_DELAY_S: Final = 0.5
POLL_MS: Final = 200
POLL_INTERVAL_MS_MAX: Final = 1_000_000

Handler = Callable[..., Awaitable[None]]
Agent = Callable[[AsyncIterator[Batch]], Awaitable[None]]


class _Signal:
    def __init__(self) -> None:
        self._handlers: list[Handler] = []

    def connect(self, handler: Handler) -> None:
        self._handlers.append(handler)

    async def send(self) -> None:
        for handler in self._handlers:
            await handler()


class _ChangelogTopic:
    def __init__(self, name: str) -> None:
        self._name = name

    def get_topic_name(self) -> str:
        return self._name


class PlainTable:
    """The changelog of the partitions that are ours, as key → value."""

    def __init__(self, changelog: str) -> None:
        self.changelog_topic = _ChangelogTopic(changelog)
        self.data: dict[bytes, bytes] = {}


class PlainConsumer:
    """Reads the source, as `surface.SourceConsumer` says."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self.client: AIOKafkaConsumer | None = None

    def batch_partitions(self) -> set[int]:
        """See `surface.SourceConsumer`; so are the others."""
        return set() if self.client is None else {tp.partition for tp in self.client.assignment()}

    async def rewind(self, partition: int, offset: int) -> None:
        if self.client is not None and partition in self.batch_partitions():
            self.client.seek(TopicPartition(self._topic, partition), offset)

    async def bounds(self, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        tps = [TopicPartition(self._topic, partition) for partition in partitions]
        if not tps or self.client is None:
            return {}
        earliest, ends = await self.client.beginning_offsets(tps), await self.client.end_offsets(tps)
        return {tp.partition: (earliest[tp], ends[tp]) for tp in tps}

    def end_offset(self, partition: int) -> int | None:
        if self.client is None or partition not in self.batch_partitions():
            return None
        end: int | None = self.client.highwater(TopicPartition(self._topic, partition))
        return end

    def recovery_misses(self) -> int:
        return 0

    async def mend_recovery(self) -> int:
        return 0


class PlainApp:
    """Feeds one stage. Has those names of a Faust app that `StageWorker` uses."""

    def __init__(self, role: str, kafka: KafkaConfig, streams: StreamsConfig, topic: str) -> None:
        self.id = f"{kafka.topic_prefix}-{role}"
        self.positions: Positions
        self.commit_seconds = Histogram.of_seconds()
        self.on_rebalance_complete, self.on_partitions_revoked = _Signal(), _Signal()
        self.crashed, self.in_recovery = False, False
        self.crash_reason: BaseException | None = None
        self.consumer = PlainConsumer(topic)
        self._kafka, self._streams, self._topic = kafka, streams, topic
        self._table = PlainTable("")
        self._agent: Agent | None = None
        self._ended = asyncio.Event()

    def Table(self, name: str, **_: Any) -> PlainTable:  # noqa: N802  # Faust's name
        """The one table of the stage."""
        self._table = PlainTable(f"{self.id}-{name}-changelog")
        return self._table

    def source(self) -> str:
        """The topic read."""
        return self._topic

    def agent(self, _source: str, **_: Any) -> Callable[[Agent], Agent]:
        """Who takes the batches."""

        def keep(agent: Agent) -> Agent:
            self._agent = agent
            return agent

        return keep

    async def start(self) -> None:
        """Joins the group and feeds the agent until `stop`. Raises what the agent or the consumer raises."""
        if self._agent is None:
            raise RuntimeError("nobody takes the batches")
        session_ms = int(self._streams.session_timeout_s * 1000)
        client = self.consumer.client = make_consumer(
            self._kafka,
            group_id=f"{self.id}-plain",
            client_id=f"inferwatch-{self.id}",
            fetch_max_wait_ms=self._streams.fetch_max_wait_ms,
            max_poll_interval_ms=POLL_INTERVAL_MS_MAX,
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=session_ms // 6,
            rebalance_timeout_ms=30_000,
        )
        client.subscribe([self._topic], listener=_Listener(self._revoked, self._assigned))
        await client.start()
        committing = asyncio.create_task(self._commit_settled(client))
        try:
            await self._agent(self._batches(client))
        finally:
            committing.cancel()
            with suppress(asyncio.CancelledError):
                await committing
            with suppress(KafkaError):
                await client.stop()

    async def stop(self) -> None:
        """Ends `start` soon."""
        self._ended.set()

    async def _batches(self, client: AIOKafkaConsumer) -> AsyncIterator[Batch]:
        while not self._ended.is_set():
            fetched = await client.getmany(timeout_ms=POLL_MS, max_records=self._streams.batch_records_max)
            for tp, records in fetched.items():
                yield Batch(tp.topic, tp.partition, records)

    async def _revoked(self, revoked: set[TopicPartition]) -> None:
        """Store state first, so that the next owner has nothing to replay."""
        if revoked:
            await self.positions.before_revoke()
        await self.on_partitions_revoked.send()

    async def _assigned(self, assigned: set[TopicPartition]) -> None:
        """Read the state of what is ours, let the stage restore it, and read on from where it says."""
        partitions = {tp.partition for tp in assigned}
        while not self._ended.is_set():
            try:
                self._table.data = await self._read_table(partitions)
                break
            except (KafkaError, TimeoutError) as error:
                log.warning("state not read yet, trying on", role=self.id, error=type(error).__name__)
                await asyncio.sleep(RETRY_DELAY_S)
        await self.on_rebalance_complete.send()
        for partition in partitions:
            offset = self.positions.next_offset(partition)
            if offset is not None:
                await self.consumer.rewind(partition, offset)

    async def _read_table(self, partitions: set[int]) -> dict[bytes, bytes]:
        """The changelog of these partitions, from end to end."""
        tps = [TopicPartition(self._table.changelog_topic.get_topic_name(), partition) for partition in partitions]
        if not tps:
            return {}
        data: dict[bytes, bytes] = {}
        reader = make_consumer(self._kafka, group_id=None)
        try:
            await reader.start()
            reader.assign(tps)
            ends = await reader.end_offsets(tps)
            await reader.seek_to_beginning(*tps)
            while any([await reader.position(tp) < ends[tp] for tp in tps]):
                for records in (await reader.getmany(timeout_ms=POLL_MS)).values():
                    for record in records:
                        if record.value is None:
                            data.pop(record.key, None)
                        else:
                            data[record.key] = record.value
        finally:
            await reader.stop()
        return data

    async def _commit_settled(self, client: AIOKafkaConsumer) -> None:
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_S)
            mine = self.consumer.batch_partitions()
            offsets = {
                TopicPartition(self._topic, partition): OffsetAndMetadata(offset, "")
                for partition, offset in self.positions.settled().items()
                if partition in mine
            }
            began_s = time.monotonic()
            try:
                if offsets:
                    await client.commit(offsets)
                    self.commit_seconds.add(time.monotonic() - began_s)
            except KafkaError as error:
                # The state says where to go on, not the commit; the next one carries the same offsets or better.
                log.warning("offsets not committed", group=f"{self.id}-plain", error=type(error).__name__)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no type information
    """Hands aiokafka's calls on."""

    def __init__(
        self,
        revoked: Callable[[set[TopicPartition]], Awaitable[None]],
        assigned: Callable[[set[TopicPartition]], Awaitable[None]],
    ) -> None:
        self._revoked, self._assigned = revoked, assigned

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._assigned(assigned)
