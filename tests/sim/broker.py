"""A model of Kafka for the simulator: topics, a compacted changelog, a consumer group. No clock, no network, one seed.

Writing keeps what a real producer keeps: at least once, in order within a partition. Everything else may happen: other
partitions' records in between, an acknowledgement that is lost so that all is written again, an outage in the middle.
"""

import random
import types
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from streams.output import Outgoing
from tests.sim.logs import Record


@types.coroutine
def pause() -> Generator[None, None, None]:
    """A moment at which anything else may happen, also death."""
    yield


class Topic:
    """Append-only partitions."""

    def __init__(self, partitions: int) -> None:
        self.logs: list[list[Record]] = [[] for _ in range(partitions)]

    def append(self, partition: int, key: bytes, value: bytes, at_ms: int = 0) -> None:
        """One record, with the broker's append time."""
        log = self.logs[partition]
        log.append(Record(partition, len(log), max(at_ms, log[-1].timestamp if log else 0), value, key))


@dataclass
class Changelog:
    """A compacted topic: of each key at least the last record stays."""

    logs: dict[int, list[tuple[int, bytes, bytes | None]]] = field(default_factory=dict)
    ends: Counter[int] = field(default_factory=Counter)

    def append(self, partition: int, key: bytes, value: bytes | None) -> None:
        """One record; None deletes the key."""
        self.logs.setdefault(partition, []).append((self.ends[partition], key, value))
        self.ends[partition] += 1

    def compact(self, partition: int, chance: random.Random) -> None:
        """Records that a later one of the same key replaced go; deletions go too. The newest record always stays."""
        log = self.logs.get(partition, [])
        last = {key: offset for offset, key, _ in log}
        self.logs[partition] = [
            (offset, key, value)
            for offset, key, value in log
            if offset == self.ends[partition] - 1
            or (last[key] == offset and (value is not None or chance.random() < 0.5))
        ]

    def read(self, partition: int, after: int) -> list[tuple[int, bytes, bytes | None]]:
        """Everything beyond offset `after`."""
        return [entry for entry in self.logs.get(partition, []) if entry[0] > after]

    def table(self, partition: int) -> Mapping[bytes, bytes]:
        """What a full reader makes of it."""
        found: dict[bytes, bytes] = {}
        for _, key, value in self.read(partition, -1):
            if value is None:
                found.pop(key, None)
            else:
                found[key] = value
        return found


class Broker:
    """All topics, and the weather."""

    def __init__(self, chance: random.Random, refusals: float) -> None:
        self._chance, self._refusals = chance, refusals
        self.down = False

    async def write(self, topic: Topic, outgoing: Sequence[Outgoing]) -> None:
        """As `streams.output.Output.write`: returns when all is acknowledged."""
        refusals = self._refusals
        while outgoing:
            salt = self._chance.random()
            order = sorted(outgoing, key=lambda record, salt=salt: hash((record.partition, salt)))  # type: ignore[misc]  # mypy and defaults
            stop = self._chance.randrange(len(order) + 1) if self._chance.random() < refusals else None
            step = self._chance.choice((2, 10, 1000))
            for number, record in enumerate(order):
                if number % step == 0:
                    await self._weather()
                if number == stop:
                    break
                topic.append(record.partition, record.key, record.value or b"")
            await self._weather()  # the acknowledgement is on its way
            if stop is None:
                return
            refusals /= 2

    async def keep(self, changelog: Changelog, chunks: Sequence[Outgoing]) -> None:
        """The same for a changelog."""
        for number, chunk in enumerate(chunks):
            await self._weather()
            if self._chance.random() < self._refusals / 4:
                for again in chunks[:number]:
                    changelog.append(again.partition, again.key, again.value)
            changelog.append(chunk.partition, chunk.key, chunk.value)
        await self._weather()

    async def _weather(self) -> None:
        await pause()
        while self.down:
            await pause()
