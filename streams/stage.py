"""What both stages share: a Faust worker that keeps one engine for each partition it owns.

For each batch: records go to the partition's engine; what it gives is written and acknowledged; at most once in
`state_interval_s` the engine's snapshot goes to the Faust table; only then may the offset be committed. The order of
these steps, and why no crash between two of them matters, is `streams/shard.py`; how state lies in the table, and why
no zombie can spoil it, `streams/state.py`.

Where a partition goes on is said by its state alone; the committed offset is for people and for lag monitors.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from collector.kafka import KafkaConfig, KafkaError, changelog_spec, ensure_topics, wait_for_broker
from collector.uuid7 import uuid7
from streams.batch import Batch
from streams.config import StreamsConfig
from streams.deadletter import DeadLetters
from streams.health import Health, Reading
from streams.metrics import Histogram, Tally, troubles
from streams.output import Outgoing, Output
from streams.process import run_until_stopped
from streams.shard import Bounds, PartitionRun, Refused, Shard
from streams.state import StateTooLarge
from streams.surface import SourceConsumer, make_app

__all__ = ["Refused", "Shard", "Stage", "StageFailed", "StageWorker", "run_stage"]

log = structlog.get_logger(__name__)

HOUSEKEEPING_S: Final = 0.1
SILENT_S: Final = 2.0
"""A partition that has records to read and gave none for so long is read again from where it stands."""
STOP_TIMEOUT_S: Final = 3.0
REVOKE_TIMEOUT_S: Final = 2.0
ROUND_S: Final = 60.0
"""Every partition's state is stored at least so often, though it be more than `state_bytes_per_s`."""


