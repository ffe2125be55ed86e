"""`inferwatch topics grow`: more partitions for iw.events, without a change to any finding (rule T9).

A user lives in one partition, picked by a hash modulo their number, so another number moves users. Nothing may be under
way then: collectors have closed their lanes, stage 1 has judged every second, stage 2 has seen every rollup, and all
are stopped. `grow` checks all of that and refuses otherwise, so it can be tried at any time.

Stage 2's state goes over whole: baselines, open findings, suppressions, what was told. Stage 1's begins anew at the end
of the log: what it holds is the memory of single users over minutes, and the users move. So an attack by one user that
goes on across the switch is counted from the switch on; aggregates and their baselines know no difference.

Guarantee: states are written first and name the new number, partitions come last. A crash in between is mended by
running it again; until then no stage starts, as the number configured is not that of the topic.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct

from collector.admin import add_partitions, count_partitions, describe_topics
from collector.kafka import KafkaConfig, TopicPartition, make_consumer, wait_for_broker
from collector.uuid7 import uuid7
from detectors.config import DetectConfig
from streams.config import StreamsConfig
from streams.ingest import ROLE as INGEST
from streams.output import Outgoing, Output
from streams.shard import Shard
from streams.stage1 import ROLE as STAGE_ONE
from streams.stage1 import stage1
from streams.stage2 import ROLE as STAGE_TWO
from streams.stage2 import stage2
from streams.state import Found, State, pack, unpack
from streams.status import SILENT_S, newest_status

READERS: Final = (STAGE_ONE, STAGE_TWO, "store", INGEST)
"""Roles that read iw.events or its rollups, by the number of partitions at their start."""
SHOWN_MAX: Final = 5
"""Lanes named in a refusal."""
_PARTITIONS, _CLOSED_THROUGH, _MARKERS = 2, 3, 4
"""Where they lie in a snapshot of stage 2."""


class NotDrained(RuntimeError):
    """The partitions can't be changed yet; the message says why, one reason a line, and what to do."""


class Growth(NamedTuple):
    """What was done, or is to be done."""

    before: int
    after: int
    abandoned: tuple[str, ...]
    """Lanes that never said goodbye."""


class _Head(Struct, frozen=True):
    kind: str = ""
    collector_id: str = ""
    boot: str = ""


class _Log(NamedTuple):
    """What iw.events holds."""

    ends: dict[int, int]
    last: dict[int, int]
    """Partition → offset of the last record that is no tick."""
    open_lanes: tuple[str, ...]


_head_decoder = msgspec.json.Decoder(_Head)


async def grow(
    kafka: KafkaConfig,
    detect: DetectConfig,
    streams: StreamsConfig,
    *,
    dry_run: bool = False,
    abandon_lanes: bool = False,
) -> Growth:
    """Gives iw.events as many partitions as `kafka.partitions.events` says. Returns when the stages may start again.

    `abandon_lanes` goes on though a lane never said goodbye: what its collector still sends is late or misplaced.
    Raises NotDrained, BrokerAway or TopicMismatch. Reads all of iw.events once.
    """
    await wait_for_broker(kafka, streams.broker_timeout_s)
    facts = await describe_topics(kafka)
    topic, after = kafka.topic("events"), kafka.count("events")
    needed = (kafka.topic("events"), kafka.topic("rollups"), kafka.topic("status"))
    missing = [name for name in needed if name not in facts]
    if missing:
        raise NotDrained(f"{', '.join(missing)} is missing: see inferwatch topics check")
    before = facts[topic].partitions
    if before >= after:
        raise NotDrained(f"{topic} has {before} partitions and the configuration says {after}: nothing to grow")
    log = await _read_log(kafka, before)
    reasons = await _alive(kafka)
    if log.open_lanes and not abandon_lanes:
        named = ", ".join(log.open_lanes[:SHOWN_MAX])
        reasons.append(
            f"{len(log.open_lanes)} lanes are open ({named}): stop their collectors, and start and stop once more "
            "those that died, so that their journals are sent; or give them up with --abandon-lanes"
        )
    first, second = _Stage.one(kafka, detect, before, after), _Stage.two(kafka, detect, before, after)
    await first.read(kafka)
    await second.read(kafka)
    reasons += first.faults(log.last)
    reasons += second.faults({p: end - 1 for p, end in (await _ends(kafka, second.source, second.partitions)).items()})
    if reasons:
        raise NotDrained("\n".join(reasons))
    if not dry_run:
        await first.write(kafka, streams, {p: State(end - 1, first.fresh(p)) for p, end in log.ends.items()})
        await second.write(kafka, streams, {p: _regrown(found, after) for p, found in second.states.items()})
        await add_partitions(kafka, {first.changelog: after, topic: after})
    return Growth(before, after, log.open_lanes)


