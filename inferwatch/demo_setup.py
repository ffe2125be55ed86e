"""What a demo needs before it can start: a folder, free ports, keys, a configuration, and an engine if there is one."""

import base64
import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from collector.identity import create_key_file
from inferwatch.keys import add_api_key

MODEL: Final = "tiny"
TENANT: Final = "default"
# Small, since the demo is: windows of seconds instead of minutes, and an episode closes after half a minute of quiet.
DETECT: Final = """\
[detect.latency]
window_s = 5
min_calls = 20

[detect.lifecycle]
quiet_s = 30
update_s = 5
"""


@dataclass(frozen=True)
class Setup:
    """The demo's folder and addresses. `api_key` is for the demo's own clients."""

    folder: Path
    config_file: Path
    kafka_port: int
    view_port: int
    face_port: int
    engine_port: int
    api_key: str

    def __repr__(self) -> str:
        return f"Setup({self.folder})"


def prepare(folder: Path, *, webhook_url: str, webhook_secret: str, with_engine: bool, view_port: int = 0) -> Setup:
    """Writes keys and `inferwatch.toml` into `folder`. Ports are free when looked at."""
    kafka, view, face, engine = free_ports(4)
    keys, api_keys = folder / "keys", folder / "api-keys.toml"
    create_key_file(keys / f"{TENANT}.key")
    api_key, _ = add_api_key(api_keys, tenant=TENANT, user="demo", on_behalf=True)
    secret_file = folder / "webhook.secret"
    secret_file.touch(mode=0o600)
    secret_file.write_text(webhook_secret)
    setup = Setup(folder, folder / "inferwatch.toml", kafka, view_port or view, face, engine, api_key)
    setup.config_file.write_text(
        f"""\
data_dir = "{folder}"

[broker]
port = {kafka}
data_dir = "{folder}/kafka"

[kafka]
bootstrap_servers = "127.0.0.1:{kafka}"

[collector]
collector_id = "demo"

[collector.identity]
key_dir = "{keys}"
api_keys_file = "{api_keys}"

[collector.journal]
dir = "{folder}/journal"

{DETECT if with_engine else ""}
[sinks.file]
path = "{folder}/findings.ocsf.jsonl"

[sinks.webhook]
url = "{webhook_url}"
secret_files = ["{secret_file}"]

[store]
url = "{folder}/store"

[store.face]
port = {face}

[dashboards]
port = {setup.view_port}
refresh_s = 5
default_range = "15m"
"""
    )
    return setup


def webhook_secret() -> str:
    """A secret in the form that Standard Webhooks gives them."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def engine_python() -> Path | None:
    """The interpreter that has vLLM: `INFERWATCH_ENGINE_PYTHON`, `.venv-engine` here, or this one; None without any."""
    named = os.environ.get("INFERWATCH_ENGINE_PYTHON")
    for candidate in (named and Path(named), Path(".venv-engine/bin/python").absolute()):
        if candidate and candidate.exists() and (candidate.parent.parent / ".made").exists():
            return candidate
    return Path(sys.executable) if find_spec("vllm") is not None else None


def engine_environment() -> dict[str, str]:
    """Settings for a small CPU: measured in docs/decisions.md."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def engine_command(python: Path, setup: Setup, model_dir: Path) -> list[str]:
    """`inferwatch serve` on the tiny model."""
    return [
        *(str(python), "-m", "inferwatch.cli", "serve", "--config", str(setup.config_file), str(model_dir)),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(setup.engine_port)),
        *("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"),
        *("--distributed-executor-backend", "uni", "--shutdown-timeout", "10"),
    ]


def write_tiny_model(python: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Starts writing the tiny random model with transformers, in the engine's environment."""
    command = [str(python), "-m", "inferwatch.tiny_model", str(folder)]
    return subprocess.Popen(  # noqa: S603  # our own command
        command, env={**os.environ, **engine_environment()}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
