"""The sidecar that a file's tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.guards.stack import GuardStack
from tests.collector.guards.sidecars import Process, judged_again, serving, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sidecar that most tests share lies."""
    return tmp_path_factory.mktemp("sidecar")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Process]:
    """Two workers, 16 texts may wait."""
    with serving(settings(folder, workers=2, queue_max=16, batch_max=2), folder) as process:
        yield process


@pytest.fixture
def stack(shared: Process) -> Iterator[GuardStack]:
    """A server's stack on the shared sidecar, whole again."""
    made = GuardStack(shared.config.model_copy(update={"workers": 16, "stuck_max": 16}))
    judged_again(made)
    yield made
    made.close()
