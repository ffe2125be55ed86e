"""The order of steps of one partition, without Kafka, Faust or a clock: what makes it effectively once.

    accept → observe → what it gave is written and acknowledged → state is stored and acknowledged → may be committed

A crash between any two steps replays from the last state and writes the same bytes again (rules T9 and T10). The
worker (`streams/stage.py`) and the simulator (tests/sim) drive this very code; input and output are its `Ports`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import structlog

from collector.kafka import ConsumerRecord
from streams.batch import Sequencer
from streams.output import Outgoing
from streams.state import State, pack, unpack

log = structlog.get_logger(__name__)

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


class Ports(Protocol):
    """Where a partition writes. Each returns once everything is acknowledged, however long that takes."""

    async def refuse(self, refused: list[Refused]) -> None:
        """To the dead letter."""

    async def emit(self, outgoing: list[Outgoing]) -> None:
        """To the stage's target topic."""

    async def keep(self, chunks: list[Outgoing]) -> None:
        """To the table's changelog."""


class Bounds(NamedTuple):
    """What the topic holds of a partition."""

    earliest: int
    end: int
    """Offset of the next record to come."""


class PartitionRun:
    """One partition while one worker owns it. `handle` and `store` are not for several tasks at once each."""

    def __init__(self, partition: int, shard: Shard, writer: str, start: int, found: Sequence[bytes] = ()) -> None:
        self.partition, self.shard, self.writer = partition, shard, writer
        self.sequence = Sequencer(start)
        self.stored = start - 1
        """State is stored, whole and acknowledged, up to this offset."""
        self._slot = 0
        self._found = list(found)
        """Keys of earlier writers; they go once our own state is whole."""
        self._half_done = False
        """A batch is applied, but what it gave is not all written: such state must not be stored."""

    @classmethod
    def restored(
        cls, partition: int, make: Callable[[int], Shard], writer: str, table: Mapping[bytes, bytes], bounds: Bounds
    ) -> Self:
        """Goes on from the newest whole state in the table; from the earliest record where none is of use."""
        state, found = unpack(partition, table)
        if state is not None and state.applied >= bounds.end:
            log.error("state is ahead of its topic, which was made anew: starting anew too", partition=partition)
            state = None
        shard = make(partition)
        if state is not None:
            try:
                shard.restore(state.snapshot)
            except ValueError as error:
                log.warning("state can't be used, reading the topic again", partition=partition, reason=str(error))
                shard, state = make(partition), None
        return cls(partition, shard, writer, bounds.earliest if state is None else state.applied + 1, found)

    @property
    def settled(self) -> int:
        """What may be committed: everything before it is told, and in a state that is stored."""
        return self.stored + 1

    async def handle(self, records: Sequence[ConsumerRecord], ports: Ports) -> int | None:
        """Applies those that are new, and returns how many once all that follows from them is acknowledged.

        None at a hole: nothing was applied, and the partition must be read again from `sequence.next`.
        """
        fresh = self.sequence.accept(records)
        if fresh is None:
            return None
        self._half_done = True
        await ports.refuse(self.shard.observe(fresh))
        await ports.emit(self.shard.take())
        self._half_done = False
        return len(fresh)

    def snapshot(self) -> State | None:
        """What is to be stored; None where nothing is new, or a batch is half done."""
        applied = self.sequence.next - 1
        if applied <= self.stored or self._half_done:
            return None
        return State(applied, self.shard.snapshot())

    def pack(self, state: State, bytes_max: int) -> list[Outgoing]:
        """A snapshot as chunks for the slot whose turn it is; for a thread. Raises StateTooLarge."""
        packed = pack(self.partition, self.writer, self._slot, state, bytes_max)
        return [Outgoing(key, value, self.partition) for key, value in packed]

    async def store(self, state: State, chunks: list[Outgoing], ports: Ports) -> list[bytes]:
        """Stores what `snapshot` and `pack` gave; then deletes what earlier writers left, and returns its keys."""
        await ports.keep(chunks)
        self.stored, self._slot = state.applied, 1 - self._slot
        stale, self._found = self._found, []
        if stale:
            await ports.keep([Outgoing(key, None, self.partition) for key in stale])
        return stale
