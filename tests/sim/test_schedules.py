"""Thousands of seeded schedules of faults over both stages: none changes a rollup, a finding or a user's total."""

import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from tests.sim.schedule import Simulation, draw, run_schedule

SCHEDULES = int(os.environ.get("INFERWATCH_SCHEDULES", "100"))
PROCESSES = 2


class Told(NamedTuple):
    """What a process says of its share."""

    wrong: list[str]
    happened: Counter[str]
    logs: int


def _share(first: int) -> Told:
    """Every `PROCESSES`th seed from `first` on, until something is wrong."""
    happened: Counter[str] = Counter()
    shapes = set()
    for seed in range(first, SCHEDULES, PROCESSES):
        plan = draw(seed)
        shapes.add(plan.shape)
        if wrong := run_schedule(seed, plan, happened):
            return Told([f"seed {seed}: {wrong}", str(plan)], happened, len(shapes))
    return Told([], happened, len(shapes))


def test_no_schedule_of_faults_changes_an_answer() -> None:
    """Kills at any step, zombies, rebalances, lost and repeated chunks, outages, compaction, in any order."""
    began_s = time.monotonic()
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        shares = list(pool.map(_share, range(PROCESSES)))
    took_s = time.monotonic() - began_s
    happened = sum((share.happened for share in shares), Counter[str]())
    print(
        f"{SCHEDULES} schedules in {took_s:.0f} s, {SCHEDULES / took_s:.0f} a second; {dict(sorted(happened.items()))}"
    )
    assert [line for share in shares for line in share.wrong] == []
    assert len(happened) == 9
    assert min(happened.values()) >= SCHEDULES / 4


def test_a_seed_replays_its_schedule() -> None:
    """The same seed draws the same plan, meets the same faults, and leaves every record at the same offset."""
    for seed in range(15):
        first, second = Simulation(seed, draw(seed)), Simulation(seed, draw(seed))
        for simulation in (first, second):
            simulation.chaos()
            simulation.calm()
        assert first.happened == second.happened
        assert (first.rollups.logs, first.findings.logs) == (second.rollups.logs, second.findings.logs)
