"""What `[kafka]` may say, the table of topics, and secrets that never show."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from collector.kafka import KafkaConfig, TopicSpec, client_options, topic_specs

DAY_MS = 86_400_000
APPEND_TIME = {"message.timestamp.type": "LogAppendTime", "unclean.leader.election.enable": "false"}


def test_topic_table() -> None:
    """The development topics are those of the published table, to the last setting."""
    spec = {
        name: TopicSpec(f"iw.{name}", partitions, 1, APPEND_TIME | {"max.message.bytes": str(size)} | clean_up)
        for name, partitions, size, clean_up in (
            ("events", 4, 262_144, {"cleanup.policy": "delete", "retention.ms": str(7 * DAY_MS)}),
            ("rollups", 4, 1_048_576, {"cleanup.policy": "delete", "retention.ms": str(3 * DAY_MS)}),
            ("commands", 4, 262_144, {"cleanup.policy": "delete", "retention.ms": str(400 * DAY_MS)}),
            ("findings", 4, 1_048_576, {"cleanup.policy": "delete", "retention.ms": str(90 * DAY_MS)}),
            ("deadletter", 1, 262_144, {"cleanup.policy": "delete", "retention.ms": str(30 * DAY_MS)}),
            ("status", 1, 262_144, {"cleanup.policy": "compact"}),
        )
    }
    assert {s.name: s for s in topic_specs(KafkaConfig())} == {s.name: s for s in spec.values()}


def test_production_topics_are_replicated() -> None:
    """In production every topic has three replicas, two of them in sync, and the table's partition counts."""
    specs = topic_specs(KafkaConfig(), scale="prod")
    assert {s.name: (s.partitions, s.replication, s.configs["min.insync.replicas"]) for s in specs} == {
        "iw.events": (64, 3, "2"),
        "iw.rollups": (16, 3, "2"),
        "iw.commands": (16, 3, "2"),
        "iw.findings": (8, 3, "2"),
        "iw.deadletter": (4, 3, "2"),
        "iw.status": (1, 3, "2"),
    }


def test_partition_counts_can_be_set() -> None:
    """A count in the config wins, and commands follow rollups."""
    config = KafkaConfig(partitions={"events": 12, "rollups": 2})
    assert [config.count("events"), config.count("rollups"), config.count("commands")] == [12, 2, 2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bootstrap_servers": "kafka"}, "'kafka' is not HOST:PORT"),
        ({"bootstrap_servers": "a:9092,b:99999"}, "'b:99999' is not HOST:PORT"),
        ({"security_protocol": "SASL_SSL"}, "needs sasl_username"),
        (
            {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "u"},
            "shows the password to the network",
        ),
        ({"tls_cert_file": "/x.pem"}, "tls_cert_file and tls_key_file go together"),
        ({"partitions": {"commands": 3}}, "partitions.commands must equal partitions.rollups"),
        ({"partitions": {"evnets": 3}}, "partitions.evnets"),
        ({"topic_prefix": "a.b c"}, "topic_prefix"),
        ({"bootstrap": "x:1"}, "bootstrap"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], sentence: str) -> None:
    """A setting that can't work is refused with what is wrong with it."""
    with pytest.raises(ValidationError, match=sentence):
        KafkaConfig(**settings)


def test_password_never_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password reaches the client from a file or the environment, and no repr, dump or error."""
    secret = "correct-horse-battery"
    file = tmp_path / "password"
    file.write_text(secret + "\n")
    config = KafkaConfig(security_protocol="SASL_SSL", sasl_username="iw", sasl_password_file=file)
    assert client_options(config)["sasl_plain_password"] == secret
    monkeypatch.setenv("INFERWATCH_KAFKA_PASSWORD", secret)
    by_environment = config.model_copy(update={"sasl_password_file": None})
    assert by_environment.password().get_secret_value() == secret
    for shown in (config, by_environment, config.password(), config.model_dump(), config.model_dump_json()):
        assert secret not in repr(shown) + str(shown)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_missing_password_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    """A password file that is absent, empty or not text is named."""
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    config = KafkaConfig(security_protocol="SASL_SSL", sasl_username="iw", sasl_password_file=file)
    with pytest.raises(ValueError, match=r"kafka\.sasl_password_file .*password"):
        client_options(config)
