"""What both stages share: a Faust worker that keeps one engine for each partition it owns, and the order of its steps.

For each batch: records go to the partition's engine; what it gives is written and acknowledged; at most once in
`state_interval_s` the engine's snapshot goes to the Faust table; only then may the offset be committed. A crash
between any two steps replays from the last snapshot and writes the same bytes again (rules T9 and T10).

Where a partition goes on is said by its state alone; the committed offset is for people and for lag monitors. So a
zombie that stores state after its successor did harms nothing: every whole state is right, and the newest is taken.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import structlog

from collector.kafka import ConsumerRecord, KafkaConfig, KafkaError, changelog_spec, ensure_topics, wait_for_broker
from streams.config import StreamsConfig
from streams.deadletter import DeadLetters
from streams.health import Health, Reading
from streams.output import Outgoing, Output
from streams.process import run_until_stopped
from streams.state import State, pack, unpack
from streams.transport import Batch, BatchApp, BatchConsumer, Sequencer, check_versions

log = structlog.get_logger(__name__)

HOUSEKEEPING_S: Final = 0.1
SILENT_S: Final = 2.0
"""A partition that has records to read and gave none for so long is read again from where it stands."""
STOP_TIMEOUT_S: Final = 3.0


class StageFailed(RuntimeError):
    """The worker can't go on; the message says why. Started again, it goes on from its last state."""


Refused = tuple[ConsumerRecord, str]
"""A record that could not be used, and why."""


class Shard(Protocol):
    """The engine of one partition, in the worker's terms."""

    def observe(self, records: Sequence[ConsumerRecord]) -> list[Refused]:
        """Takes records in order of offset; those that are no use, with the reason, go to the dead letter."""

    def take(self) -> list[Outgoing]:
        """What is to be written now."""

    def snapshot(self) -> bytes:
        """All that the engine is."""

    def restore(self, raw: bytes) -> None:
        """The inverse of `snapshot`."""

    def watermark_us(self) -> int | None:
        """Event time up to which everything is told; None before any."""

    def counters(self) -> Mapping[str, int]:
        """The engine's own counters, since the beginning of the log."""


class Stage(NamedTuple):
    """What makes a stage: its name, its topics with the source's partitions, and its engine."""

    role: str
    source: str
    partitions: int
    target: str
    make_shard: Callable[[int], Shard]
    make_tick: Callable[[int], Outgoing] | None = None
    """What the owner of an idle partition appends to the source (T6)."""


@dataclass
class Owned:
    """One partition that this worker owns."""

    shard: Shard
    sequence: Sequencer
    slot: int
    stored: int
    """State is stored up to this offset."""
    heard_s: float
    """When it last gave a record (monotonic), as `due_s`."""
    due_s: float = 0.0
    """When state may be stored next."""
    half_done: bool = False
    """A batch is applied, but what it gave is not all written: such state must not be stored."""


