"""A view over a seeded store, and a browser that looks at it."""

import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dashboards.config import DashboardsConfig
from dashboards.view import make_view, serve_view
from tests.browser.chromium import CHROMIUM, Chromium
from tests.dashboards import day
from tests.dashboards.stored import StoreProcess


@pytest.fixture(scope="session")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    """Four hours of events, four findings, five processes."""
    store = StoreProcess(tmp_path_factory.mktemp("looked-at") / "store")
    events, findings = day.seeded(11, time.time_ns() // 1000, day_s=4 * 3_600)
    store.fill(events, findings, day.statuses(datetime.now(UTC).isoformat(timespec="milliseconds")))
    yield store
    store.close()


@pytest.fixture
async def view(looked_at: StoreProcess) -> AsyncIterator[str]:
    """The address of a view that refreshes every second."""
    config = DashboardsConfig(port=0, refresh_s=1, default_range="6h", watch={"latency": 20_000})
    runner, url = await serve_view(make_view(looked_at.query, config), config)
    yield url
    await runner.cleanup()


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Chromium]:
    """Chromium; the test is skipped by name where there is none."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    async with Chromium(tmp_path / "profile") as started:
        yield started
