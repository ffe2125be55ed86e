"""Feeds Kafka from a journal: reads it in order, sends one batch for each partition at a time, marks what is stored.

Guarantee: within a lane records reach the broker in order and at least once; a record sent twice carries the same `seq`
and bytes, so that readers drop it. Never more than one batch of a partition is under way: were a later one stored
although an earlier one failed, readers would take the earlier one for a duplicate. Memory: one round, at most
`batch_bytes` for each partition and 1 MiB of journal.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from itertools import pairwise
from typing import Any, Final, NamedTuple

import structlog

from collector import event as events
from collector.chain import record_hash
from collector.config import PublisherConfig
from collector.event import Integrity
from collector.journal import RECORD, RECORD_HEAD, Entry, JournalFull, Position, Reader
from collector.kafka import AIOKafkaProducer, KafkaError
from collector.lanes import Book
from collector.uuid7 import uuid7

log = structlog.get_logger(__name__)

ROUND_BYTES: Final = 1024 * 1024
RECORDS_MAX: Final = 65_536
_REFUSED_FOR_GOOD: Final = frozenset({10, 18, 32, 87})
"""Kafka's codes for a record that will never be taken: too large, list too large, bad timestamp, invalid."""
_BACKOFF_MAX_S: Final = 2.0

Record = tuple[int, bytes, bytes]
"""seq, key, encoded record."""


class Round(NamedTuple):
    """What is sent at once: for each partition its records in order, and the journal's place behind them."""

    records: dict[int, list[Record]]
    end: Position


class Tail:
    """A journal as the sender reads it: what is not acknowledged, in rounds. For the sender's thread alone."""

    def __init__(
        self,
        book: Book,
        acked: Mapping[int, int] | None = None,
        *,
        before_release: Callable[[], object] = lambda: None,
    ) -> None:
        """`before_release` is called when the journal is about to let go of a segment; JournalFull does not stop it."""
        self._book, self._before_release = book, before_release
        self._reader = Reader(book.journal.folder, lambda: book.journal.end)
        self.acked = dict(acked or {})
        """The first seq of each lane that Kafka does not have."""
        self.position = self._reader.position
        self._marked = (self.position, self.position)
        """Where the last mark begins and ends."""
        self.damaged_bytes = 0

    @property
    def at_end(self) -> bool:
        """Whether Kafka has everything that the journal holds."""
        return self.position >= self.end

    @property
    def end(self) -> Position:
        """The journal's end."""
        return self._book.journal.end

    def next_round(self, batch_bytes: int, records_max: int) -> Round:
        """The next unacknowledged records; empty where the journal's end is reached."""
        self._reader.position = self.position
        records: dict[int, list[Record]] = {}
        sizes: dict[int, int] = {}
        total, end = 0, self.position
        for entry in self._reader.entries():
            if entry.body[0] != RECORD:
                end = entry.after
                continue
            _, key_length, partition, seq = RECORD_HEAD.unpack_from(entry.body)
            size = len(entry.body) + 64
            if seq >= self.acked.get(partition, 0):
                lane = records.setdefault(partition, [])
                if lane and (sizes[partition] + size > batch_bytes or len(lane) >= records_max or total > ROUND_BYTES):
                    break
                lane.append(_split(entry, key_length, seq))
                sizes[partition] = sizes.get(partition, 0) + size
                total += size
            end = entry.after
        else:
            end = self._reader.position
        self.damaged_bytes += self._reader.damaged_bytes
        self._reader.damaged_bytes = 0
        return Round(records, end)

    def acknowledge(self, stored: dict[int, list[Record]]) -> None:
        """These records are in Kafka."""
        for partition, lane in stored.items():
            missing = lane[0][0] - self.acked.get(partition, 0)
            missing += sum(after[0] - before[0] - 1 for before, after in pairwise(lane))
            if missing > 0:
                self._book.counters.dropped += missing
            self.acked[partition] = lane[-1][0] + 1
        self._marked = self._book.mark({partition: self.acked[partition] for partition in stored})

    def advance(self, end: Position) -> None:
        """Everything before `end` is in Kafka."""
        start, after = self._marked
        end = after if end == start else end  # what is behind it is our own mark
        moved = end.segment > self.position.segment
        self.position = end
        if moved:
            with contextlib.suppress(JournalFull):
                self._before_release()
            self._book.release(end)


def _split(entry: Entry, key_length: int, seq: int) -> Record:
    start = RECORD_HEAD.size + key_length
    return seq, entry.body[RECORD_HEAD.size : start], entry.body[start:]


def stand_in(raw: bytes) -> bytes:
    """The integrity record that takes the place of a record which Kafka will never take: same lane, seq and time."""
    record = events.decode(raw)
    return events.encode(
        Integrity(
            schema_version=events.SCHEMA_VERSION,
            event_id=uuid7(),
            timestamp=record.timestamp,
            collector_id=record.collector_id,
            boot=record.boot,
            seq=record.seq,
            chain=record.chain,
            problem="refused by Kafka",
            subject_id=record.event_id,
            subject_hash=record_hash(raw).hex(),
            size_bytes=len(raw),
        )
    )


