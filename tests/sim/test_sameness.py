"""Promises (a) and (b), cell by cell: partitions, workers, batches, restarts and replays change nothing."""

from itertools import product

import pytest

from tests.sim.logs import Shape
from tests.sim.schedule import Plan, Simulation, answer_to

CELLS = [
    pytest.param(*cell, marks=[pytest.mark.long] if cell[2] == 1 else [])  # record by record takes ten times as long
    for cell in product((1, 4, 16), (1, 2), (1, 500, 50_000), (False, True), (False, True))
]
RATE_PER_S = 45.0
"""So that batches of 500 cut a log of one partition in two."""


@pytest.mark.parametrize(("partitions", "workers", "batch", "restart", "replay"), CELLS)
def test_every_cell_gives_the_same_answer(
    partitions: int, workers: int, batch: int, restart: bool, replay: bool
) -> None:
    """(a): byte for byte what one undisturbed run gives; (b): but for offsets, what one partition gives."""
    shape = Shape(0, partitions, collectors=2, rate=RATE_PER_S)
    plan = Plan(shape, workers=workers, records_max=batch, exact=True, calm=True, drop=0, repeat=0, refusals=0)
    simulation = Simulation(0, plan)
    if restart:
        simulation.chaos()
        simulation.restart()
    simulation.calm()
    if replay:
        simulation.restart(forget_state=True)
        simulation.calm()
    assert simulation.problems() == []
    plain = Plan(Shape(0, 1, 1, leaving=False, resent=False, rate=RATE_PER_S))
    assert answer_to(plan).bare() == answer_to(plain).bare()
    assert len(answer_to(plan).findings) > 10
