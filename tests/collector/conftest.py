"""Publishers for the tests of this room, on the session's Kafka."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.kafka import KafkaConfig
from collector.routes import GateConfig
from tests.collector.gating import Site
from tests.collector.publishing import Maker


@pytest.fixture
def make(kafka_config: KafkaConfig, tmp_path: Path) -> Iterator[Maker]:
    """Publishers for one test."""
    maker = Maker(kafka_config, tmp_path / "journal")
    yield maker
    for publisher in maker.made:
        publisher.stop(1)


@pytest.fixture
def site() -> Site:
    """A gate with its defaults."""
    return Site(GateConfig())
