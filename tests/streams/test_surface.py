"""The private surface, checked by version and name; where it is not as tested, the public path finds the same."""

import asyncio
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from collector.kafka import KafkaConfig, ensure_topics
from streams import surface
from streams.config import StreamsConfig
from streams.plain import PlainApp
from streams.surface import PUBLIC_PATH_VARIABLE, TESTED, UnknownVersion, check_versions, make_app
from streams.transport import BatchApp
from tests.streams import traffic
from tests.streams.worker import ROOT, Worker, wait_until

AN_HOUR_AGO_US = int((time.time() - 3600) * 1e6)
SMALL: dict[str, Any] = {"batch_records_max": 50, "tick_after_s": 300}
WARNING = "going by the public path, without Faust"


def test_the_installed_libraries_are_as_tested() -> None:
    """The pinned versions have all that is used of them; the pins are the newest releases at the time of writing."""
    check_versions()
    assert {name: metadata.version(name).startswith(tested) for name, tested in TESTED.items()} == dict.fromkeys(
        TESTED, True
    )


def test_another_version_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer Faust is named, with what to install."""
    monkeypatch.setattr(surface, "version", _newer_faust)
    with pytest.raises(UnknownVersion, match=r"faust-streaming 9\.9\.1 .* install 'faust-streaming==0\.15\.\*'"):
        check_versions()


def _newer_faust(name: str) -> str:
    return "9.9.1" if name == "faust-streaming" else metadata.version(name)


@pytest.mark.parametrize(
    "gone",
    [
        ("faust.transport.consumer:Consumer", "_no_such_thing"),
        ("faust.transport.consumer:NoSuchClass", "_read_offset"),
        ("faust.no_such_module", "anything"),
    ],
)
def test_a_private_name_that_went_away_is_noticed(monkeypatch: pytest.MonkeyPatch, gone: tuple[str, str]) -> None:
    """Even under the tested version number."""
    monkeypatch.setattr(surface, "PRIVATE_SURFACE", (gone,))
    with pytest.raises(UnknownVersion, match=gone[1]):
        check_versions()


def test_an_absent_library_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As any other version."""
    monkeypatch.setattr(surface, "TESTED", {"no-such-library": "1.0"})
    with pytest.raises(UnknownVersion, match="no-such-library is not installed"):
        check_versions()


async def test_an_unknown_version_takes_the_public_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not refused: the stage gets its records without Faust's private names. As tested, Faust's road is taken."""
    kafka, streams = KafkaConfig(), StreamsConfig()
    assert isinstance(make_app("stage1", kafka, streams, "iw.events"), BatchApp)
    monkeypatch.setattr(surface, "version", _newer_faust)
    plain = make_app("stage1", kafka, streams, "iw.events", datadir="unused")
    assert isinstance(plain, PlainApp)
    faust = BatchApp("stage1", kafka, streams, "iw.events")
    names = [app.Table("state", partitions=4).changelog_topic.get_topic_name() for app in (plain, faust)]
    assert names == ["iw-stage1-state-changelog"] * 2


def test_the_public_path_loads_no_faust() -> None:
    """So no change in it can matter."""
    check = (
        "import os, sys; os.environ['INFERWATCH_PUBLIC_PATH'] = '1'; import streams.stage1, streams.stage2, "
        "streams.stage; sys.exit('faust' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.kafka
async def test_the_public_path_gives_the_same_findings_through_kills(
    kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages without Faust, killed in mid-stream, a second worker joining: byte for byte what the engines give."""
    monkeypatch.setenv(PUBLIC_PATH_VARIABLE, "1")
    await ensure_topics(kafka_config)
    records = traffic.spike(23, 4, AN_HOUR_AGO_US)
    step = len(records) // 6 + 1
    with (
        Worker("stage1", kafka_config, tmp_path, name="a", **SMALL) as one,
        Worker("stage1", kafka_config, tmp_path, name="b", **SMALL) as other,
        Worker("stage2", kafka_config, tmp_path, **SMALL) as two,
    ):
        shared = lambda: one.metric("partitions") + other.metric("partitions") == 4  # noqa: E731
        wait_until(shared, "the workers share the partitions", 60, one, other, two)
        for start in range(0, len(records), step):
            await traffic.send(kafka_config, records[start : start + step])
            await asyncio.sleep(0.3)
            if start == 2 * step:
                stored = lambda: two.metric("states_total") > 0  # noqa: E731
                wait_until(stored, "state is stored", 60, two)
                for worker in (one, two):
                    worker.kill9()
                two.start()
        wait_until(lambda: other.metric("partitions") == 4, "the other worker owns all", 60, other, two)
        wanted, found = await traffic.caught_up(kafka_config, other, two)
        assert [worker.stop() for worker in (other, two)] == [0, 0]
    assert found == wanted
    assert found.findings
    assert all(WARNING in worker.log.read_text() for worker in (one, other, two))


