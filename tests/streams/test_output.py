"""Writing goes on until it is done."""

import asyncio

import pytest

from collector.kafka import KafkaConfig, ensure_topics
from streams.output import Outgoing, Output
from tests.conftest import RunningBroker
from tests.streams import traffic

pytestmark = pytest.mark.kafka


async def _values(kafka: KafkaConfig) -> list[bytes]:
    return [record.value for record in await traffic.read(kafka, kafka.topic("rollups"), 1)]


async def test_a_record_too_large_is_left_out_alone(kafka_config: KafkaConfig) -> None:
    """It is counted; the others are written, and so is what comes later."""
    await ensure_topics(kafka_config)
    output = Output(kafka_config, kafka_config.topic("rollups"), record_bytes_max=1000)
    await output.write([Outgoing(b"k", b"before", 0), Outgoing(b"k", b"x" * 2000, 0), Outgoing(b"k", b"after", 0)])
    await output.write([Outgoing(b"k", b"later", 0)])
    await output.close()
    assert await _values(kafka_config) == [b"before", b"after", b"later"]
    assert (output.written, output.dropped) == (3, 1)


async def test_a_refused_batch_does_not_silence_the_writer(kafka_config: KafkaConfig) -> None:
    """Where the topic's limit is under ours, the broker refuses: a new producer goes on once the limit fits."""
    await ensure_topics(kafka_config)
    output = Output(kafka_config, kafka_config.topic("deadletter"), record_bytes_max=4 << 20)
    await output.write([Outgoing(b"k", b"first", 0)])
    refused = asyncio.create_task(output.write([Outgoing(b"k", traffic.noise(3 << 20), 0)]))
    await asyncio.sleep(1)
    assert not refused.done(), "it is tried on, and told"
    refused.cancel()
    await asyncio.gather(refused, return_exceptions=True)
    await asyncio.wait_for(output.write([Outgoing(b"k", b"second", 0)]), 20)
    await output.close()
    written = await traffic.read(kafka_config, kafka_config.topic("deadletter"), 1)
    assert [record.value for record in written] == [b"first", b"second"]


async def test_an_outage_is_waited_for(broker: RunningBroker, kafka_config: KafkaConfig) -> None:
    """Written while the broker is away: it is there when the broker is back, in order."""
    short = kafka_config.model_copy(update={"request_timeout_ms": 1500})
    await ensure_topics(kafka_config)
    output = Output(short, short.topic("rollups"))
    await output.write([Outgoing(b"k", b"before", 0)])
    await asyncio.to_thread(broker.kill9)
    writing = asyncio.create_task(output.write([Outgoing(b"k", b"during", 0), Outgoing(b"k", b"end", 0)]))
    await asyncio.sleep(2.5)
    assert not writing.done()
    await asyncio.to_thread(broker.start)
    await asyncio.wait_for(writing, 30)
    await output.close()
    assert list(dict.fromkeys(await _values(kafka_config))) == [b"before", b"during", b"end"]
