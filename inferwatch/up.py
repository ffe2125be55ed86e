"""`inferwatch up`: everything but the inference server, on one machine, until Ctrl-C."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

import typer

from inferwatch.config import Config, load
from inferwatch.processes import Child, Supervisor, inferwatch_child

BROKER_START_S: Final = 180.0
"""The first start fetches Kafka's jars."""
ROLE_START_S: Final = 60.0


def broker_is_ours(config: Config) -> bool:
    """Whether `[kafka]` points at the broker that `[broker]` would start here."""
    return config.kafka.bootstrap_servers == f"127.0.0.1:{config.broker.port}"


def broker_child(config: Config, config_file: Path) -> Child:
    """The development broker; it serves once its run file is there."""
    run_file = config.broker.data_dir / "broker.json"
    run_file.unlink(missing_ok=True)
    child = inferwatch_child("broker", ["broker"], config=config_file, data_dir=config.data_dir)
    child.probe = run_file.exists
    return child


def analysis_children(config: Config, config_file: Path) -> list[Child]:
    """Store, both stages, and delivery where a sink is configured."""
    roles: dict[str, Sequence[str]] = {
        "store": ["store"],
        "detect-1": ["detect", "--stage", "1"],
        "detect-2": ["detect", "--stage", "2"],
    }
    if config.sinks.names:
        roles["deliver"] = ["deliver"]
    return [
        inferwatch_child(r, arguments, config=config_file, data_dir=config.data_dir) for r, arguments in roles.items()
    ]


def run_up(config_file: Path | None) -> None:
    """Starts everything, watches it, and stops it at SIGINT or SIGTERM."""
    config = load(config_file)
    file = (config_file or Path("inferwatch.toml")).resolve()
    supervisor = Supervisor([])
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        if broker_is_ours(config):
            supervisor.start(broker_child(config, file), wait_s=BROKER_START_S)
            typer.echo(f"Kafka serves at {config.kafka.bootstrap_servers}")
        for child in analysis_children(config, file):
            supervisor.start(child)
        for child in supervisor.children:
            child.wait_ready(ROLE_START_S)
            typer.echo(f"{child.role} is ready")
        typer.echo(f"The view: http://{config.dashboards.host}:{config.dashboards.port}/  (Ctrl-C stops everything)")
        while not stopping:
            supervisor.watch_once()
            time.sleep(0.5)
    finally:
        supervisor.stop()
