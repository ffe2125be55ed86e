"""Reaching the brokers: what every client is given to connect and log in, and the wait for the first answer.

One table, `[kafka]`, for all of them. Where TLS or the login fails the sentence says what to change and holds no
secret. With `collector/kafka.py`, `collector/admin.py` and `streams/transport.py` the only files that import aiokafka.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)

from collector.topics import KafkaConfig


class BrokerAway(ConnectionError):
    """No broker answered in time. What was not acknowledged is still the caller's to send."""


class LoginRefused(BrokerAway):
    """TLS or the login failed in a way that waiting won't mend; the message says what to change."""


def client_options(config: KafkaConfig) -> dict[str, Any]:
    """What every aiokafka client is given, the password too: never log it. Raises ValueError on an unreadable file."""
    options: dict[str, Any] = {
        "bootstrap_servers": config.bootstrap_servers,
        "request_timeout_ms": config.request_timeout_ms,
        "security_protocol": config.security_protocol,
    }
    if config.security_protocol.endswith("SSL"):
        options["ssl_context"] = _tls(config)
    if config.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": config.sasl_mechanism,
            "sasl_plain_username": config.sasl_username,
            "sasl_plain_password": config.password().get_secret_value(),
        }
    return options


def _tls(config: KafkaConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.tls_ca_file)
        if config.tls_cert_file is not None:
            # An empty password: an encrypted key fails here at once instead of asking on the terminal.
            context.load_cert_chain(config.tls_cert_file, config.tls_key_file, password="")
    except OSError as error:  # ssl.SSLError is one of these
        files = ", ".join(str(f) for f in (config.tls_ca_file, config.tls_cert_file, config.tls_key_file) if f)
        raise ValueError(f"cannot use the TLS files of [kafka] ({files}): {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _servers(config: KafkaConfig) -> list[tuple[str, int]]:
    parts = [server.strip().rpartition(":") for server in config.bootstrap_servers.split(",")]
    return [(host.strip("[]"), int(port)) for host, _, port in parts]


_CERTIFICATE_FAULTS: Final = {
    9: "is not valid yet: check the clocks",
    10: "has expired: renew it",
    62: "is for another host name: name the broker in kafka.bootstrap_servers as its certificate does",
    64: "is for another address: name the broker in kafka.bootstrap_servers as its certificate does",
}
"""By OpenSSL's X509_V_ERR numbers."""


def _refusal(config: KafkaConfig, error: Exception) -> str | None:
    """Why waiting won't help, and what to do; None where it may help. Never holds a password."""
    said: str | None = None
    if isinstance(error, ssl.SSLCertVerificationError):
        ca = f"the CA in {config.tls_ca_file}" if config.tls_ca_file else "a CA that this system knows"
        unknown = f"is not signed by {ca} ({error.verify_message}): set kafka.tls_ca_file"
        said = f"its certificate {_CERTIFICATE_FAULTS.get(error.verify_code, unknown)}"
    elif isinstance(error, UnsupportedSaslMechanismError):
        said = f"it does not offer {config.sasl_mechanism}: change kafka.sasl_mechanism"
    elif isinstance(error, AuthenticationFailedError | SaslAuthenticationFailed):
        said = f"authentication of {config.sasl_username!r} failed: check kafka.sasl_username and its password"
    return said


async def wait_for_broker(config: KafkaConfig, timeout_s: float = 10.0) -> None:
    """Return once a broker answers as a broker; raise BrokerAway with the last reason after `timeout_s` seconds.

    Raises LoginRefused at once where TLS or the login is what fails, at every one of the servers.
    """
    options = client_options(config)
    del options["bootstrap_servers"]
    reason = "no answer"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                refusals = []
                servers = _servers(config)
                for host, port in servers:
                    try:
                        connection = await create_conn(host, port, client_id="inferwatch-wait", **options)
                        await connection.close()
                        async with admin_client(config) as admin:
                            if (await admin.describe_cluster())["brokers"]:
                                return
                        reason = "it names no brokers yet"
                    except (KafkaError, OSError, TimeoutError) as error:
                        reason = str(error) or type(error).__name__
                        if refusal := _refusal(config, error):
                            refusals.append(f"no Kafka at {host}:{port} for us: {refusal}")
                if len(refusals) == len(servers):
                    raise LoginRefused(refusals[0])
                await asyncio.sleep(0.1)
    except TimeoutError:
        hint = _hint(config, reason)
        raise BrokerAway(f"no Kafka at {config.bootstrap_servers} after {timeout_s:g} s: {reason}{hint}") from None


def _hint(config: KafkaConfig, reason: str) -> str:
    """A server that hangs up gives no reason; this is the likely one."""
    if not re.search("closed|reset", reason, re.IGNORECASE):
        return ""
    certificate = ", and whether it wants kafka.tls_cert_file" if config.security_protocol.endswith("SSL") else ""
    return f" (it hangs up: check kafka.security_protocol = {config.security_protocol!r}{certificate})"


@asynccontextmanager
async def admin_client(config: KafkaConfig) -> AsyncIterator[AIOKafkaAdminClient]:
    """For topics and groups; raises KafkaError."""
    admin = AIOKafkaAdminClient(client_id="inferwatch-admin", **client_options(config))
    try:
        await admin.start()
        yield admin
    finally:
        await admin.close()
