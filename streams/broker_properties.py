"""What the development broker's Java process is given: server.properties, logging.properties, a secure listener."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

HOST: Final = "127.0.0.1"


@dataclass(frozen=True)
class SecureListener:
    """A second port: TLS, and SCRAM-SHA-512 for one user. For tests; the settings file holds the password."""

    certificate_file: Path
    """Chain and key, PEM (PKCS #8, not encrypted)."""
    user: str
    password: str = field(repr=False)
    client_ca_file: Path | None = None
    """Clients must show a certificate that this CA signed."""


LOGGING: Final = """\
handlers=java.util.logging.FileHandler
.level=INFO
java.util.logging.FileHandler.pattern={logs}/broker.%g.log
java.util.logging.FileHandler.limit={limit}
java.util.logging.FileHandler.count=3
java.util.logging.FileHandler.append=true
java.util.logging.FileHandler.formatter=java.util.logging.SimpleFormatter
java.util.logging.SimpleFormatter.format=%1$tF %1$tT.%1$tL %4$s %3$s %5$s%6$s%n
"""

# Short sessions, so that a broker killed and started again serves within seconds; small buffers, for many side by side.
SETTINGS: Final = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
log.message.timestamp.type=LogAppendTime
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
num.network.threads=2
num.io.threads=4
background.threads=2
log.cleaner.dedupe.buffer.size=16777216
"""


SECURE_SETTINGS: Final = """\
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL
listener.name.sasl_ssl.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.ssl.keystore.type=PEM
listener.name.sasl_ssl.ssl.keystore.location={certificate}
listener.name.sasl_ssl.ssl.client.auth={client_auth}
"""


def secured(settings: str, secure: SecureListener, port: int) -> str:
    """The settings with the secure listener beside the plain one."""
    lines = []
    for line in settings.splitlines():
        key, _, value = line.partition("=")
        listens = key in ("listeners", "advertised.listeners")
        lines.append(f"{key}={value},SASL_SSL://{HOST}:{port}" if listens else line)
    client_auth = "none" if secure.client_ca_file is None else "required"
    more = SECURE_SETTINGS.format(certificate=secure.certificate_file, client_auth=client_auth)
    if secure.client_ca_file is not None:
        more += "listener.name.sasl_ssl.ssl.truststore.type=PEM\n"
        more += f"listener.name.sasl_ssl.ssl.truststore.location={secure.client_ca_file}\n"
    return "\n".join([*lines, more])
