"""The syslog sink against real TCP and TLS servers."""

import asyncio
import socket

import pytest

from sinks.config import SyslogConfig
from sinks.delivery import SinkSetupError
from sinks.syslog import build
from tests.sinks.receivers import arrived, certificate, syslog_server
from tests.sinks.samples import HOSTILE, delivery_of, finding, hostile


def sink_of(port, **config):
    return build(SyslogConfig(**({"host": "127.0.0.1", "port": port, "tls": False, "hostname": "soc-1"} | config)))


async def test_findings_arrive_framed_in_order():
    """One message each; the header says who, when and how bad; the enterprise number adds structured data."""
    async with syslog_server() as server:
        sink = sink_of(server.port, enterprise_number=32473)
        await sink.send([finding("a", 1), finding("a", 2)])
        await arrived(lambda: server.messages, 2)
        await sink.close()
    first, second = server.messages
    assert first.startswith(b"<107>1 2026-11-20T12:01:01.000000Z soc-1 inferwatch ")
    assert b' block_rate [finding@32473 uid="a" revision="1"] CEF:0|inferwatch|inferwatch|' in first
    assert b'revision="2"] CEF:0|' in second
    assert len(server.writers) == 1


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_values_break_no_frame(name):
    """The message after a hostile one is read as sent, and none is longer than configured."""
    async with syslog_server() as server:
        sink = sink_of(server.port, message_max_bytes=2048)
        await sink.send([hostile(HOSTILE[name]), finding("after")])
        await arrived(lambda: server.messages, 2)
        await sink.close()
    assert [len(message) <= 2048 for message in server.messages] == [True, True]
    assert b"externalId=after " in server.messages[1]


async def test_a_restarted_receiver_gets_the_rest():
    """A connection that the receiver closed is noticed before the next message is written into it."""
    async with syslog_server() as server:
        sink = sink_of(server.port)
        await sink.send([finding("a")])
        await arrived(lambda: server.messages, 1)
        port = server.port
    letters = []
    made = delivery_of(sink, letters, first_wait_s=0.05, wait_max_s=0.1)
    sending = asyncio.create_task(made.deliver([finding("b"), finding("c")]))
    await asyncio.sleep(0.2)
    async with syslog_server(port=port) as server:
        await sending
        await arrived(lambda: server.messages, 2)
        await made.close()
    assert [b"externalId=b " in server.messages[0], b"externalId=c " in server.messages[1]] == [True, True]
    assert (letters, made.totals["delivered"]) == ([], 2)
    assert made.totals["retried"] >= 1


async def test_a_receiver_that_does_not_read_is_a_timeout():
    """What the receiver's kernel has not acknowledged is not delivered."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    sink = sink_of(listener.getsockname()[1], timeout_s=0.3, message_max_bytes=1_000_000)

    async def fill():
        for number in range(400):
            await sink.send([finding(f"{number}-{part}", summary="x" * 1000, tenant="y" * 4000) for part in range(50)])

    with pytest.raises(TimeoutError):
        await fill()
    await sink.close()
    listener.close()


async def test_tls_is_checked(tmp_path):
    """An unknown certificate is an error that may pass; with its file it is trusted, and a plain server is not."""
    cert, context = certificate(tmp_path)
    async with syslog_server(context) as server:
        with pytest.raises(OSError, match="certificate verify failed"):
            await sink_of(server.port, tls=True).send([finding("a")])
        sink = sink_of(server.port, tls=True, ca_file=cert)
        await sink.send([finding("b")])
        await arrived(lambda: server.messages, 1)
        await sink.close()
    assert b"externalId=b " in server.messages[0]
    async with syslog_server() as plain:
        with pytest.raises((OSError, TimeoutError)):
            await sink_of(plain.port, tls=True, ca_file=cert, timeout_s=0.5).send([finding("a")])
    assert plain.messages == []


async def test_nobody_there_is_an_error_that_may_pass():
    """Refused at once, to be tried again."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await sink_of(unused.getsockname()[1]).send([finding("a")])


def test_files_that_can_not_be_used_are_one_sentence(tmp_path):
    """A missing CA file and a certificate without sense."""
    with pytest.raises(SinkSetupError, match=r"^sinks\.syslog: a certificate or key file can't be used: No such file"):
        sink_of(1, tls=True, ca_file=tmp_path / "nope")
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(SinkSetupError, match=r"^sinks\.syslog: a certificate or key file can't be used: "):
        sink_of(1, tls=True, client_cert_file=tmp_path / "bad.pem")
