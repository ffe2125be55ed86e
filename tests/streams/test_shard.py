"""The order of steps of one partition, step by step; the simulator (tests/sim) drives the same code through faults."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

import streams.state
from streams.output import Outgoing
from streams.shard import Bounds, PartitionRun, Refused
from tests.sim.logs import Record

ALL = Bounds(0, 1_000)


class Sum:
    """An engine that keeps all it saw, and tells each value."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.seen: list[int] = []
        self._told: list[Outgoing] = []

    def observe(self, records: Sequence[Any]) -> list[Refused]:
        self.seen += [record.offset for record in records]
        self._told += [Outgoing(b"", b"%d" % record.offset, 0) for record in records]
        return [(record, "odd") for record in records if record.value == b"odd"]

    def take(self) -> list[Outgoing]:
        told, self._told = self._told, []
        return told

    def snapshot(self) -> bytes:
        return repr(self.seen).encode() + bytes(1_000)

    def restore(self, raw: bytes) -> None:
        if raw.startswith(b"other"):
            raise ValueError("a snapshot of another version")
        self.seen = [int(each) for each in raw.rstrip(b"\0").decode().strip("[]").split(",")]

    def watermark_us(self) -> int | None:
        return None

    def counters(self) -> dict[str, int]:
        return {}


class Wire:
    """Ports that note what came, in order, and may fail at a step."""

    def __init__(self, fail: str = "") -> None:
        self.steps: list[str] = []
        self.table: dict[bytes, bytes] = {}
        self._fail = fail

    def _step(self, name: str) -> None:
        if name == self._fail:
            raise ConnectionError(name)
        self.steps.append(name)

    async def refuse(self, refused: list[Refused]) -> None:
        self._step(f"refuse {len(refused)}")

    async def emit(self, outgoing: list[Outgoing]) -> None:
        self._step(f"emit {len(outgoing)}")

    async def keep(self, chunks: list[Outgoing]) -> None:
        self._step(f"{'delete' if chunks[0].value is None else 'keep'} {len(chunks)}")
        for chunk in chunks:
            if chunk.value is None:
                self.table.pop(chunk.key, None)
            else:
                self.table[chunk.key] = chunk.value


def _records(first: int, last: int, value: bytes = b"") -> list[Any]:
    return [Record(0, offset, 0, value) for offset in range(first, last + 1)]


async def _store(run: PartitionRun, wire: Wire) -> list[bytes]:
    state = run.snapshot()
    assert state is not None
    return await run.store(state, run.pack(state, 1 << 20), wire)


async def test_the_steps_come_in_order_and_move_what_may_be_committed() -> None:
    """Refused and told first, then stored; only then is the offset settled."""
    run, wire = PartitionRun(0, Sum(0), "w", 5), Wire()
    assert run.settled == 5
    assert await run.handle(_records(5, 7, b"odd"), wire) == 3
    assert (run.settled, wire.steps) == (5, ["refuse 3", "emit 3"])
    assert await _store(run, wire) == []
    assert (run.settled, wire.steps) == (8, ["refuse 3", "emit 3", "keep 1"])
    assert run.snapshot() is None, "nothing is new"


async def test_repeats_are_trimmed_and_a_hole_is_refused() -> None:
    """Contiguous or not at all."""
    shard = Sum(0)
    run, wire = PartitionRun(0, shard, "w", 0), Wire()
    assert await run.handle(_records(0, 3), wire) == 4
    assert await run.handle(_records(2, 5), wire) == 2
    assert await run.handle(_records(8, 9), wire) is None
    assert (shard.seen, run.sequence.next) == ([0, 1, 2, 3, 4, 5], 6)


@pytest.mark.parametrize("fail", ["refuse 0", "emit 4"])
async def test_half_a_batch_is_never_stored(fail: str) -> None:
    """After a failure between applying and writing there is no snapshot to be had."""
    run = PartitionRun(0, Sum(0), "w", 0)
    with pytest.raises(ConnectionError):
        await run.handle(_records(0, 3), Wire(fail))
    assert run.snapshot() is None
    assert run.settled == 0


async def test_what_is_not_acknowledged_is_not_settled() -> None:
    """A state whose writing fails moves nothing, and the slot that was whole stays."""
    run, wire = PartitionRun(0, Sum(0), "w", 0), Wire()
    await run.handle(_records(0, 3), wire)
    await _store(run, wire)
    await run.handle(_records(4, 5), wire)
    with pytest.raises(ConnectionError):
        await _store(run, Wire("keep 1"))
    assert run.settled == 4
    assert PartitionRun.restored(0, Sum, "next", wire.table, ALL).sequence.next == 4


async def test_the_table_stays_small_whoever_owns_the_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten owners after each other, each killed in the middle of storing: never more keys than two owners have."""
    monkeypatch.setattr(streams.state, "CHUNK_BYTES", 8)
    wire, at, most = Wire(), 0, 0
    for owner in range(10):
        run = PartitionRun.restored(0, Sum, f"w{owner}", wire.table, ALL)
        assert run.sequence.next == at
        for _ in range(3):
            await run.handle(_records(at, at), wire)
            stale = await _store(run, wire)
            assert not set(stale) & set(wire.table)
            at += 1
        await run.handle(_records(at, at), wire)
        state = run.snapshot()
        assert state is not None
        half = run.pack(state, 1 << 20)
        await wire.keep(half[: len(half) // 2])
        most = max(most, len(wire.table))
    slots = {key.rpartition(b"/")[0] for key in wire.table}
    assert slots == {b"0/w9/0", b"0/w9/1"}
    assert most <= 4 * len(half)


async def test_a_zombie_spoils_nothing() -> None:
    """The old owner goes on storing after the new one began: the new one's newest state is still whole and newest."""
    wire = Wire()
    zombie = PartitionRun(0, Sum(0), "zombie", 0)
    await zombie.handle(_records(0, 3), wire)
    await _store(zombie, wire)
    heir = PartitionRun.restored(0, Sum, "heir", wire.table, ALL)
    await zombie.handle(_records(4, 5), wire)
    await _store(zombie, wire)
    await heir.handle(_records(4, 9), wire)
    assert set(await _store(heir, wire)) == {b"0/zombie/0/0"}
    await zombie.handle(_records(6, 7), wire)
    await _store(zombie, wire)
    assert PartitionRun.restored(0, Sum, "third", wire.table, ALL).sequence.next == 10


async def test_a_state_of_no_use_is_not_used() -> None:
    """One that the engine refuses, or that is ahead of a topic made anew: the log is read from its beginning."""
    wire, run = Wire(), PartitionRun(0, Sum(0), "w", 0)
    await run.handle(_records(0, 3), wire)
    await _store(run, wire)
    assert PartitionRun.restored(0, Sum, "n", wire.table, Bounds(2, 4)).sequence.next == 4
    assert PartitionRun.restored(0, Sum, "n", wire.table, Bounds(2, 3)).sequence.next == 2
    wire.table = dict(streams.state.pack(0, "w", 0, streams.state.State(3, b"other"), 1 << 20))
    shard = PartitionRun.restored(0, Sum, "n", wire.table, Bounds(2, 9))
    assert (shard.sequence.next, shard.settled) == (2, 2)


def test_the_steps_need_no_event_loop() -> None:
    """Nothing in the steps needs a running loop of asyncio: the simulator drives them by hand."""
    run, wire = PartitionRun(0, Sum(0), "w", 0), Wire()
    coroutine = run.handle(_records(0, 1), wire)
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    assert ended.value.value == 2
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