class Sender:
    """Sends a tail's rounds with a producer of its own, made anew after any refusal. For one event loop."""

    def __init__(self, connect: Callable[[], Awaitable[AIOKafkaProducer]], topic: str, config: PublisherConfig) -> None:
        self._connect, self._topic, self._config = connect, topic, config
        self._producer: AIOKafkaProducer | None = None
        self._records_max = RECORDS_MAX
        self._failures = 0
        self.away = False
        """Kafka does not take events now."""
        self.refused = 0
        """Batches refused so far."""
        self.replaced = 0
        """Records replaced because Kafka would never take them."""

    async def producer(self) -> AIOKafkaProducer:
        """The producer in use, started. Raises KafkaError where no broker answers."""
        if self._producer is None:
            self._producer = await self._connect()
        return self._producer

    async def drain(self, tail: Tail) -> None:
        """Send until what the journal held at the beginning is acknowledged. Waits for as long as Kafka is away."""
        goal = tail.end
        while True:
            batch = tail.next_round(self._config.batch_bytes, self._records_max)
            if batch.records and not await self._send(tail, batch.records):
                continue
            tail.advance(batch.end)
            if not batch.records or tail.position >= goal:
                return

    async def _send(self, tail: Tail, records: dict[int, list[Record]]) -> bool:
        """One round; False where a part of it must be read and sent again."""
        try:
            futures = await self._submit(records)
            done = await self._settle(futures)
        except (KafkaError, OSError) as error:
            await self._retreat(f"{type(error).__name__}")
            return False
        stored = {partition: records[partition] for partition, error in done.items() if error is None}
        if stored:
            tail.acknowledge(stored)
        failed = {partition: error for partition, error in done.items() if error is not None}
        if not failed:
            self._recovered()
            return True
        self.refused += len(failed)
        await self._retreat(", ".join(sorted({type(error).__name__ for error in failed.values()})))
        for partition, refusal in failed.items():
            if getattr(refusal, "errno", 0) in _REFUSED_FOR_GOOD and len(records[partition]) == 1:
                await self._send_replacement(tail, partition, records[partition][0])
        self._records_max = max(1, max(len(records[partition]) for partition in failed) // 2)
        return False

    async def _send_replacement(self, tail: Tail, partition: int, record: Record) -> None:
        """Put our own word in the place of a record that Kafka will never take."""
        log.error(
            "Kafka refused a record for good; an integrity record takes its place",
            partition=partition,
            bytes=len(record[2]),
        )
        replacement = {partition: [(record[0], record[1], stand_in(record[2]))]}
        with contextlib.suppress(KafkaError, OSError):
            if (await self._settle(await self._submit(replacement)))[partition] is None:
                tail.acknowledge(replacement)
                self.replaced += 1

    async def _submit(self, records: dict[int, list[Record]]) -> dict[int, asyncio.Future[Any]]:
        producer = await self.producer()
        futures = {}
        for partition, lane in records.items():
            batch = producer.create_batch()
            for _, key, value in lane:
                batch.append(key=key or None, value=value, timestamp=None)
            batch.close()
            future = await producer.send_batch(batch, self._topic, partition=partition)
            future.add_done_callback(_looked_at)
            futures[partition] = future
        return futures

    async def _settle(self, futures: dict[int, asyncio.Future[Any]]) -> dict[int, BaseException | None]:
        """Wait for every batch, however long; say once when Kafka is silent."""
        waiting = set(futures.values())
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=self._config.broker_silence_ms / 1000)
            if waiting:
                self._say_away("no acknowledgement")
        return {partition: future.exception() for partition, future in futures.items()}

    async def _retreat(self, reason: str) -> None:
        """Drop the producer, which a refusal has spoiled, and wait a little, longer each time."""
        self._say_away(reason)
        await self.close()
        await asyncio.sleep(min(_BACKOFF_MAX_S, 0.05 * 2**self._failures))
        self._failures = min(self._failures + 1, 10)

    def _say_away(self, reason: str) -> None:
        if not self.away:
            self.away = True
            log.warning("Kafka does not take events; they wait in the journal", topic=self._topic, reason=reason)

    def _recovered(self) -> None:
        self._failures = 0
        self._records_max = min(RECORDS_MAX, self._records_max * 2)
        if self.away:
            self.away = False
            log.info("Kafka takes events again", topic=self._topic)

    async def close(self) -> None:
        """Drop the producer. What it had under way may or may not be stored."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await drop_producer(producer)


def _looked_at(future: asyncio.Future[Any]) -> None:
    """A batch that nobody waits for any more fails without a complaint: the journal still has it."""
    if not future.cancelled():
        future.exception()


async def drop_producer(producer: AIOKafkaProducer) -> None:
    """Stop a producer without waiting for batches that may never be taken, within about 2 s.

    aiokafka's own `stop` waits for them for ever, and a producer left alone would send them later.
    """
    producer._message_accumulator.fail_all(KafkaError("the producer was dropped"))  # see above
    try:
        await asyncio.wait_for(producer.stop(), 2)
    except (KafkaError, OSError, TimeoutError):
        # A request that the broker does not answer: close its connection under it.
        await producer.client.close()
