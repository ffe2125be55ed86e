"""The simulator finds every planted bug; one that it doesn't find shows what it can't see."""

import pytest

from tests.sim.mutations import MUTATIONS, Mutation, hunt

SCHEDULES = 300


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    """Within a few hundred schedules; the seed that found it replays it."""
    found = hunt(mutation, SCHEDULES)
    assert found is not None, f"not found in {SCHEDULES} schedules: {mutation.breaks}"
    seed, wrong = found
    print(f"{mutation.name} ({mutation.breaks}): seed {seed}, {wrong[0]}")


def test_there_are_more_than_ten() -> None:
    """Each breaks another rule."""
    assert len({mutation.breaks for mutation in MUTATIONS}) == len(MUTATIONS) > 10
