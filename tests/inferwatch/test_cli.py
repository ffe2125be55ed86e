"""The command line as a person meets it: help with an example, and one sentence for each thing that goes wrong."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inferwatch.cli import app

COMMANDS = (
    ("broker",), ("serve",), ("detect",), ("deliver",), ("store",), ("up",), ("demo",), ("status",), ("version",),
    ("backtest",),
    ("config", "check"), ("config", "example"), ("keys", "create"), ("keys", "api"), ("keys", "operator"),
    ("keys", "renew"), ("keys", "revoke"), ("keys", "epochs"), ("keys", "rotate"), ("keys", "shred"), ("lookup",),
    ("record",), ("dashboards", "export"), ("guards", "check"), ("guards", "train"), ("guards", "bank"),
    ("doctor",),
)  # fmt: skip


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`inferwatch ARGUMENTS` in a folder of its own, without the shell's own settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("INFERWATCH_")}
    return subprocess.run(
        [sys.executable, "-m", "inferwatch.cli", *arguments],
        cwd=folder,
        env={**clean, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def config(folder: Path, text: str) -> str:
    """A configuration file's path."""
    file = folder / "inferwatch.toml"
    file.write_text(text)
    return str(file)


@pytest.fixture
def taken_port() -> int:
    """A port that somebody listens on until the test ends."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    yield sock.getsockname()[1]
    sock.close()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example(command: tuple[str, ...]) -> None:
    """`--help` ends well and shows how the command is typed."""
    answer = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
    assert answer.exit_code == 0
    assert f"Example: inferwatch {' '.join(command)}" in answer.output


def said(answer: subprocess.CompletedProcess[str]) -> str:
    """The failure: exit status 1, nothing on standard output, no traceback."""
    assert answer.returncode == 1, answer
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    return answer.stderr.strip().splitlines()[-1]


def test_a_typo_in_the_config_is_named(tmp_path: Path) -> None:
    """The nearest right key stands in the sentence."""
    file = config(tmp_path, "[kafka]\ntopic_prefx = 'x'\n")
    expected = f"inferwatch: {file}: unknown key 'topic_prefx' in [kafka]; did you mean 'topic_prefix'?"
    assert said(run("config", "check", "-c", file, folder=tmp_path)) == expected


@pytest.mark.parametrize("command", [("detect", "--stage", "1"), ("detect", "--stage", "2"), ("deliver",), ("store",)])
def test_a_broker_that_is_away_is_one_sentence(command: tuple[str, ...], tmp_path: Path) -> None:
    """Every role names the address it tried, and leaves within its time-out."""
    text = "[kafka]\nbootstrap_servers = '127.0.0.1:1'\n[streams]\nbroker_timeout_s = 0.5\n[sinks.file]\npath = 'f'\n"
    sentence = said(run(*command, "-c", config(tmp_path, text), folder=tmp_path))
    assert sentence.startswith("inferwatch: no Kafka at 127.0.0.1:1 after 0.5 s")


def test_a_taken_port_is_named_by_the_broker(tmp_path: Path, taken_port: int) -> None:
    """Which port, and which setting."""
    sentence = said(run("broker", "-c", config(tmp_path, f"[broker]\nport = {taken_port}\n"), folder=tmp_path))
    assert f"port {taken_port} of 127.0.0.1 is taken" in sentence
    assert "broker.port" in sentence


def test_delivery_without_a_sink_says_what_to_add(tmp_path: Path) -> None:
    """It does not idle in silence."""
    expected = "inferwatch: no sink is configured: add [sinks.file], [sinks.webhook] or [sinks.syslog]"
    assert said(run("deliver", "-c", config(tmp_path, ""), folder=tmp_path)) == expected


def test_a_missing_secret_file_is_named(tmp_path: Path) -> None:
    """The webhook's secret is looked for before Kafka is asked."""
    text = "[sinks.webhook]\nurl = 'http://127.0.0.1:9/'\nsecret_files = ['no-such.secret']\n"
    assert "no-such.secret" in said(run("deliver", "-c", config(tmp_path, text), folder=tmp_path))


def test_an_engine_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """The choices stand in the sentence."""
    sentence = said(run("demo", "--engine", "ollama", folder=tmp_path))
    assert sentence == "inferwatch: --engine ollama: use vllm, replay or auto"


def test_serving_without_a_config_is_refused(tmp_path: Path) -> None:
    """An unwatched server is not started by accident."""
    assert "no such configuration file" in said(run("serve", "model", folder=tmp_path))


def test_keys_are_made_and_shown_once(tmp_path: Path) -> None:
    """The tenant's key file; then an API key on standard output alone, so that it can be piped."""
    file = config(tmp_path, "[collector.identity]\nkey_dir = 'keys'\napi_keys_file = 'api.toml'\n")
    assert run("keys", "create", "-c", file, folder=tmp_path).stdout == "Made keys/default.key\n"
    answer = run("keys", "api", "--user", "alice", "-c", file, folder=tmp_path)
    assert answer.returncode == 0
    assert answer.stdout.startswith("iw-")
    assert answer.stdout.strip() not in answer.stderr + (tmp_path / "api.toml").read_text()