class StageWorker:
    """One Faust worker of a stage. Make it inside the running event loop, then `run` it."""

    def __init__(self, stage: Stage, kafka: KafkaConfig, streams: StreamsConfig, data_dir: Path) -> None:
        self.stage, self._kafka, self._streams = stage, kafka, streams
        self._owned: dict[int, Owned] = {}
        self._recovering = (0, 0.0)
        """(changelog records that the recovery under way misses, since when)."""
        self._restored = False
        """Whether every partition of ours has its state, which may be none at all where workers outnumber them."""
        self._lock = asyncio.Lock()
        """Held while a batch is handled or state is stored, so that neither sees the other half done."""
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._totals = Counter(records=0, batches=0, states=0, state_bytes=0, rebalances=0, rewinds=0, lost_records=0)
        folder = data_dir / "faust"
        folder.mkdir(parents=True, exist_ok=True)
        self.app = BatchApp(stage.role, kafka, streams, stage.source, datadir=str(folder / stage.role))
        self.app.positions = self
        self._table = self.app.Table(
            "state", key_type=bytes, value_type=bytes, partitions=stage.partitions, recovery_buffer_size=16
        )
        self._source, self._target = Output(kafka, stage.source), Output(kafka, stage.target)
        self._changelog = Output(kafka, self._table.changelog_topic.get_topic_name())
        self._letters = DeadLetters(kafka, stage.role)
        self.app.agent(self.app.source(), name=stage.role)(self._agent)
        self.app.on_rebalance_complete.connect(self._recovered)
        self.app.on_partitions_revoked.connect(self._revoked)

    async def run(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set; then stores state and leaves the group. Raises StageFailed."""
        await ensure_topics(self._kafka, [changelog_spec(self._kafka, self._changelog.topic, self.stage.partitions)])
        running = [
            asyncio.create_task(self.app.start(), name="faust"),
            asyncio.create_task(self._keep_house(), name="housekeeping"),
        ]
        stopping = asyncio.create_task(stop.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {stopping, self._failure, *running}
            while not (stopping.done() or self._failure.done()):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done & set(running):
                    if task.exception() is not None:
                        self._fail(task.exception())
            if self._failure.done():
                self._failure.result()
        finally:
            stopping.cancel()
            running[1].cancel()
            await self._stop()

    async def _stop(self) -> None:
        self._failure.cancel()  # from here on nothing is a failure
        await self.before_revoke()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.app.stop()
        except TimeoutError:
            log.warning("Faust did not stop in time", role=self.stage.role, timeout_s=STOP_TIMEOUT_S)
        outputs = (self._source, self._target, self._changelog, self._letters)
        await asyncio.gather(*(output.close() for output in outputs))

    @property
    def failed(self) -> bool:
        """Whether `run` is about to raise."""
        return self._failure.done()

    def _fail(self, error: BaseException | None) -> None:
        if not self._failure.done():
            reason = str(error) or type(error).__name__
            failure = StageFailed(f"{self.stage.role} can't go on: {reason}")
            failure.__cause__ = error
            self._failure.set_exception(failure)

    async def _agent(self, stream: Any) -> None:
        async for batch in stream:
            try:
                async with self._lock:
                    await self._handle(batch)
            except BaseException as error:
                # Faust would start the agent again, with half a batch applied.
                self._fail(error)
                raise

    async def _handle(self, batch: Batch) -> None:
        owned = self._owned.get(batch.partition)
        if owned is None:
            return  # fetched before the partition was restored, or after it was lost; it is read again
        fresh = owned.sequence.accept(batch.records)
        if fresh is None:
            await self._mend_hole(batch.partition, owned)
            return
        owned.half_done = True
        await self._letters.put(owned.shard.observe(fresh))
        await self._target.write(owned.shard.take())
        owned.half_done = False
        self._totals["records"] += len(fresh)
        self._totals["batches"] += 1
        owned.heard_s = time.monotonic()

    async def _mend_hole(self, partition: int, owned: Owned) -> None:
        """Reads again from where the partition stands. What the broker has deleted is lost: counted and told."""
        now_s = time.monotonic()
        if now_s - owned.heard_s < 1 and owned.sequence.holes > 1:
            return  # asked a moment ago; what was queued behind the hole still comes
        try:
            earliest, _ = (await self._consumer.bounds([partition]))[partition]
        except (KafkaError, TimeoutError):
            return  # the broker is away; asked again when records come, or after a silence
        if earliest > owned.sequence.next:
            lost = earliest - owned.sequence.next
            self._totals["lost_records"] += lost
            log.error(
                "records were deleted before they were read", topic=self.stage.source, partition=partition, lost=lost
            )
            owned.sequence.next = earliest
        await self._rewind(partition, owned)

    async def _rewind(self, partition: int, owned: Owned) -> None:
        self._totals["rewinds"] += 1
        owned.heard_s = time.monotonic()
        await self._consumer.rewind(partition, owned.sequence.next)

    @property
    def _consumer(self) -> BatchConsumer:
        return self.app.consumer  # type: ignore[return-value]  # made by our transport

    def next_offset(self, partition: int) -> int | None:
        """See `transport.Positions`."""
        owned = self._owned.get(partition)
        return None if owned is None else owned.sequence.next

    def settled(self) -> Mapping[int, int]:
        """See `transport.Positions`."""
        return {partition: owned.stored + 1 for partition, owned in self._owned.items()}

    async def before_revoke(self) -> None:
        """Stores what can be stored within two seconds; what can't be is replayed by the next owner."""
        try:
            async with asyncio.timeout(2), self._lock:
                await self._store(self._owned)
        except TimeoutError:
            log.warning("state not stored before giving partitions up", role=self.stage.role)

    async def _revoked(self, *_: Any, **__: Any) -> None:
        self._owned, self._restored = {}, False
        self._totals["rebalances"] += 1

    async def _recovered(self, *_: Any, **__: Any) -> None:
        """Faust has read the table: every partition of ours goes on from its state."""
        try:
            async with self._lock:
                bounds = await self._consumer.bounds(self._consumer.batch_partitions())
                self._owned = {partition: self._restore(partition, *bounds[partition]) for partition in sorted(bounds)}
        except Exception as error:
            self._fail(error)
            raise
        self._restored = True
        log.info("partitions restored", role=self.stage.role, partitions=sorted(self._owned))

    def _restore(self, partition: int, earliest: int, end: int) -> Owned:
        state, slot = unpack(partition, self._table.data)
        if state is not None and state.applied >= end:
            log.error("state is ahead of its topic, which was made anew: starting anew too", partition=partition)
            state = None
        shard = self.stage.make_shard(partition)
        if state is not None:
            try:
                shard.restore(state.snapshot)
            except ValueError as error:
                log.warning("state can't be used, reading the topic again", partition=partition, reason=str(error))
                shard, state = self.stage.make_shard(partition), None
        start = earliest if state is None else state.applied + 1
        return Owned(shard, Sequencer(start), slot, start - 1, time.monotonic())

    async def _store(self, which: Mapping[int, Owned]) -> None:
        """Stores the state of these partitions where it changed. Under the lock, so between two batches."""
        chunks: list[Outgoing] = []
        stored: list[tuple[Owned, int]] = []
        for partition, owned in which.items():
            applied = owned.sequence.next - 1
            if applied <= owned.stored or owned.half_done:
                continue
            packed = pack(partition, owned.slot, State(applied, owned.shard.snapshot()), self._streams.state_bytes_max)
            chunks += [Outgoing(key, value, partition) for key, value in packed]
            stored.append((owned, applied))
        await self._changelog.write(chunks)
        written = sum(len(chunk.value) for chunk in chunks)
        pause_s = max(self._streams.state_interval_s, written / self._streams.state_bytes_per_s)
        for chunk in chunks:
            self._table.data[chunk.key] = chunk.value
        for owned, applied in stored:
            owned.stored, owned.slot, owned.due_s = applied, 1 - owned.slot, time.monotonic() + pause_s
        self._totals.update(states=len(stored), state_bytes=written)

    async def _keep_house(self) -> None:
        """Stores due state, appends ticks, reads stuck partitions again, and notices when Faust has crashed."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            if self.app.crashed:
                raise StageFailed(f"Faust stopped: {self.app.crash_reason!r}") from self.app.crash_reason
            now_s = time.monotonic()
            await self._watch_recovery(now_s)
            async with self._lock:
                await self._store({p: owned for p, owned in self._owned.items() if owned.due_s <= now_s})
            for partition, owned in list(self._owned.items()):
                await self._watch(partition, owned, time.monotonic())

    async def _watch_recovery(self, now_s: float) -> None:
        missing = self._consumer.recovery_misses() if self.app.in_recovery else 0
        if missing == 0 or missing != self._recovering[0]:
            self._recovering = (missing, now_s)
        elif now_s - self._recovering[1] > SILENT_S:
            self._recovering = (missing, now_s)
            self._totals["rewinds"] += await self._consumer.mend_recovery()
            log.warning("recovery made no progress, reading again", role=self.stage.role, missing=missing)

    async def _watch(self, partition: int, owned: Owned, now_s: float) -> None:
        end = self._consumer.end_offset(partition)
        silent_s = now_s - owned.heard_s
        if end is None or self._lock.locked():
            return
        if end > owned.sequence.next:
            if silent_s >= SILENT_S:
                await self._rewind(partition, owned)
        elif self.stage.make_tick is not None and silent_s >= self._streams.tick_after_s:
            owned.heard_s = now_s
            await self._source.write([self.stage.make_tick(partition)])

    def reading(self) -> Reading:
        """The worker's health."""
        ends = {partition: self._consumer.end_offset(partition) for partition in self._owned}
        ready = self._restored and None not in ends.values()
        counters: Counter[str] = Counter()
        lag, watermarks = 0, []
        for partition, owned in self._owned.items():
            counters.update(owned.shard.counters())
            lag += max((ends[partition] or 0) - owned.sequence.next, 0)
            watermarks.append(owned.shard.watermark_us())
            counters["repeats"] += owned.sequence.repeats
            counters["holes"] += owned.sequence.holes
        late = counters.pop("late", 0)
        told = [watermark for watermark in watermarks if watermark is not None]
        return Reading(
            ready=ready,
            why="" if ready else "waiting for partitions and their state",
            lag=lag,
            watermark_us=min(told) if told and len(told) == len(watermarks) else None,
            late=late,
            drops=self._letters.count + self._target.dropped + self._totals["lost_records"],
            totals={**self._totals, "written": self._target.written, "dead_letters": self._letters.count},
            levels={
                "partitions": float(len(self._owned)),
                **{f"engine_{name.replace('.', '_')}": float(v) for name, v in counters.items()},
            },
        )


def run_stage(
    make: Callable[[Mapping[str, int]], Stage],
    kafka: KafkaConfig,
    streams: StreamsConfig,
    *,
    data_dir: Path,
    config_digest: str,
    on_serving: Callable[[str], None] | None,
) -> None:
    """Runs one worker of the stage that `make` gives for the partition counts by topic, until SIGTERM or SIGINT.

    `on_serving` is given the address of its health pages. Raises BrokerAway, TopicMismatch, UnknownVersion, StageFailed
    or OSError, each with one sentence.
    """

    async def main(stop: asyncio.Event) -> None:
        check_versions()
        await wait_for_broker(kafka, streams.broker_timeout_s)
        stage = make(await ensure_topics(kafka))
        worker = StageWorker(stage, kafka, streams, data_dir)
        async with Health(stage.role, kafka, streams, worker.reading, config_digest=config_digest) as health:
            if on_serving is not None:
                on_serving(health.url)
            await worker.run(stop)

    run_until_stopped(main)
