"""Logging in by SCRAM at a real broker that asks for it."""

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.kafka import BatchWriter, BrokerAway, KafkaConfig, ensure_topics, make_producer, wait_for_broker
from streams import jars
from streams.java import find_java

pytestmark = pytest.mark.kafka
PASSWORD = "correct-horse-battery"

SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=SASL_PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=SASL_PLAINTEXT
sasl.enabled.mechanisms=SCRAM-SHA-512
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required username="iw" password="{password}";
log.dirs={data}
offsets.topic.replication.factor=1
log.cleaner.dedupe.buffer.size=16777216
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a broker that lets in only `iw` with the password."""
    java = find_java("auto")
    folder, port = tmp_path_factory.mktemp("scram"), _free_port()
    paths = ":".join(map(str, jars.classpath(jars.default_cache(), lambda _done, _all, _name: None)))
    settings = folder / "server.properties"
    settings.write_text(SETTINGS.format(port=port, controller=_free_port(), data=folder / "data", password=PASSWORD))
    quick = [str(java), "-Xmx192m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", paths]
    user = f"--add-scram=SCRAM-SHA-512=[name=iw,password={PASSWORD}]"
    tool = ["kafka.tools.StorageTool", "format", "--cluster-id=guarded", "-c", str(settings), user]
    subprocess.run([*quick, *tool], check=True, capture_output=True, timeout=120)
    with (folder / "log").open("wb") as said:
        process = subprocess.Popen([*quick, "kafka.Kafka", str(settings)], stdout=said, stderr=subprocess.STDOUT)
    yield f"127.0.0.1:{port}"
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _config(bootstrap: str, folder: Path, password: str) -> KafkaConfig:
    (folder / "password").write_text(password)
    return KafkaConfig(
        bootstrap_servers=bootstrap,
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="iw",
        sasl_password_file=folder / "password",
    )


async def test_right_password_works_and_a_wrong_one_is_told(guarded: str, tmp_path: Path) -> None:
    """With the password topics are made and records stored; with another, or without login, the sentence says why
    and shows no password."""
    config = _config(guarded, tmp_path, PASSWORD)
    await wait_for_broker(config, 90)
    topics = await ensure_topics(config)
    assert topics["iw.events"] == 4
    producer = make_producer(config, client_id="test")
    await producer.start()
    writer = BatchWriter(producer, "iw.events")
    await writer.append(b"k", b"v", 0)
    assert [(ack.partition, ack.base_offset, ack.records) for ack in await writer.flush(20)] == [(0, 0, 1)]
    await producer.stop()

    wrong = _config(guarded, tmp_path, "wrong-password")
    started_s = time.monotonic()
    with pytest.raises(BrokerAway, match=r"(?i)no Kafka at .*authentication") as error:
        await wait_for_broker(wrong, 3)
    assert "wrong-password" not in str(error.value)
    with pytest.raises(BrokerAway):
        await wait_for_broker(KafkaConfig(bootstrap_servers=guarded, request_timeout_ms=500), 2)
    assert time.monotonic() - started_s < 10