class StageFailed(RuntimeError):
    """The worker can't go on; the message says why. Started again, it goes on from its last state."""


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

    run: PartitionRun
    heard_s: float
    """When it last gave a record (monotonic), as `due_s`."""
    due_s: float = 0.0
    """When state may be stored next."""
    state_bytes: int = 0
    """Packed size of the last state stored."""


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
        """Held while a batch is handled or a snapshot taken, so that neither sees the other half done."""
        self._storing = asyncio.Lock()
        """Held while state is packed and written, which stops no batch."""
        self._paid_s = 0.0
        """When the changelog may be written next (monotonic): what was written is paid for by waiting."""
        self._sizes, self._write_seconds = Histogram.of_records(), Histogram.of_seconds()
        self._tally = Tally()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._totals = Counter(records=0, batches=0, states=0, state_bytes=0, rebalances=0, rewinds=0, lost_records=0)
        folder = data_dir / "faust"
        folder.mkdir(parents=True, exist_ok=True)
        self.app = make_app(stage.role, kafka, streams, stage.source, datadir=str(folder / stage.role))
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
            asyncio.create_task(self._keep_state(), name="state"),
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
            for task in running[1:]:
                task.cancel()
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
    def records(self) -> int:
        """How many were handled since the start."""
        return self._totals["records"]

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
        taken = await owned.run.handle(batch.records, self)
        if taken is None:
            await self._mend_hole(batch.partition, owned)
            return
        self._totals["records"] += taken
        self._totals["batches"] += 1
        self._sizes.add(taken)
        owned.heard_s = time.monotonic()

    async def refuse(self, refused: list[Refused]) -> None:
        """See `shard.Ports`."""
        await self._letters.put(refused)

    async def emit(self, outgoing: list[Outgoing]) -> None:
        """See `shard.Ports`."""
        await self._target.write(outgoing)

    async def keep(self, chunks: list[Outgoing]) -> None:
        """See `shard.Ports`."""
        await self._changelog.write(chunks)

    async def _mend_hole(self, partition: int, owned: Owned) -> None:
        """Reads again from where the partition stands. What the broker has deleted is lost: counted and told."""
        now_s = time.monotonic()
        if now_s - owned.heard_s < 1 and owned.run.sequence.holes > 1:
            return  # asked a moment ago; what was queued behind the hole still comes
        try:
            earliest, _ = (await self._consumer.bounds([partition]))[partition]
        except (KafkaError, TimeoutError):
            return  # the broker is away; asked again when records come, or after a silence
        if earliest > owned.run.sequence.next:
            lost = earliest - owned.run.sequence.next
            self._totals["lost_records"] += lost
            log.error(
                "records were deleted before they were read", topic=self.stage.source, partition=partition, lost=lost
            )
            owned.run.sequence.next = earliest
        await self._rewind(partition, owned)

    async def _rewind(self, partition: int, owned: Owned) -> None:
        self._totals["rewinds"] += 1
        owned.heard_s = time.monotonic()
        await self._consumer.rewind(partition, owned.run.sequence.next)

    @property
    def _consumer(self) -> SourceConsumer:
        consumer: SourceConsumer = self.app.consumer
        return consumer

    def next_offset(self, partition: int) -> int | None:
        """See `transport.Positions`."""
        owned = self._owned.get(partition)
        return None if owned is None else owned.run.sequence.next

    def settled(self) -> Mapping[int, int]:
        """See `transport.Positions`."""
        return {partition: owned.run.settled for partition, owned in self._owned.items()}

    async def before_revoke(self) -> None:
        """Stores what can be stored in time; what can't be is replayed by the next owner."""
        try:
            async with asyncio.timeout(REVOKE_TIMEOUT_S):
                for owned in list(self._owned.values()):
                    await self._store(owned)
        except (TimeoutError, StateTooLarge) as error:
            log.warning("state not stored before giving partitions up", role=self.stage.role, reason=str(error))

    def _counters(self) -> dict[int, Mapping[str, int]]:
        return {partition: owned.run.shard.counters() for partition, owned in self._owned.items()}

    async def _revoked(self, *_: Any, **__: Any) -> None:
        self._tally.end(self._counters())
        self._owned, self._restored = {}, False
        self._totals["rebalances"] += 1

    async def _recovered(self, *_: Any, **__: Any) -> None:
        """Faust has read the table: every partition of ours goes on from its state."""
        try:
            async with self._lock:
                bounds = await self._consumer.bounds(self._consumer.batch_partitions())
                self._owned = {partition: self._restore(partition, *bounds[partition]) for partition in sorted(bounds)}
                self._tally.begin(self._counters())
        except Exception as error:
            self._fail(error)
            raise
        self._restored = True
        log.info("partitions restored", role=self.stage.role, partitions=sorted(self._owned))

    def _restore(self, partition: int, earliest: int, end: int) -> Owned:
        table, bounds = self._table.data, Bounds(earliest, end)
        run = PartitionRun.restored(partition, self.stage.make_shard, uuid7(), table, bounds)
        return Owned(run, time.monotonic())

    async def _store(self, owned: Owned) -> None:
        """Stores the state of a partition where it changed. Batches wait only while the snapshot is taken."""
        async with self._storing:
            async with self._lock:
                state = owned.run.snapshot()
            if state is None:
                return
            began_s = time.monotonic()
            chunks = await asyncio.to_thread(owned.run.pack, state, self._streams.state_bytes_max)
            stale = await owned.run.store(state, chunks, self)
            # Recovery reads all that was written since the last one, so what we write need not be in memory too.
            for key in stale:
                self._table.data.pop(key, None)
            written = sum(len(chunk.value or b"") for chunk in chunks)
            owned.state_bytes = written
            now_s = time.monotonic()
            self._write_seconds.add(now_s - began_s)
            pause_s = min(written / self._streams.state_bytes_per_s, ROUND_S / max(len(self._owned), 1))
            self._paid_s = max(self._paid_s, now_s) + pause_s
            owned.due_s = now_s + self._streams.state_interval_s
            self._totals.update(states=1, state_bytes=written)

    async def _keep_state(self) -> None:
        """Stores due state, that of the partition longest due first."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for owned in sorted(self._owned.values(), key=lambda owned: owned.due_s):
                if max(owned.due_s, self._paid_s - HOUSEKEEPING_S) <= time.monotonic():
                    await self._store(owned)

    async def _keep_house(self) -> None:
        """Appends ticks, reads stuck partitions again, and notices when Faust has crashed."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            if self.app.crashed:
                raise StageFailed(f"Faust stopped: {self.app.crash_reason!r}") from self.app.crash_reason
            await self._watch_recovery(time.monotonic())
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
        if end > owned.run.sequence.next:
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
            counters.update(owned.run.shard.counters())
            lag += max((ends[partition] or 0) - owned.run.sequence.next, 0)
            watermarks.append(owned.run.shard.watermark_us())
            counters["repeats"] += owned.run.sequence.repeats
            counters["holes"] += owned.run.sequence.holes
        counters.pop("late", 0)
        counted = self._tally.totals(self._counters())
        told = [watermark for watermark in watermarks if watermark is not None]
        return Reading(
            ready=ready,
            why="" if ready else "waiting for partitions and their state",
            lag=lag,
            watermark_us=min(told) if told and len(told) == len(watermarks) else None,
            late=counted["late"],
            drops=self._letters.count + self._target.dropped + self._totals["lost_records"],
            totals={
                **self._totals,
                "written": self._target.written,
                "dead_letters": self._letters.count,
                "duplicates": counted["duplicate"],
                "quarantined": counted["quarantined"],
                **troubles(counted),
            },
            histograms={
                "batch_records": self._sizes,
                "commit_seconds": self.app.commit_seconds,
                "state_write_seconds": self._write_seconds,
            },
            levels={
                "partitions": float(len(self._owned)),
                "state_size_bytes": float(sum(owned.state_bytes for owned in self._owned.values())),
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

    `on_serving` is given the address of its health pages. Raises BrokerAway, TopicMismatch, StageFailed
    or OSError, each with one sentence.
    """

    async def main(stop: asyncio.Event) -> None:
        await wait_for_broker(kafka, streams.broker_timeout_s)
        stage = make(await ensure_topics(kafka))
        worker = StageWorker(stage, kafka, streams, data_dir)
        async with Health(stage.role, kafka, streams, worker.reading, config_digest=config_digest) as health:
            if on_serving is not None:
                on_serving(health.url)
            await worker.run(stop)

    run_until_stopped(main)
