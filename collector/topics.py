"""What `[kafka]` says: where the brokers are, how to log in, and the table of topics. Loads nothing of Kafka itself.

Every room takes these names from `collector.kafka`; they stand apart so that reading a configuration costs little.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from collector.event import EVENT_BYTES_MAX

TopicName = Literal["events", "rollups", "commands", "findings", "deadletter", "status"]
Scale = Literal["dev", "prod"]
Partitions = Annotated[int, Field(ge=1, le=1024)]

_DAY_MS: Final = 86_400_000
_KIB: Final = 1024


class KafkaConfig(BaseModel):
    """`[kafka]` in inferwatch.toml. Secrets are named by file or environment variable, never written here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bootstrap_servers: str = Field("127.0.0.1:9092", description="HOST:PORT of one or more brokers, comma between")
    topic_prefix: str = Field("iw", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="Topics are PREFIX.NAME")
    scale: Scale = Field("dev", description="Partition counts and replication: dev (one broker) or prod (three)")
    partitions: dict[TopicName, Partitions] = Field({}, description="Partition counts other than the scale's")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str = Field("", max_length=256, description="User name for the SASL protocols")
    sasl_password_file: Path | None = Field(None, description="File that holds the password and nothing else")
    sasl_password_env: str = Field("INFERWATCH_KAFKA_PASSWORD", description="Or the variable that holds it")
    tls_ca_file: Path | None = Field(None, description="CA certificates, PEM; without it the system's")
    tls_cert_file: Path | None = Field(None, description="Client certificate, PEM, for mutual TLS")
    tls_key_file: Path | None = Field(None, description="Its key, PEM, not encrypted, readable by this user only")
    request_timeout_ms: int = Field(10_000, ge=500, le=300_000, description="For one request to a broker")
    deadletter_key_file: Path | None = Field(
        None,
        description="128 hex digits (openssl rand -hex 64); seals the bytes of dead letters; else not kept",
    )

    @field_validator("bootstrap_servers")
    @classmethod
    def _check_servers(cls, value: str) -> str:
        for server in value.split(","):
            host, _, port = server.strip().rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"{server.strip()!r} is not HOST:PORT")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        sasl = self.security_protocol.startswith("SASL")
        if sasl and not self.sasl_username:
            raise ValueError(f"security_protocol = {self.security_protocol!r} needs sasl_username")
        if self.security_protocol == "SASL_PLAINTEXT" and self.sasl_mechanism == "PLAIN":
            raise ValueError("PLAIN over SASL_PLAINTEXT shows the password to the network: use SASL_SSL or SCRAM")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together")
        if self.partitions.get("commands", self.count("rollups")) != self.count("rollups"):
            raise ValueError("partitions.commands must equal partitions.rollups: both are keyed by tenant")
        return self

    def count(self, name: TopicName) -> int:
        """How many partitions the topic is created with."""
        default = "rollups" if name == "commands" else name
        return self.partitions.get(name, self.partitions.get(default, _TABLE[name].partitions[self.scale]))

    def topic(self, name: TopicName) -> str:
        """The topic's full name: `topic("events")` is `iw.events`."""
        return f"{self.topic_prefix}.{name}"

    def password(self) -> SecretStr:
        """The SASL password. Raises ValueError with one sentence where there is none."""
        if self.sasl_password_file is None:
            secret = os.environ.get(self.sasl_password_env, "")
            where = f"the environment variable {self.sasl_password_env} is not set"
        else:
            try:
                secret = self.sasl_password_file.read_text(encoding="utf-8").strip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"cannot read kafka.sasl_password_file {self.sasl_password_file}: {error}") from None
            where = f"kafka.sasl_password_file {self.sasl_password_file} is empty"
        if not secret:
            raise ValueError(f"no Kafka password for {self.sasl_username!r}: {where}")
        return SecretStr(secret)


class TopicSpec(NamedTuple):
    """A topic as it is created."""

    name: str
    partitions: int
    replication: int
    configs: Mapping[str, str]


class _Row(NamedTuple):
    partitions: Mapping[Scale, int]
    retention_days: int | None
    """None: compacted, the last record of each key stays."""
    record_bytes_max: int


_TABLE: Final[Mapping[TopicName, _Row]] = {
    "events": _Row({"dev": 4, "prod": 64}, 7, EVENT_BYTES_MAX),
    "rollups": _Row({"dev": 4, "prod": 16}, 3, 1024 * _KIB),
    "commands": _Row({"dev": 4, "prod": 16}, 400, 256 * _KIB),
    "findings": _Row({"dev": 4, "prod": 8}, 90, 1024 * _KIB),
    "deadletter": _Row({"dev": 1, "prod": 4}, 30, 256 * _KIB),
    "status": _Row({"dev": 1, "prod": 1}, None, 256 * _KIB),
}


def _spec(name: str, partitions: int, scale: Scale, configs: Mapping[str, str]) -> TopicSpec:
    kept = {"message.timestamp.type": "LogAppendTime", "unclean.leader.election.enable": "false"}
    if scale == "prod":
        kept["min.insync.replicas"] = "2"
    return TopicSpec(name, partitions, 3 if scale == "prod" else 1, kept | dict(configs))


def topic_specs(config: KafkaConfig, *, scale: Scale | None = None) -> list[TopicSpec]:
    """All topics of inferwatch, as the table of topics in the documentation says."""
    scaled = config if scale is None else config.model_copy(update={"scale": scale})
    specs = []
    for name, row in _TABLE.items():
        configs = {"max.message.bytes": str(row.record_bytes_max), "cleanup.policy": "compact"}
        if row.retention_days is not None:
            configs |= {"cleanup.policy": "delete", "retention.ms": str(row.retention_days * _DAY_MS)}
        specs.append(_spec(config.topic(name), scaled.count(name), scaled.scale, configs))
    return specs


def changelog_spec(config: KafkaConfig, name: str, partitions: int) -> TopicSpec:
    """The topic behind a Faust table: compacted often and in small segments, so that recovery reads little."""
    configs = {
        "cleanup.policy": "compact",
        "max.message.bytes": str(1024 * _KIB),
        "segment.bytes": str(64 * _KIB * _KIB),
        "min.cleanable.dirty.ratio": "0.1",
    }
    return _spec(name, partitions, config.scale, configs)
