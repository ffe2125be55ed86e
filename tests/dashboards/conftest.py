"""A store filled with a seeded stretch of four hours, and an empty one."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from tests.dashboards import day
from tests.dashboards.stored import StoreProcess

SEED = 7
HOURS_S = 4 * 3_600


@pytest.fixture(scope="session")
def end_us() -> int:
    """When the seeded events end: now, as the store forgets old ones."""
    return time.time_ns() // 1000


@pytest.fixture(scope="session")
def seeded(tmp_path_factory: pytest.TempPathFactory, end_us: int) -> Iterator[StoreProcess]:
    """A store with four hours of events, four findings with three revisions each, and five processes."""
    store = StoreProcess(tmp_path_factory.mktemp("seeded") / "store")
    events, findings = day.seeded(SEED, end_us, day_s=HOURS_S)
    store.fill(events, findings, day.statuses(datetime.now(UTC).isoformat(timespec="milliseconds")))
    yield store
    store.close()


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    """A store with tables and nothing in them."""
    store = StoreProcess(tmp_path_factory.mktemp("empty") / "store")
    yield store
    store.close()
