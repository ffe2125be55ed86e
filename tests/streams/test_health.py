"""The health pages and the status record of a process."""

import asyncio
import json
import socket
import urllib.error
import urllib.request

import pytest

from collector.kafka import KafkaConfig, ensure_topics
from streams.config import StreamsConfig
from streams.health import Health, Reading
from streams.metrics import Histogram
from streams.status import read_status
from tests.streams import traffic

AWAY = KafkaConfig(bootstrap_servers="127.0.0.1:9", request_timeout_ms=500)
SIZES = Histogram((1, 10))
SIZES.add(4)
READING = Reading(
    ready=False,
    why="waiting for partitions",
    lag=7,
    watermark_us=1_700_000_000_500_000,
    late=2,
    drops=1,
    totals={"records": 11},
    levels={"partitions": 4.0},
    histograms={"batch_records": SIZES},
)


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # a loopback address
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_the_pages_say_what_the_reading_says() -> None:
    """Alive, not ready and why, and every figure as a metric, with the broker away."""
    async with Health("stage1", AWAY, StreamsConfig(), lambda: READING) as health:
        assert health.url.startswith("http://127.0.0.1:")
        pages = [await asyncio.to_thread(_get, f"{health.url}/{page}") for page in ("healthz", "readyz", "metrics")]
        missing = await asyncio.to_thread(_get, f"{health.url}/other")
    assert pages[:2] == [(200, "alive\n"), (503, "waiting for partitions\n")]
    assert missing[0] == 404
    values = dict(line.rsplit(" ", 1) for line in pages[2][1].splitlines() if not line.startswith("#"))
    assert float(values.pop('inferwatch_watermark_delay_seconds{role="stage1"}')) > 3600
    assert values == {
        'inferwatch_ready{role="stage1"}': "0.0",
        'inferwatch_lag_records{role="stage1"}': "7.0",
        'inferwatch_partitions{role="stage1"}': "4.0",
        'inferwatch_watermark_seconds{role="stage1"}': "1.7000000005e+09",
        'inferwatch_late_total{role="stage1"}': "2.0",
        'inferwatch_drops_total{role="stage1"}': "1.0",
        'inferwatch_records_total{role="stage1"}': "11.0",
        'inferwatch_records_per_second{role="stage1"}': "0.0",
        'inferwatch_batch_records_bucket{le="1",role="stage1"}': "0.0",
        'inferwatch_batch_records_bucket{le="10",role="stage1"}': "1.0",
        'inferwatch_batch_records_bucket{le="+Inf",role="stage1"}': "1.0",
        'inferwatch_batch_records_count{role="stage1"}': "1.0",
        'inferwatch_batch_records_sum{role="stage1"}': "4.0",
    }


async def test_a_taken_port_is_one_sentence() -> None:
    """The setting is named."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} of 127.0.0.1 is taken \(.*\): set streams.health_port"):
            async with Health("stage1", AWAY, StreamsConfig(health_port=port), lambda: READING):
                pass


@pytest.mark.kafka
async def test_the_record_is_written_and_says_goodbye(kafka_config: KafkaConfig) -> None:
    """Records come while the process runs; the last one says that it stopped, and then status lists it no more."""
    await ensure_topics(kafka_config)
    streams = StreamsConfig(status_interval_s=0.2)
    async with Health("stage1", kafka_config, streams, lambda: READING, config_digest="abc") as health:
        async with asyncio.timeout(20):
            while not (statuses := await read_status(kafka_config)):  # noqa: ASYNC110  # Kafka tells no event
                await asyncio.sleep(0.1)
        (status,) = statuses
        assert (status["age_s"], status.pop("silent")) == (status.pop("age_s"), False)
        at = status.pop("at")
        assert status == {
            "process_id": health.process_id,
            "role": "stage1",
            "state": "running",
            "version": status["version"],
            "config_digest": "abc",
            "url": health.url,
            "ready": False,
            "why": "waiting for partitions",
            "lag": 7,
            "watermark": "2023-11-14T22:13:20.500+00:00",
            "late": 2,
            "drops": 1,
            "totals": {"records": 11},
            "levels": {"partitions": 4.0, "records_per_second": 0.0},
        }
        await traffic.send(kafka_config, [(b"x", b"not json", 0), (b"y", json.dumps({"at": at}).encode(), 0)], "status")
        assert [status["role"] for status in await read_status(kafka_config)] == ["stage1"]
    assert await read_status(kafka_config) == []
