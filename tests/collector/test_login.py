"""Reaching the brokers: in time, and with one sentence where it fails. TLS and SCRAM are in streams/test_tls.py."""

import socket
import time
from pathlib import Path

import pytest

from collector.kafka import BrokerAway, KafkaConfig, client_options, wait_for_broker


def test_bad_tls_file_is_one_sentence(tmp_path: Path) -> None:
    """A CA file that holds no certificate is named."""
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ValueError, match=r"cannot use the TLS files of \[kafka\] .*ca\.pem"):
        client_options(KafkaConfig(security_protocol="SSL", tls_ca_file=tmp_path / "ca.pem"))


async def test_broker_away_within_the_timeout() -> None:
    """Where nobody listens, the wait ends in time with one sentence: where, how long, why."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        config = KafkaConfig(bootstrap_servers=f"127.0.0.1:{taken.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(
            BrokerAway, match=rf"no Kafka at {config.bootstrap_servers} after 0\.5 s: .*refused|Connect"
        ):
            await wait_for_broker(config, 0.5)
        assert time.monotonic() - started_s < 2


async def test_silent_server_is_away_within_the_timeout() -> None:
    """A server that accepts and never answers is no broker."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = KafkaConfig(bootstrap_servers=f"127.0.0.1:{silent.getsockname()[1]}")
        started_s = time.monotonic()
        with pytest.raises(BrokerAway, match=r"after 0\.5 s"):
            await wait_for_broker(config, 0.5)
        assert time.monotonic() - started_s < 2
