"""The books of a crash battery: what was sent, what it must lead to, what the stages wrote, all grown round by round.

Undisturbed engines read the same log beside the battery, each record once. So a round is compared at the cost of its
own records, and still over the whole run: nothing that went wrong earlier is forgotten.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from collector.event import AuditEvent, decode
from collector.kafka import ConsumerRecord, KafkaConfig, TopicName, TopicPartition, make_consumer
from detectors import finding as findings
from detectors import rollup as rollups
from detectors.config import DetectConfig
from detectors.rollup import Partial, Signal
from streams.stage1 import stage1
from streams.stage2 import stage2
from tests.sim.answer import totals
from tests.sim.logs import Record

Key = tuple[object, ...]
NAMES: Final[tuple[TopicName, ...]] = ("events", "rollups", "findings")


@dataclass
class Totals:
    """Of each user, over the whole run."""

    prompt_tokens: Counter[str] = field(default_factory=Counter)
    """Of answered requests."""
    blocked: Counter[str] = field(default_factory=Counter)


class Ledger:
    """Compares, and tells what differs."""

    def __init__(self, kafka: KafkaConfig, detect: DetectConfig) -> None:
        self._kafka = kafka
        counts = {name: kafka.count(name) for name in NAMES}
        first = stage1(kafka, detect, counts["events"], counts["rollups"])
        second = stage2(kafka, detect, *counts.values())
        self._one = [first.make_shard(partition) for partition in range(counts["events"])]
        self._two = [second.make_shard(partition) for partition in range(counts["rollups"])]
        self._counts = counts
        self._read: dict[TopicName, list[int]] = {name: [0] * count for name, count in counts.items()}
        self._seen: dict[Key, bytes] = {}
        self.wanted: tuple[dict[Key, bytes], dict[Key, bytes]] = ({}, {})
        self.found: tuple[dict[Key, bytes], dict[Key, bytes]] = ({}, {})
        self.sent = Totals()
        self.told = Totals()
        self.records = 0

    def send(self, values: Sequence[bytes]) -> None:
        """These records are being sent: each counts once, however often the broker gets it."""
        for value in values:
            event = decode(value)
            if isinstance(event, AuditEvent):
                self.sent.prompt_tokens[event.user_id] += event.prompt_tokens if event.status == "ok" else 0
                self.sent.blocked[event.user_id] += event.blocked

    async def compare(self, timeout_s: float) -> list[str]:
        """Nothing once the stages wrote all that the log leads to; what differs, after `timeout_s`."""
        end_s = time.monotonic() + timeout_s
        while True:
            await self._advance()
            wrong = self._differences()
            if not wrong or time.monotonic() > end_s:
                return wrong
            await asyncio.sleep(0.3)

    async def _advance(self) -> None:
        for record in await self._new("events"):
            self.records += 1
            shard = self._one[record.partition]
            shard.observe([record])
        told = [outgoing for shard in self._one for outgoing in shard.take()]
        for out in told:
            self._book(self.wanted[0], out.value or b"")
            self._two[out.partition].observe([Record(out.partition, 0, 0, out.value or b"")])
        for raised in [outgoing for shard in self._two for outgoing in shard.take()]:
            self._note(self.wanted[1], raised.value or b"")
        for record in await self._new("rollups"):
            if self._book(self.found[0], record.value or b""):
                tokens, blocked = totals([record.value or b""])
                self.told.prompt_tokens.update(tokens)
                self.told.blocked.update(blocked)
        for record in await self._new("findings"):
            self._note(self.found[1], record.value or b"")

    async def _new(self, name: TopicName) -> list[ConsumerRecord]:
        """What came to a topic since the last call, by partition and offset."""
        topic, places = self._kafka.topic(name), self._read[name]
        consumer = make_consumer(self._kafka, group_id=None)
        await consumer.start()
        try:
            tps = [TopicPartition(topic, partition) for partition in range(len(places))]
            consumer.assign(tps)
            ends = await consumer.end_offsets(tps)
            for tp in tps:
                consumer.seek(tp, places[tp.partition])
            found: list[ConsumerRecord] = []
            while any(places[tp.partition] < ends[tp] for tp in tps):
                for tp, fetched in (await consumer.getmany(timeout_ms=200)).items():
                    fresh = [record for record in fetched if places[tp.partition] <= record.offset < ends[tp]]
                    found += fresh
                    places[tp.partition] = max([places[tp.partition], *(record.offset + 1 for record in fresh)])
            return sorted(found, key=lambda record: (record.partition, record.offset))
        finally:
            await consumer.stop()

    @staticmethod
    def _book(book: dict[Key, bytes], value: bytes) -> bool:
        """Whether it is new."""
        rollup = rollups.decode(value)
        if not isinstance(rollup, Partial | Signal):
            return False
        key = (rollup.partition, rollup.second, type(rollup).__name__, rollup.tenant, rollup.kind, rollup.key)
        if key in book:
            assert book[key] == value, f"a rollup told twice, and differently: {key}"
            return False
        book[key] = value
        return True

    @staticmethod
    def _note(book: dict[Key, bytes], value: bytes) -> None:
        finding = findings.decode(value)
        key = (finding.uid, finding.revision)
        assert book.setdefault(key, value) == value, f"a finding told twice, and differently: {finding.detector}"

    def _differences(self) -> list[str]:
        wrong = []
        for what, wanted, found in zip(("rollups", "findings"), self.wanted, self.found, strict=True):
            other = sum(wanted[key] != found[key] for key in wanted.keys() & found.keys())
            missing, more = len(wanted.keys() - found.keys()), len(found.keys() - wanted.keys())
            if missing or more or other:
                wrong.append(f"{what}: {missing} missing, {more} too many, {other} different, of {len(wanted)}")
        for what in ("prompt_tokens", "blocked"):
            sent, told = +getattr(self.sent, what), +getattr(self.told, what)
            if sent != told:
                wrong.append(f"{what} by user: {(told - sent).total()} too many, {(sent - told).total()} missing")
        late = sum(shard.counters().get("late", 0) for shard in self._one)
        return [*wrong, f"{late} late"] if late else wrong
