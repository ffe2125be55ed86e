"""An older Kafka: the whole of both stages on 3.9.1, whose jars `kafka-3.9/jgo.lock.toml` names."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.kafka import KafkaConfig, ensure_topics
from streams.broker import Broker
from streams.config import BrokerSettings
from tests.streams import traffic
from tests.streams.worker import Worker, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.soak]
LOCK_FILE = Path(__file__).parent / "kafka-3.9" / "jgo.lock.toml"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Apache Kafka 3.9.1, which still speaks the protocol versions that 4.0 removed."""
    settings = BrokerSettings(port=0, data_dir=tmp_path_factory.mktemp("kafka-3.9"), heap_mb=256, quick_start=True)
    broker = Broker(settings, lock_file=LOCK_FILE)
    broker.start()
    yield broker
    broker.stop()


@pytest.mark.parametrize("public", [False, True])
async def test_both_stages_run_on_an_older_kafka(
    older: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    """Killed in mid-stream, the broker too: byte for byte what the engines give, by Faust and by the public path."""
    if public:
        monkeypatch.setenv("INFERWATCH_PUBLIC_PATH", "1")
    kafka = KafkaConfig(bootstrap_servers=older.bootstrap, topic_prefix=f"t{int(public)}")
    await ensure_topics(kafka)
    records = traffic.spike(37, 4, int((time.time() - 3600) * 1e6))
    third = len(records) // 3
    options = {"batch_records_max": 50, "tick_after_s": 300, "session_timeout_s": 6}
    with Worker("stage1", kafka, tmp_path, **options) as one, Worker("stage2", kafka, tmp_path, **options) as two:
        await traffic.send(kafka, records[:third])
        stored = lambda: one.metric("states_total") > 0 and two.metric("states_total") > 0  # noqa: E731
        wait_until(stored, "state is stored", 90, one, two)
        for worker in (one, two):
            worker.kill9()
            worker.start()
        await traffic.send(kafka, records[third : 2 * third])
        await asyncio.to_thread(older.kill)
        await asyncio.to_thread(older.start)
        await traffic.send(kafka, records[2 * third :])
        wanted, found = await traffic.caught_up(kafka, one, two, timeout_s=120)
        assert [worker.stop() for worker in (one, two)] == [0, 0]
    assert found == wanted
    assert found.findings
