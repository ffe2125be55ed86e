"""A worker process and its consumer group in the simulator: around the very `PartitionRun` that the real worker drives.

A process may be killed at any step, suspended beyond its session and go on as a zombie, lose chunks of what it fetched
or get them twice. What Faust does in a real worker (assignment, recovery of the table, the seek after it) is modelled
here as `streams/stage.py` relies on it.
"""

import random
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from streams.batch import Fetched
from streams.output import Outgoing
from streams.shard import Bounds, PartitionRun, Refused, Shard
from tests.sim.broker import Broker, Changelog, Topic

BYTES_MAX = 1 << 30


@dataclass
class Role:
    """What a stage is, in the simulator."""

    make_shard: Callable[[int], Shard]
    source: Topic
    visible: list[int]
    """How much of each partition of the source is on the broker by now."""
    target: Topic
    changelog: Changelog = field(default_factory=Changelog)


class Process:
    """One worker."""

    def __init__(self, name: str, role: Role, broker: Broker, chance: random.Random) -> None:
        self.name, self._role, self._broker, self._chance = name, role, broker, chance
        self.state: Literal["running", "suspended", "dead"] = "running"
        self.runs: dict[int, PartitionRun] = {}
        self.assigned: set[int] = set()
        self.recovered = True
        self._kept: set[int] = set()
        self._position: dict[int, int] = {}
        self._queue: deque[tuple[int, Sequence[Any]]] = deque()
        self._table: dict[bytes, bytes] = {}
        self._seen: dict[int, int] = {}
        self._handling: Coroutine[Any, Any, None] | None = None
        self._storing: Coroutine[Any, Any, None] | None = None
        self._writers = 0
        self.refused: list[Refused] = []

    async def refuse(self, refused: list[Refused]) -> None:
        """See `shard.Ports`."""
        self.refused += refused

    async def emit(self, outgoing: list[Outgoing]) -> None:
        """See `shard.Ports`."""
        await self._broker.write(self._role.target, outgoing)

    async def keep(self, chunks: list[Outgoing]) -> None:
        """See `shard.Ports`."""
        await self._broker.keep(self._role.changelog, chunks)

    def fetch(self, count: int, drop: float, repeat: float) -> None:
        """The next `count` records of a partition; they may get lost on the way, or something may come again."""
        if not self.runs or len(self._queue) >= 4:
            return
        partition = self._chance.choice(sorted(self.runs))
        start = self._position[partition]
        if self._chance.random() < repeat:
            start = max(0, start - self._chance.randrange(1, 9))
        end = min(self._role.visible[partition], start + count)
        if start >= end:
            # Nothing more to fetch: after a silence the worker reads again from where it stands.
            self._position[partition] = self.runs[partition].sequence.next
            return
        self._position[partition] = end
        if self._chance.random() >= drop:
            records: Sequence[Any] = self._role.source.logs[partition][start:end]
            # Records come as columns or one by one, as the road from the broker is.
            self._queue.append((partition, Fetched.of(records) if self._chance.random() < 0.5 else records))

    def work(self) -> bool:
        """One step of handling a batch; False where there is nothing to do."""
        if self._handling is None:
            if not self._queue:
                return False
            self._handling = self._handle(*self._queue.popleft())
        self._handling = _step(self._handling)
        return True

    async def _handle(self, partition: int, records: Sequence[Any]) -> None:
        run = self.runs.get(partition)
        if run is not None and await run.handle(records, self) is None:
            self._position[partition] = run.sequence.next

    def store(self) -> bool:
        """One step of storing state; False where there is nothing to do."""
        if self._storing is None:
            if not self.runs:
                return False
            self._storing = self._store(self.runs[self._chance.choice(sorted(self.runs))])
        self._storing = _step(self._storing)
        return True

    async def _store(self, run: PartitionRun) -> None:
        state = run.snapshot()
        if state is None:
            return
        for key in await run.store(state, run.pack(state, BYTES_MAX), self):
            self._table.pop(key, None)

    def revoke(self, *, in_time: bool) -> None:
        """The group takes all partitions. State is stored first, where there is time for that."""
        if in_time and not self._broker.down:
            self._finish(self._storing)
            self._storing = None
            for run in self.runs.values():
                self._finish(self._store(run))
        self._kept |= set(self.runs)
        self.runs, self.recovered = {}, False

    def assign(self, partitions: set[int]) -> None:
        """The group gives partitions; nothing is done with them before `recover`."""
        for partition in set(self._seen) - partitions:
            del self._seen[partition]
        self._table = {key: value for key, value in self._table.items() if int(key.split(b"/")[0]) in partitions}
        self.assigned, self.recovered = partitions, not partitions

    def recover(self, writer: Callable[[str], str]) -> bool:
        """Reads the table as Faust does, and goes on from it; False while a batch is under way."""
        if self._handling is not None:
            return False
        for partition in sorted(self.assigned):
            for offset, key, value in self._role.changelog.read(partition, self._seen.get(partition, -1)):
                self._seen[partition] = offset
                if value is None:
                    self._table.pop(key, None)
                else:
                    self._table[key] = value
        for partition in sorted(self.assigned):
            self._writers += 1
            run = PartitionRun.restored(
                partition,
                self._role.make_shard,
                writer(f"{self.name}-{self._writers}"),
                self._table,
                Bounds(0, self._role.visible[partition]),
            )
            self.runs[partition] = run
            self._position[partition] = run.sequence.next
        self.recovered = True
        return True

    def settled(self) -> Mapping[int, int]:
        """What it would commit now."""
        return {partition: run.settled for partition, run in self.runs.items()}

    def finish(self) -> None:
        """All that is under way comes to its end: a zombie's last writes too."""
        self._finish(self._handling)
        self._finish(self._storing)
        self._handling = self._storing = None

    def behind(self) -> bool:
        """Whether it has not yet applied and stored everything."""
        return any(run.settled < self._role.visible[partition] for partition, run in self.runs.items())

    def die(self) -> None:
        """SIGKILL."""
        self.state = "dead"
        for coroutine in (self._handling, self._storing):
            if coroutine is not None:
                coroutine.close()
        self._handling = self._storing = None
        self.runs = {}

    @staticmethod
    def _finish(coroutine: Coroutine[Any, Any, None] | None) -> None:
        while coroutine is not None:
            coroutine = _step(coroutine)


def _step(coroutine: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
    try:
        coroutine.send(None)
    except StopIteration:
        return None
    return coroutine


class Group:
    """The coordinator of one stage's workers."""

    def __init__(self, partitions: int, chance: random.Random) -> None:
        self._partitions, self._chance = partitions, chance
        self.members: list[Process] = []

    def rebalance(self, in_time: float) -> None:
        """All who answer give up what they have; then everything is dealt out anew. Who does not answer is out."""
        self.members = [member for member in self.members if member.state == "running"]
        for member in self.members:
            member.revoke(in_time=self._chance.random() < in_time)
        dealt = list(range(self._partitions))
        self._chance.shuffle(dealt)
        for number, member in enumerate(self.members):
            member.assign(set(dealt[number :: len(self.members)]))
