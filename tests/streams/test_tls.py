"""TLS and login for every client, from one [kafka] table, against a real broker that asks for both."""

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from collector.config import JournalConfig, PublisherConfig
from collector.event import AuditEvent, decode
from collector.kafka import BrokerAway, KafkaConfig, LoginRefused, ensure_topics, wait_for_broker
from collector.publisher import Publisher
from streams.broker import Broker
from streams.broker_properties import SecureListener
from streams.config import BrokerSettings
from streams.status import read_status
from tests.streams import traffic
from tests.streams.certificates import Authority
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka
PASSWORD, WRONG = "correct-horse-battery", "wrong-horse-battery"
QUICK_TRAFFIC = {"calm_s": 30, "spike_s": 30}


class Guarded(NamedTuple):
    """A broker with a secure port, and what its clients need."""

    broker: Broker
    authority: Authority
    kafka: KafkaConfig


def _config(port: int, authority: Authority, folder: Path, *, password: str = PASSWORD) -> KafkaConfig:
    file = folder / f"password-{len(password)}"
    file.write_text(password + "\n")
    return KafkaConfig(
        bootstrap_servers=f"127.0.0.1:{port}",
        security_protocol="SASL_SSL",
        sasl_username="iw",
        sasl_password_file=file,
        tls_ca_file=authority.ca_file,
    )


def _started(folder: Path, authority: Authority, certificate: Path, client_ca: Path | None) -> Iterator[Guarded]:
    settings = BrokerSettings(port=0, data_dir=folder / "kafka", heap_mb=256, quick_start=True)
    secure = SecureListener(certificate, "iw", PASSWORD, client_ca_file=client_ca)
    assert PASSWORD not in repr(secure)
    broker = Broker(settings, secure=secure)
    broker.start()
    try:
        yield Guarded(broker, authority, _config(broker.secure_port, authority, folder))
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """TLS and SCRAM-SHA-512."""
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder / "ca")
    yield from _started(folder, authority, authority.issue("broker")[2], None)


@pytest.fixture
def mutual(tmp_path: Path) -> Iterator[Guarded]:
    """The same, and clients must show a certificate of the CA."""
    authority = Authority(tmp_path / "ca")
    yield from _started(tmp_path, authority, authority.issue("broker")[2], authority.ca_file)


