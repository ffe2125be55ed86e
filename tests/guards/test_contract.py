"""The guards whose packages live in the sidecar's environment keep the contract too.

Run with `.venv-guards/bin/python -m pytest tests/guards` (`make guards`); skipped by name elsewhere.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from collector.guards.protocol import Guard, GuardPolicy
from tests.collector.guards import built
from tests.collector.guards.test_contract import *  # noqa: F403 - all its tests, with the guards below

OURS = [name for name, package in built.PACKAGES.items() if package in ("codeshield", "llamafirewall")]


@pytest.fixture(scope="module", params=OURS)
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardPolicy]:
    """Each such guard's policy."""
    with ExitStack() as stack:
        yield built.policy(request.param, tmp_path_factory.mktemp(request.param), stack)


@pytest.fixture(scope="module")
def guard(policy: GuardPolicy) -> Guard:
    """Each such guard."""
    return policy.build()
