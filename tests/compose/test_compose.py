"""The files for Docker, Grafana and production Kafka: well formed, on loopback, free of secrets, true to the code."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import yaml

from collector.kafka import KafkaConfig, topic_specs
from dashboards.config import DashboardsConfig
from streams.broker import KAFKA_VERSION

COMPOSE = Path(__file__).parent.parent.parent / "compose"
FILES = yaml.safe_load((COMPOSE / "compose.yaml").read_text())


def _properties(file: Path) -> dict[str, str]:
    lines = [line.strip() for line in file.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_every_port_is_on_loopback() -> None:
    """No service is reachable from another machine."""
    ports = {name: service["ports"] for name, service in FILES["services"].items()}
    assert ports == {
        "kafka": ["127.0.0.1:9092:9092"],
        "clickhouse": ["127.0.0.1:8123:8123"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_every_mounted_file_exists_and_every_service_is_bounded() -> None:
    """Mounts name files of this folder, and each service has a memory limit and a pinned version."""
    for service in FILES["services"].values():
        assert "mem_limit" in service
        assert re.fullmatch(r"[a-z/-]+:[0-9.]+", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in FILES["volumes"] or (COMPOSE / source).exists(), source
    assert FILES["services"]["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"


def test_secrets_come_from_the_environment() -> None:
    """Every password is a variable that must be set; no file holds one."""
    for service in FILES["services"].values():
        for name, value in service["environment"].items():
            if "PASSWORD" in name:
                assert re.fullmatch(r"\$\{INFERWATCH_[A-Z_]+:\?set a password for [^}]+\}", value), name
    users = ET.parse(COMPOSE / "clickhouse/users.d/inferwatch.xml").getroot().find("users")  # noqa: S314 (our own file)
    assert users is not None
    passwords = {user.tag: user.find("password") for user in users if user.tag != "default"}
    assert {user: p.attrib for user, p in passwords.items() if p is not None and not p.text} == {
        "inferwatch": {"from_env": "INFERWATCH_CLICKHOUSE_PASSWORD"},
        "grafana": {"from_env": "INFERWATCH_GRAFANA_READER_PASSWORD"},
    }
    ET.parse(COMPOSE / "clickhouse/config.d/inferwatch.xml")  # noqa: S314 (our own file)


def test_grafana_reads_what_the_dashboards_name() -> None:
    """The provisioned data source has the uid that the dashboards are made with, and reads as the reader."""
    (source,) = yaml.safe_load((COMPOSE / "grafana/provisioning/datasources/inferwatch.yaml").read_text())[
        "datasources"
    ]
    assert source["uid"] == DashboardsConfig().grafana_datasource_uid
    assert source["jsonData"]["username"] == "grafana"
    (provider,) = yaml.safe_load((COMPOSE / "grafana/provisioning/dashboards/inferwatch.yaml").read_text())["providers"]
    mounts = [volume.split(":") for volume in FILES["services"]["grafana"]["volumes"]]
    assert ["./grafana/dashboards", provider["options"]["path"], "ro"] in mounts


def test_production_settings_agree_with_the_topics() -> None:
    """What production brokers are told is what `scale = "prod"` creates topics with."""
    settings = _properties(COMPOSE / "kafka/production.properties")
    for spec in topic_specs(KafkaConfig(), scale="prod"):
        assert settings["default.replication.factor"] == str(spec.replication)
        assert settings["min.insync.replicas"] == spec.configs["min.insync.replicas"]
        assert settings["unclean.leader.election.enable"] == spec.configs["unclean.leader.election.enable"]
        assert settings["log.message.timestamp.type"] == spec.configs["message.timestamp.type"]