@pytest.mark.long
@pytest.mark.kafka
async def test_a_zombie_on_the_public_path_harms_nothing(
    kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended beyond its session while another takes over, then let go again: the same findings."""
    monkeypatch.setenv(PUBLIC_PATH_VARIABLE, "1")
    await ensure_topics(kafka_config)
    records = traffic.spike(31, 4, AN_HOUR_AGO_US)
    third = len(records) // 3
    with (
        Worker("stage1", kafka_config, tmp_path, name="a", **SMALL) as one,
        Worker("stage1", kafka_config, tmp_path, name="b", **SMALL) as other,
        Worker("stage2", kafka_config, tmp_path, **SMALL) as two,
    ):
        shared = lambda: one.metric("partitions") == other.metric("partitions") == 2  # noqa: E731
        wait_until(shared, "the workers share the partitions", 60, one, other, two)
        await traffic.send(kafka_config, records[:third])
        one.send(signal.SIGSTOP)
        await traffic.send(kafka_config, records[third : 2 * third])
        wait_until(lambda: other.metric("partitions") == 4, "the other worker owns all", 60, other, two)
        one.send(signal.SIGCONT)
        await traffic.send(kafka_config, records[2 * third :])
        wait_until(shared, "they share again", 60, one, other, two)
        wanted, found = await traffic.caught_up(kafka_config, one, other, two)
        assert [worker.stop() for worker in (one, other, two)] == [0, 0, 0]
    assert found == wanted
    assert found.findings


@pytest.mark.long
@pytest.mark.kafka
async def test_both_paths_go_on_from_the_same_state(
    kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with Faust, gone on without it, ended with Faust: the state is one, and so are the findings."""
    await ensure_topics(kafka_config)
    records = traffic.spike(29, 4, AN_HOUR_AGO_US)
    third = len(records) // 3
    applied = []
    for part in range(3):
        if part == 1:
            monkeypatch.setenv(PUBLIC_PATH_VARIABLE, "1")
        else:
            monkeypatch.delenv(PUBLIC_PATH_VARIABLE, raising=False)
        sent = records[part * third : (part + 1) * third] if part < 2 else records[2 * third :]
        with (
            Worker("stage1", kafka_config, tmp_path, name=f"one-{part}", **SMALL) as one,
            Worker("stage2", kafka_config, tmp_path, name=f"two-{part}", **SMALL) as two,
        ):
            await traffic.send(kafka_config, sent)
            wait_until(lambda: one.metric("ready") == 1, "stage 1 is ready", 60, one, two)  # used at once
            wanted, found = await traffic.caught_up(kafka_config, one, two)
            applied.append(one.metric("records_total"))
            assert [worker.stop() for worker in (one, two)] == [0, 0]
            assert (WARNING in one.log.read_text()) == (part == 1)
    assert found == wanted
    assert found.findings
    assert sum(applied) == len(records), "each part went on where the one before it had ended"
