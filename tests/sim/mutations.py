"""Planted bugs: each breaks one rule or one step. The simulator must find every one of them (`test_mutations.py`).

A mutation is planted in all that runs, the undisturbed run too; so it is found by what must be true, not by comparing
right with wrong. Rules inside the clock and the engines are broken by rewriting one expression of one function: where
that code is changed, its mutation says that it no longer fits.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np

from detectors import runs
from detectors.columns import Columns, Ints, picked
from detectors.partition import PartitionEngine
from detectors.tenant import TenantEngine
from detectors.time import SECOND_US, ClockState, PartitionClock
from streams.batch import Fetched, Sequencer
from streams.output import Outgoing
from streams.shard import PartitionRun
from streams.stage1 import EventShard
from tests.sim.logs import CONFIG
from tests.sim.schedule import Plan, draw, forget, run_schedule


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    name: str
    breaks: str
    """The rule or step, in words."""
    patches: Callable[[], Sequence[Any]] = tuple
    plan: Callable[[Plan], Plan] = lambda plan: plan


def rewritten(owner: Any, name: str, *changes: tuple[str, str]) -> Any:
    """A patch of `owner.name` with each old expression, which must occur exactly once, replaced by the new one."""
    function = owner.__dict__[name]
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        if source.count(old) != 1:
            raise LookupError(f"{owner.__name__}.{name} has {source.count(old)} times {old!r}: fit the mutation anew")
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + source, f"<mutated {name}>", "exec")
    exec(code, function.__globals__ | {"__builtins__": __builtins__}, made)  # noqa: S102  # our own source, changed
    return patch.object(owner, name, made[name])


def _again_and_again() -> Sequence[Any]:
    """Both guards against replays are off: the sequencer's and the engine's own."""
    return (
        rewritten(Sequencer, "accept", ("records[0].offset < self.next", "False")),
        rewritten(
            PartitionEngine,
            "observe_log",
            ('int(np.searchsorted(offsets, self.applied_offset, side="right"))', "0"),
        ),
    )


def _markers_first() -> Sequence[Any]:
    take = EventShard.take

    def markers_first(self: EventShard) -> list[Outgoing]:
        taken = take(self)
        return sorted(taken, key=lambda outgoing: not (outgoing.value or b"")[1:].startswith(b"\xa6marker"))

    return (patch.object(EventShard, "take", markers_first),)


def _judge_by_the_fastest() -> Any:
    made = rewritten(runs, "judge", ("promised.min(axis=0)", "promised.max(axis=0)"))
    return patch("detectors.time.judge", made.new)


def _goodbye_is_a_heartbeat() -> Sequence[Any]:
    observe = EventShard.observe

    def deaf(self: EventShard, records: Sequence[Any]) -> Any:
        old, new = b'"kind":"goodbye"', b'"kind":"heartbeat"'
        if not records:
            return observe(self, records)
        heard = Fetched.of(records)
        values = [(value or b"").replace(old, new) for value in heard.values]
        return observe(self, Fetched(heard.topic, heard.partition, [*values], heard.offsets, heard.append_ms))

    return (patch.object(EventShard, "observe", deaf),)


def _outage_is_silence() -> Sequence[Any]:
    time = CONFIG.time.model_copy(update={"gap_max_ms": 10**9})
    return (patch("tests.sim.schedule.CONFIG", CONFIG.model_copy(update={"time": time})),)


def _time_out_by_event_time() -> Sequence[Any]:
    newest = "max(each.promise_us for each in state.lanes.values())"
    dead = f"{newest} - lane.promise_us > self._config.silence_max_ms * 1_000"
    return (
        patch.object(PartitionClock, "observe_run", lambda *_: (False, None)),
        rewritten(PartitionClock, "observe", ("if state.clock_ms > self._expiry_ms:", "if state.lanes:")),
        rewritten(PartitionClock, "_bury", ("state.clock_ms - lane.moved_ms > self._config.silence_max_ms", dead)),
    )


def _arrival_order() -> Sequence[Any]:
    def by_second(columns: Columns, rows: Ints) -> Columns:
        return picked(columns, rows[np.argsort(columns.moment_us[rows] // SECOND_US, kind="stable")])

    return (patch("detectors.partition.in_order", by_second),)


def in_the_clock(owner: type, name: str, *changes: tuple[str, str]) -> Callable[[], Sequence[Any]]:
    """A rule of the clock, which then judges one by one: runs of ordinary records have rules of their own."""
    one_by_one = patch.object(PartitionClock, "observe_run", lambda *_: (False, None))
    return lambda: (one_by_one, rewritten(owner, name, *changes))


MUTATIONS = (
    Mutation(
        "commit before state",
        "an offset is committed before a state that holds it is acknowledged (T10)",
        lambda: (patch.object(PartitionRun, "settled", property(lambda run: run.sequence.next)),),
    ),
    Mutation(
        "half a batch stored",
        "state is stored though what the batch gave is not all written (T10)",
        lambda: (rewritten(PartitionRun, "snapshot", (" or self._half_done", "")),),
    ),
    Mutation(
        "hole taken",
        "a chunk that does not follow the last one is applied",
        lambda: (rewritten(Sequencer, "accept", ("records[0].offset > self.next", "False")),),
    ),
    Mutation("replays count", "records that were applied before are applied again", _again_and_again),
    Mutation("marker first", "a marker is written before the partials of its second (T9)", _markers_first),
    Mutation(
        "second closes early",
        "a second closes as soon as W is inside it, not at its end (T8)",
        in_the_clock(ClockState, "move", ("watermark_us // SECOND_US - 1", "watermark_us // SECOND_US")),
    ),
    Mutation(
        "fastest lane leads",
        "the watermark is the largest promise of the live lanes, not the least (T6)",
        in_the_clock(PartitionClock, "_advance", ("min(live", "max(live")),
    ),
    Mutation(
        "fastest lane leads a run",
        "the same in a run of ordinary records that are judged at once (T6)",
        lambda: (_judge_by_the_fastest(),),
    ),
    Mutation("goodbye unheard", "a lane that said goodbye still holds time back (T5)", _goodbye_is_a_heartbeat),
    Mutation(
        "twice is twice",
        "a record whose seq was taken before counts again (T7)",
        in_the_clock(PartitionClock, "_judge", ("record.seq <= lane.seq", "False")),
    ),
    Mutation(
        "late is taken",
        "an event whose second is closed goes to the detectors (T7)",
        in_the_clock(PartitionClock, "_place", ("second <= self.state.closed_through", "False")),
    ),
    Mutation(
        "time-out by event time", "a lane is dead when others' promises ran ahead of it (T5)", _time_out_by_event_time
    ),
    Mutation("outage is silence", "the whole gap between append times counts as silence (T4)", _outage_is_silence),
    Mutation(
        "arrival order",
        "the events of a second go to the detectors as they arrived (T8)",
        _arrival_order,
    ),
    Mutation(
        "any marker",
        "stage 2 closes a second when one partition has passed it, not all (T9)",
        lambda: (
            rewritten(
                TenantEngine,
                "_mark",
                ("len(self._markers) == self._partitions", "self._markers"),
                ("min(self._markers.values())", "max(self._markers.values())"),
            ),
        ),
    ),
    Mutation(
        "one name for all",
        "a zombie and its successor keep state under the same keys",
        plan=lambda plan: replace(plan, writer=lambda _: "w"),
    ),
    Mutation(
        "deleted too early",
        "what earlier owners stored is deleted before a state of our own is acknowledged",
        lambda: (
            rewritten(
                PartitionRun,
                "store",
                (
                    "await ports.keep(chunks)",
                    "await ports.keep([Outgoing(k, None, self.partition) for k in self._found] + chunks)",
                ),
            ),
        ),
    ),
)


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """With the bug in; answers of before are forgotten, and so are those with it."""
    with ExitStack() as stack:
        forget()
        stack.callback(forget)
        for each in mutation.patches():
            stack.enter_context(each)
        yield


def hunt(mutation: Mutation, schedules: int) -> tuple[int, list[str]] | None:
    """(seed of the first schedule that finds it, what it says), or None."""
    with planted(mutation):
        for seed in range(schedules):
            wrong = run_schedule(seed, mutation.plan(draw(seed)))
            if wrong:
                return seed, wrong
    return None
