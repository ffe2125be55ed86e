"""The guards that need torch and transformers keep the contract too, in the environment that has them."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from collector.guards.protocol import Guard, GuardPolicy
from tests.collector.guards import built
from tests.collector.guards.test_contract import *  # noqa: F403 - all its tests, with the guards below

test_ten_megabytes_are_judged_to_the_end = pytest.mark.long(test_ten_megabytes_are_judged_to_the_end)  # noqa: F405


@pytest.fixture(scope="module", params=[name for name, package in built.PACKAGES.items() if package == "transformers"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardPolicy]:
    """Each such guard's policy, with a model made for it."""
    with ExitStack() as stack:
        yield built.policy(request.param, tmp_path_factory.mktemp(request.param), stack)


@pytest.fixture(scope="module")
def guard(policy: GuardPolicy) -> Guard:
    """Each such guard."""
    return policy.build()
