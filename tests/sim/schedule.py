"""One seeded schedule: both stages over a short log, with faults, and what must be true at its end.

`run_schedule(seed)` answers with what is wrong, in words; nothing, where all is well. The same seed always gives the
same schedule. First a while of chaos, in which every fault has a chance of its own drawn from the seed; then calm, in
which the survivors finish.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import streams.state
from collector.event import SCHEMA_VERSION, Tick, encode, from_timestamp_us
from collector.kafka import KafkaConfig
from streams.stage1 import stage1
from streams.stage2 import stage2
from streams.state import unpack
from tests.sim.answer import Answer, End, problems_of, undisturbed
from tests.sim.broker import Broker, Topic
from tests.sim.logs import CONFIG, Log, Shape, short_log
from tests.sim.process import Group, Process, Role

KAFKA = KafkaConfig()
STEPS_MAX = 20_000


@dataclass(frozen=True)
class Plan:
    """What a schedule is made of; drawn from its seed, or said."""

    shape: Shape
    tenant_partitions: int = 2
    workers: int = 2
    records_max: int = 20
    chaos_steps: int = 400
    faults: float = 0.05
    """How often a step is a fault; each has a weight of its own."""
    drop: float = 0.05
    repeat: float = 0.05
    refusals: float = 0.1
    in_time: float = 0.5
    """How often a worker that must give partitions up has time to store their state."""
    chunk_bytes: int = 700
    writer: Callable[[str], str] = str
    """What a writer is called: by its own name."""
    exact: bool = False
    """Every batch has `records_max` records, where there are so many."""
    calm: bool = False
    """No faults at all."""


def draw(seed: int) -> Plan:
    """Another plan for every seed."""
    chance = random.Random(f"plan {seed}")  # noqa: S311  # repeatable, no secret
    shape = Shape(
        traffic=chance.randrange(3),
        partitions=chance.choices((1, 2, 3, 4, 8, 16), (4, 8, 4, 4, 1, 1))[0],
        collectors=chance.choice((1, 2, 3)),
        leaving=chance.random() < 0.7,
        resent=chance.random() < 0.7,
        outage=chance.random() < 0.4,
    )
    if not shape.outage and chance.random() < 0.3:
        shape = replace(shape, late=True)
    return Plan(
        shape,
        tenant_partitions=chance.choice((1, 2)),
        workers=chance.choice((1, 2, 2, 3)),
        records_max=chance.choice((12, 40, 200)),
        chaos_steps=chance.choice((100, 200, 400)),
        faults=chance.choice((0.02, 0.05, 0.1)),
        drop=chance.choice((0, 0.05, 0.2)),
        repeat=chance.choice((0, 0.05, 0.2)),
        refusals=chance.choice((0, 0.1, 0.5)),
        in_time=chance.choice((0, 0.5, 1)),
        chunk_bytes=chance.choice((500, 1_500, 1 << 20)),
    )


def run_schedule(seed: int, plan: Plan | None = None, happened: Counter[str] | None = None) -> list[str]:
    """What went wrong under this schedule; `happened` is told which faults there were."""
    plan = plan or draw(seed)
    simulation = Simulation(seed, plan)
    with small_chunks(plan.chunk_bytes):
        simulation.chaos()
        simulation.calm()
    if happened is not None:
        happened.update(simulation.happened)
    return simulation.problems()


@contextmanager
def small_chunks(size: int) -> Iterator[None]:
    """Snapshots of a few hundred bytes in several chunks, as large ones are."""
    usual = streams.state.CHUNK_BYTES
    streams.state.CHUNK_BYTES = size  # type: ignore[misc]  # final for all but this
    try:
        yield
    finally:
        streams.state.CHUNK_BYTES = usual  # type: ignore[misc]  # as above


class Simulation:
    """The two stages, their groups, and the broker."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.plan = plan
        self._chance = random.Random(f"schedule {seed}")  # noqa: S311  # repeatable, no secret
        self.log: Log = short_log(plan.shape)
        partitions, tenants = plan.shape.partitions, plan.tenant_partitions
        self._events, self.rollups, self.findings = Topic(partitions), Topic(tenants), Topic(1)
        self._events.logs = [list(log) for log in self.log.partitions]
        self._released = [0] * partitions
        self._ticks = 0
        self._broker = Broker(self._chance, plan.refusals)
        first = stage1(KAFKA, CONFIG, partitions, tenants).make_shard
        second = stage2(KAFKA, CONFIG, partitions, tenants, 1).make_shard
        self.roles = (
            Role(first, self._events, self._released, self.rollups),
            Role(second, self.rollups, [0] * tenants, self.findings),
        )
        self.groups = (Group(partitions, self._chance), Group(tenants, self._chance))
        self.processes: tuple[list[Process], list[Process]] = ([], [])
        self._born = 0
        self._wrong: list[str] = []
        self._weights = {name: 0 if plan.calm else self._chance.choice((0, 1, 1, 4)) for name in self._faults}
        self.happened: Counter[str] = Counter()
        for number in (0, 1):
            for _ in range(plan.workers if number == 0 else self._chance.choice((1, 2))):
                self._join(number)

    @property
    def _faults(self) -> Mapping[str, Callable[[int], None]]:
        return {
            "kill": self._kill,
            "suspend": self._suspend,
            "resume": self._resume,
            "expel": self._expel,
            "join": self._join,
            "leave": self._leave,
            "outage": self._outage,
            "compact": self._compact,
            "tick": self._tick,
        }

    def chaos(self) -> None:
        """Work and faults, one small step at a time, in an order that only the seed knows."""
        names, weights = list(self._weights), list(self._weights.values())
        for _ in range(self.plan.chaos_steps):
            stage = self._chance.randrange(2)
            if any(weights) and self._chance.random() < self.plan.faults:
                name = self._chance.choices(names, weights)[0]
                self.happened[name] += 1
                self._faults[name](stage)
            else:
                self._step(stage)

    def _step(self, stage: int) -> None:
        running = [process for process in self.processes[stage] if process.state == "running"]
        if not running:
            return
        process = self._chance.choice(running)
        what = self._chance.random()
        burst = range(self._chance.choice((1, 3, 10, 30)))
        if not process.recovered and process in self.groups[stage].members:
            if what < 0.5:
                process.recover(self.plan.writer)
            else:
                any(not process.work() for _ in burst)
        elif what < 0.3:
            self._release()
            process.fetch(self._cut(), self.plan.drop, self.plan.repeat)
        elif what < 0.7:
            any(not process.work() for _ in burst)
        elif what < 0.95:
            any(not process.store() for _ in burst)
        elif process in self.groups[stage].members:
            self._commit(stage, process)
        elif what > 0.98:
            self._notice(stage, process)

    def _cut(self) -> int:
        return self.plan.records_max if self.plan.exact else self._chance.randrange(1, self.plan.records_max + 1)

    def _release(self) -> None:
        """The collectors wrote some more; what stage 1 wrote is there for stage 2."""
        partition = self._chance.randrange(len(self._released))
        total = len(self._events.logs[partition])
        step = self._chance.randrange(1, 80)
        self._released[partition] = min(total, self._released[partition] + step)
        self.roles[1].visible[:] = [len(log) for log in self.rollups.logs]

    def _commit(self, stage: int, process: Process) -> None:
        """Whatever is committed must be in a whole state on the changelog."""
        for partition, offset in process.settled().items():
            state = unpack(partition, self.roles[stage].changelog.table(partition)).state
            if offset > (state.applied + 1 if state is not None else 0):
                self._wrong.append(
                    f"stage {stage + 1}: offset {offset} committed, state is at {state and state.applied}"
                )

    def _join(self, stage: int) -> None:
        if sum(member.state != "dead" for member in self.groups[stage].members) >= 3:
            return
        self._born += 1
        process = Process(f"w{self._born}", self.roles[stage], self._broker, self._chance)
        self.processes[stage].append(process)
        self.groups[stage].members.append(process)
        self.groups[stage].rebalance(self.plan.in_time)

    def _kill(self, stage: int) -> None:
        if alive := [process for process in self.processes[stage] if process.state != "dead"]:
            self._chance.choice(alive).die()

    def _suspend(self, stage: int) -> None:
        if running := [process for process in self.groups[stage].members if process.state == "running"]:
            self._chance.choice(running).state = "suspended"

    def _resume(self, stage: int) -> None:
        """SIGCONT. Where the group went on without it, it is a zombie until it notices."""
        for process in self.processes[stage]:
            if process.state == "suspended":
                process.state = "running"

    def _expel(self, stage: int) -> None:
        """The session of those who are silent ends."""
        if any(member.state != "running" for member in self.groups[stage].members):
            self.groups[stage].rebalance(self.plan.in_time)

    def _leave(self, stage: int) -> None:
        """SIGTERM."""
        if running := [member for member in self.groups[stage].members if member.state == "running"]:
            process = self._chance.choice(running)
            process.revoke(in_time=True)
            process.die()
            self.groups[stage].rebalance(self.plan.in_time)

    def _notice(self, stage: int, process: Process) -> None:
        """A zombie hears that its partitions are another's: it gives up, and joins again."""
        process.revoke(in_time=self._chance.random() < self.plan.in_time)
        process.assign(set())
        if len(self.groups[stage].members) < 3:
            self.groups[stage].members.append(process)
            self.groups[stage].rebalance(self.plan.in_time)

    def _outage(self, _: int) -> None:
        self._broker.down = not self._broker.down

    def _compact(self, stage: int) -> None:
        changelog = self.roles[stage].changelog
        if changelog.logs:
            changelog.compact(self._chance.choice(sorted(changelog.logs)), self._chance)

    def _tick(self, _: int) -> None:
        """The owner of an idle partition appends a tick; so does a zombie."""
        done = [p for p, count in enumerate(self._released) if count == len(self._events.logs[p])]
        if not done or self._ticks >= 6:
            return
        partition = self._chance.choice(done)
        at_ms = self._events.logs[partition][-1].timestamp + self._chance.randrange(3_000)
        self._ticks += 1
        common = {"schema_version": SCHEMA_VERSION, "event_id": f"tick-{self._ticks}", "collector_id": "w", "boot": "b"}
        tick = Tick(timestamp=from_timestamp_us(at_ms * 1_000), seq=self._ticks, **common)
        self._events.append(partition, b"tick", encode(tick), at_ms)

    def calm(self) -> None:
        """No more faults: whoever is left, or one who joins, finishes. Some zombies write their last words."""
        self._broker.down = False
        self._released[:] = [len(log) for log in self._events.logs]
        for stage in (0, 1):
            for process in self.processes[stage]:
                if process.state != "dead" and process not in self.groups[stage].members:
                    process.finish()
                    process.die()
            self._resume(stage)
            if not any(member.state == "running" for member in self.groups[stage].members):
                self._join(stage)
            self.groups[stage].rebalance(1)
            for _ in range(STEPS_MAX):
                self.roles[1].visible[:] = [len(log) for log in self.rollups.logs]
                if not self._calm_round(stage):
                    break
            else:
                self._wrong.append(f"stage {stage + 1} does not come to an end")

    def _calm_round(self, stage: int) -> bool:
        busy = False
        for process in self.groups[stage].members:
            process.finish()
            if not process.recovered:
                process.recover(self.plan.writer)
            process.fetch(self.plan.records_max if self.plan.exact else 10_000, 0, 0)
            while process.work():
                pass
            process.store()
            busy = busy or process.behind()
        return busy

    def restart(self, *, forget_state: bool = False) -> None:
        """SIGKILL of every process, and as many new ones; without their state they read everything again."""
        for stage, processes in enumerate(self.processes):
            members = len(self.groups[stage].members)
            for process in processes:
                process.die()
            if forget_state:
                self.roles[stage].changelog.logs.clear()
            for _ in range(members):
                self._join(stage)

    def problems(self) -> list[str]:
        """What is wrong at the end."""
        runs = [run for member in self.groups[0].members for run in member.runs.values()]
        counters: Counter[str] = Counter()
        for run in runs:
            counters.update(run.shard.counters())
        told = [record for log in self.rollups.logs for record in log]
        raised = [record for log in self.findings.logs for record in log]
        logs = tuple(tuple(log) for log in self._events.logs)
        wanted = _undisturbed(logs, self.plan.tenant_partitions) if self._ticks else answer_to(self.plan)
        watermarks = {run.partition: run.shard.watermark_us() for run in runs}
        end = End(logs, told, raised, counters, watermarks)
        return [*self._wrong, *problems_of(self.log, wanted, end), *layout_matters(self.plan.shape)]


@lru_cache(maxsize=512)
def _cached(shape: Shape, tenant_partitions: int) -> Answer:
    return _undisturbed(short_log(shape).partitions, tenant_partitions)


def answer_to(plan: Plan) -> Answer:
    """What the engines alone make of the plan's log, in one go."""
    return _cached(plan.shape, plan.tenant_partitions)


def _undisturbed(logs: Sequence[Sequence[object]], tenant_partitions: int) -> Answer:
    first = stage1(KAFKA, CONFIG, len(logs), tenant_partitions)
    second = stage2(KAFKA, CONFIG, len(logs), tenant_partitions, 1)
    return undisturbed(first, second, tenant_partitions, logs)


@lru_cache(maxsize=512)
def layout_matters(shape: Shape) -> tuple[str, ...]:
    """Promise (b): what differs, but for offsets, from the answer to the same events on one plain partition."""
    plain = Shape(shape.traffic, partitions=1, collectors=1, leaving=False, resent=False, rate=shape.rate)
    if shape.late or _cached(shape, 1).bare() == _cached(plain, 1).bare():
        return ()
    return ("findings are not those of the same events on one partition",)


def forget() -> None:
    """Where the rules changed, so did the answers."""
    _cached.cache_clear()
    layout_matters.cache_clear()