async def _alive(kafka: KafkaConfig) -> list[str]:
    """Processes that must not run. Collectors are known by their lanes, which say more than a record does."""
    return [
        f"{record['process_id']} runs, or died less than {SILENT_S:g} s ago: stop it and try again"
        for record in await newest_status(kafka)
        if record["role"] in READERS and not record["silent"]
    ]


async def _read_log(kafka: KafkaConfig, partitions: int) -> _Log:
    topic = kafka.topic("events")
    lanes: dict[tuple[int, str, str], bool] = {}
    last: dict[int, int] = {}
    ends = await _ends(kafka, topic, partitions)
    async for partition, offset, _, value in _records(kafka, topic, ends):
        try:
            head = _head_decoder.decode(value or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            head = _Head()
        if head.kind == "tick":
            continue
        last[partition] = offset
        if head.boot:
            lanes[partition, head.collector_id, head.boot] = head.kind == "goodbye"
    still = [f"{collector}/{boot} on {partition}" for (partition, collector, boot), ended in lanes.items() if not ended]
    return _Log(ends, last, tuple(sorted(still)))


async def _ends(kafka: KafkaConfig, topic: str, partitions: int) -> dict[int, int]:
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        ends = await consumer.end_offsets([TopicPartition(topic, partition) for partition in range(partitions)])
        return {tp.partition: end for tp, end in ends.items()}
    finally:
        await consumer.stop()


async def _records(
    kafka: KafkaConfig, topic: str, ends: Mapping[int, int]
) -> AsyncIterator[tuple[int, int, bytes, bytes | None]]:
    """(partition, offset, key, value) of all records before `ends`."""
    tps = {TopicPartition(topic, partition): end for partition, end in ends.items() if end > 0}
    if not tps:
        return
    consumer = make_consumer(kafka, group_id=None)
    await consumer.start()
    try:
        consumer.assign(list(tps))
        await consumer.seek_to_beginning(*tps)
        while any([await consumer.position(tp) < end for tp, end in tps.items()]):
            for tp, records in (await consumer.getmany(timeout_ms=500)).items():
                for record in records:
                    yield tp.partition, record.offset, record.key, record.value
    finally:
        await consumer.stop()


class _Stage:
    """The stored state of one stage, and what it must be afterwards."""

    def __init__(
        self, kafka: KafkaConfig, role: str, source: str, partitions: int, *makers: Callable[[int], Shard]
    ) -> None:
        self.source, self.partitions, self.role = source, partitions, role
        self.changelog = f"{kafka.topic_prefix}-{role}-state-changelog"
        self._make, self._make_new = makers
        self.found: dict[int, Found] = {}
        self.states: dict[int, State] = {}
        """Those that are of the old layout, and so to be written anew."""
        self.done: set[int] = set()
        """Partitions whose state is of the new layout already: an earlier run died."""
        self.waiting: dict[int, int] = {}

    @classmethod
    def one(cls, kafka: KafkaConfig, detect: DetectConfig, before: int, after: int) -> "_Stage":
        rollups = kafka.count("rollups")
        old, new = (stage1(kafka, detect, count, rollups).make_shard for count in (before, after))
        return cls(kafka, STAGE_ONE, kafka.topic("events"), before, old, new)

    @classmethod
    def two(cls, kafka: KafkaConfig, detect: DetectConfig, before: int, after: int) -> "_Stage":
        rollups, findings = kafka.count("rollups"), kafka.count("findings")
        old, new = (stage2(kafka, detect, count, rollups, findings).make_shard for count in (before, after))
        return cls(kafka, STAGE_TWO, kafka.topic("rollups"), rollups, old, new)

    def fresh(self, partition: int) -> bytes:
        """A state that has seen nothing, of the new layout."""
        return self._make_new(partition).snapshot()

    async def read(self, kafka: KafkaConfig) -> None:
        """What the changelog holds; nothing where there is none yet."""
        table: dict[bytes, bytes] = {}
        there = self.changelog in await count_partitions(kafka)
        ends = await _ends(kafka, self.changelog, self.partitions) if there else {}
        async for _, _, key, value in _records(kafka, self.changelog, ends):
            if value is None:
                table.pop(key, None)
            else:
                table[key] = value
        for partition in range(self.partitions):
            self.found[partition] = unpack(partition, table)
            state = self.found[partition].state
            if state is None:
                continue
            try:
                shard = self._restored(self._make, partition, state)
            except ValueError:
                self._restored(self._make_new, partition, state)  # a third layout is nothing that can be mended here
                self.done.add(partition)
            else:
                self.states[partition] = state
                counters = shard.counters()
                self.waiting[partition] = counters.get("pending", 0) + counters.get("waiting", 0)

    @staticmethod
    def _restored(make: Callable[[int], Shard], partition: int, state: State) -> Shard:
        shard = make(partition)
        shard.restore(state.snapshot)
        return shard

    def faults(self, last: Mapping[int, int]) -> list[str]:
        """Why the stage is not drained; `last` is the last offset of each partition that it must have seen."""
        remedy = f"run {self.role} until its lag is 0 and 15 s more, then stop it"
        faults = []
        for partition in self._undone(range(self.partitions)):
            state, must = self.states.get(partition), last.get(partition, -1)
            seen = -1 if state is None else state.applied
            if seen < must:
                faults.append(f"{self.role} has seen {self.source}-{partition} up to {seen} of {must}: {remedy}")
            elif self.waiting.get(partition):
                faults.append(f"{self.role} still waits to judge seconds of {self.source}-{partition}: {remedy}")
        return faults

    def _undone(self, partitions: Iterable[int]) -> list[int]:
        return [partition for partition in partitions if partition not in self.done]

    async def write(self, kafka: KafkaConfig, streams: StreamsConfig, states: Mapping[int, State]) -> None:
        """Stores the states, each checked by restoring it, and deletes what was before."""
        output = Output(kafka, self.changelog)
        try:
            for partition in self._undone(sorted(states)):
                state = states[partition]
                self._restored(self._make_new, partition, state)
                chunks = pack(partition, uuid7(), 0, state, streams.state_bytes_max)
                await output.write([Outgoing(key, value, partition) for key, value in chunks])
                await output.write([Outgoing(key, None, partition) for key in self.found[partition].keys])
        finally:
            await output.close()


def _regrown(state: State, partitions: int) -> State:
    """Stage 2's state, for markers of `partitions` partitions; the new ones have closed what it has closed."""
    snapshot: list[Any] = msgspec.msgpack.decode(state.snapshot)
    closed = snapshot[_CLOSED_THROUGH]
    snapshot[_PARTITIONS] = partitions
    if closed is not None:
        snapshot[_MARKERS] = dict.fromkeys(range(partitions), closed) | snapshot[_MARKERS]
    return State(state.applied, msgspec.msgpack.encode(snapshot))