async def test_the_whole_pipe_runs_over_tls_and_scram(guarded: Guarded, tmp_path: Path) -> None:
    """Publisher, both stages with their changelogs, ingest and delivery: same findings as the engines alone, no
    password in any log, record or page."""
    kafka = guarded.kafka
    await wait_for_broker(kafka, 30)
    await ensure_topics(kafka)
    publisher = Publisher(
        kafka, PublisherConfig(), JournalConfig(dir=tmp_path / "journal"), collector_id="c", model_version="tiny@0"
    )
    await asyncio.to_thread(publisher.start)
    await traffic.send(kafka, traffic.spike(3, 4, time.time_ns() // 1000, **QUICK_TRAFFIC))
    ticket = publisher.begin(key="u_1", known={"tenant": "acme", "user_id": "u_1"})
    publisher.finish(ticket, status="ok")
    assert await asyncio.to_thread(publisher.stop)
    roles = ("stage1", "stage2", "ingest", "deliver")
    workers = [Worker(role, kafka, tmp_path, tick_after_s=300) for role in roles]
    try:
        one, two, ingest, deliver = (worker.start() for worker in workers)
        wait_until(lambda: all(w.metric("ready") == 1 for w in workers), "all are ready", 90, *workers)
        wanted, found = await traffic.caught_up(kafka, one, two)
        assert found == wanted
        assert found.findings
        wait_until(lambda: one.metric("states_total") > 0 and two.metric("states_total") > 0, "state", 30, one, two)
        sink = deliver.folder / "findings.jsonl"
        arrived = lambda: sink.is_file() and len(sink.read_text().splitlines()) >= len(found.findings)  # noqa: E731
        wait_until(arrived, "findings are delivered", 30, deliver)
        wait_until(lambda: ingest.metric("lag_records") == 0, "all is stored", 30, ingest)
        told = {status["role"] for status in await read_status(kafka)}
        assert {*roles} <= told <= {*roles, "collector"}
        pages = "".join(worker.get("metrics") for worker in workers)
        assert [worker.stop() for worker in workers] == [0] * 4
    finally:
        for worker in workers:
            worker.__exit__()
    log = await traffic.read(kafka, kafka.topic("events"), 4)
    events = [event for record in log if type(event := decode(record.value)) is AuditEvent]
    assert sum(event.collector_id == "c" for event in events) == 1
    logs = "".join(worker.log.read_text() for worker in workers)
    kept = b"".join((r.value or b"") for r in await traffic.read(kafka, kafka.topic("status"), 1)).decode()
    assert PASSWORD not in logs + pages + kept
    assert "Traceback" not in logs


async def _refused(kafka: KafkaConfig, folder: Path) -> str:
    """What a worker says when it is started so, in one line; and `wait_for_broker` says the same, at once."""
    began_s = time.monotonic()
    with pytest.raises(LoginRefused) as refused:
        await wait_for_broker(kafka, 20)
    assert time.monotonic() - began_s < 5, "waiting does not mend it"
    with Worker("stage1", kafka, folder) as one:
        assert await asyncio.to_thread(one.process.wait, 40) == 1
    said = one.log.read_text()
    assert said == f"LoginRefused: {refused.value}\n"
    assert PASSWORD not in said
    assert WRONG not in said
    return str(refused.value)


async def test_a_wrong_password_is_one_sentence(guarded: Guarded, tmp_path: Path) -> None:
    """The user and the settings are named, never the password."""
    port = guarded.broker.secure_port
    wrong = _config(port, guarded.authority, tmp_path, password=WRONG)
    assert await _refused(wrong, tmp_path) == (
        f"no Kafka at 127.0.0.1:{port} for us: "
        "authentication of 'iw' failed: check kafka.sasl_username and its password"
    )
    plain = guarded.kafka.model_copy(update={"sasl_mechanism": "PLAIN"})
    assert await _refused(plain, tmp_path / "plain") == (
        f"no Kafka at 127.0.0.1:{port} for us: it does not offer PLAIN: change kafka.sasl_mechanism"
    )


async def test_a_stranger_as_ca_is_one_sentence(guarded: Guarded, tmp_path: Path) -> None:
    """The CA file is named."""
    stranger = Authority(tmp_path / "stranger", "stranger").ca_file
    said = await _refused(guarded.kafka.model_copy(update={"tls_ca_file": stranger}), tmp_path)
    at = f"127.0.0.1:{guarded.broker.secure_port}"
    assert said.startswith(f"no Kafka at {at} for us: its certificate is not signed by the CA in {stranger}")
    assert said.endswith(": set kafka.tls_ca_file")


async def test_a_port_of_another_protocol_is_told(guarded: Guarded) -> None:
    """TLS against the plain port, and the other way round: the server hangs up, and the setting is named."""
    plain_port = guarded.kafka.model_copy(update={"bootstrap_servers": guarded.broker.bootstrap})
    with pytest.raises(BrokerAway, match=r"it hangs up: check kafka\.security_protocol = 'SASL_SSL'"):
        await wait_for_broker(plain_port, 2)
    plain = KafkaConfig(bootstrap_servers=guarded.kafka.bootstrap_servers, request_timeout_ms=500)
    with pytest.raises(BrokerAway, match=r"after 2 s: "):
        await wait_for_broker(plain, 2)


@pytest.mark.parametrize(
    ("address", "days", "sentence"),
    [
        ("127.0.0.1", -2, "its certificate has expired: renew it"),
        ("127.0.0.2", 1, r"its certificate is for another address: name the broker in kafka\.bootstrap_servers"),
        (None, 1, r"its certificate is for another address: name the broker in kafka\.bootstrap_servers"),
    ],
)
async def test_a_bad_certificate_is_one_sentence(tmp_path: Path, address: str | None, days: int, sentence: str) -> None:
    """Expired or misnamed. Any TLS server will do: the handshake fails before Kafka is spoken."""
    authority = Authority(tmp_path / "ca")
    certificate, key, _ = authority.issue("elsewhere", address=address, days=days)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(lambda _r, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(LoginRefused, match=sentence):
            await wait_for_broker(_config(port, authority, tmp_path), 5)
        if address is not None and days > 0:
            named = _config(port, authority, tmp_path).model_copy(update={"bootstrap_servers": f"localhost:{port}"})
            with pytest.raises(LoginRefused, match="its certificate is for another host name"):
                await wait_for_broker(named, 5)


async def test_one_good_server_of_two_is_enough(guarded: Guarded, tmp_path: Path) -> None:
    """A server with a bad certificate refuses nobody while another lets us in."""
    authority = Authority(tmp_path / "stranger", "stranger")
    certificate, key, _ = authority.issue("broker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with await asyncio.start_server(lambda _r, writer: writer.close(), "127.0.0.1", 0, ssl=context) as server:
        bad = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        both = f"{bad},{guarded.kafka.bootstrap_servers}"
        await wait_for_broker(guarded.kafka.model_copy(update={"bootstrap_servers": both}), 20)
        with pytest.raises(LoginRefused):
            await wait_for_broker(guarded.kafka.model_copy(update={"bootstrap_servers": bad}), 20)


async def test_mutual_tls(mutual: Guarded, tmp_path: Path) -> None:
    """With a certificate of the CA a client is let in; without, or with a stranger's, it is told what is missing."""
    certificate, key, _ = mutual.authority.issue("client")
    kafka = mutual.kafka.model_copy(update={"tls_cert_file": certificate, "tls_key_file": key})
    await wait_for_broker(kafka, 20)
    assert (await ensure_topics(kafka))["iw.events"] == 4
    await traffic.send(kafka, [(b"k", b"v", 0)])
    assert [record.value for record in await traffic.read(kafka, "iw.events", 4)] == [b"v"]
    stranger = Authority(tmp_path / "stranger", "stranger").issue("client")
    for refused in (mutual.kafka, kafka.model_copy(update={"tls_cert_file": stranger[0], "tls_key_file": stranger[1]})):
        with pytest.raises(BrokerAway, match="tls_cert_file"):
            await wait_for_broker(refused, 3)


def test_the_test_makes_what_it_says(tmp_path: Path) -> None:
    """Passwords differ in length, so their files do; and worker settings hold paths, never secrets."""
    authority = Authority(tmp_path)
    config = _config(9, authority, tmp_path)
    assert PASSWORD not in json.dumps(config.model_dump(mode="json"))
    assert len(PASSWORD) != len(WRONG)
