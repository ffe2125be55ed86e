"""`inferwatch proxy` as a real process on a real Kafka: what it was told is found in no output, however it ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.event import AuditEvent, Goodbye, decode
from collector.identity import create_key_file
from collector.kafka import KafkaConfig, read_topic
from collector.proxy_config import ProxyConfig
from inferwatch.keys import add_api_key
from inferwatch.proxy import proxy_config
from inferwatch.settings import ConfigError
from tests.collector.proxying import running
from tests.collector.publishing import wait
from tests.sim.ollama import Ollama

ROOT = Path(__file__).parent.parent.parent
CANARY = "canaryz4w8"


class Process:
    """One `inferwatch proxy` with its folder."""

    def __init__(self, folder: Path, bootstrap: str, upstream: str) -> None:
        self.folder = folder
        self.kafka = KafkaConfig(bootstrap_servers=bootstrap, topic_prefix=f"p{uuid.uuid4().hex[:10]}")
        if not (folder / "keys").exists():
            create_key_file(folder / "keys" / "default.key")
        self.key, _ = add_api_key(folder / "api-keys.toml", tenant="default", user="alice", on_behalf=True)
        (folder / "inferwatch.toml").write_text(
            f'data_dir = "{folder}"\n[kafka]\nbootstrap_servers = "{bootstrap}"\n'
            f'topic_prefix = "{self.kafka.topic_prefix}"\n[collector]\ncollector_id = "proxy-1"\n'
            f'[collector.identity]\nkey_dir = "{folder}/keys"\napi_keys_file = "{folder}/api-keys.toml"\n'
            f'[collector.journal]\ndir = "{folder}/journal"\n[collector.gate]\nmedia = "allow"\n'
        )
        self.upstream = upstream
        self.start()

    def start(self) -> None:
        """Starts it on a free port and waits until it serves."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-X", "faulthandler", "-m", "inferwatch.cli", "proxy", "--kind", "ollama"]
        command += ["--config", str(self.folder / "inferwatch.toml"), "--upstream", self.upstream, "--port", str(port)]
        with (self.folder / "proxy.log").open("ab") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        end_s = time.monotonic() + 240
        while time.monotonic() < end_s and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health", timeout=2).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.1)
            else:
                return
        pytest.fail(f"the proxy did not start: {(self.folder / 'proxy.log').read_text()[-2000:]}")

    def records(self) -> list[Any]:
        """Everything on the events topic."""
        return [decode(record.value) for record in asyncio.run(_read(self.kafka, "events"))]

    def outputs(self) -> dict[str, bytes]:
        """All that the process wrote anywhere: topics, log, journal, and whatever else lies in its folder."""
        found: dict[str, bytes] = {}
        for name in ("events", "status"):
            records = asyncio.run(_read(self.kafka, name))
            found[f"topic {name}"] = b"\0".join((r.key or b"") + b"\0" + (r.value or b"") for r in records)
        return found | {str(file): file.read_bytes() for file in self.folder.rglob("*") if file.is_file()}

    def end(self, by: signal.Signals) -> int:
        """Signals it and waits; the exit status."""
        self.process.send_signal(by)
        return self.process.wait(40)


async def _read(kafka: KafkaConfig, name: Any) -> list[Any]:
    return [record async for record in read_topic(kafka, name)]


@pytest.fixture(scope="module")
def upstream() -> Iterator[tuple[Ollama, str]]:
    """A slow Ollama."""
    app = Ollama()
    with running(app) as url:
        yield app, url


@pytest.fixture
def process(broker: Any, upstream: tuple[Ollama, str], tmp_path: Path) -> Iterator[Process]:
    """The proxy before it."""
    made = Process(tmp_path, broker.bootstrap, upstream[1])
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def say(process: Process) -> list[bytes]:
    """Put the canary wherever a client can; the answers that are the proxy's own."""
    good = {"authorization": f"Bearer {process.key}", "x-session-id": CANARY, "x-user-id": CANARY}
    context = {"traceparent": CANARY, "cookie": CANARY, "user-agent": CANARY, "x-anything": CANARY}
    image = f"http://{CANARY}/x.png"
    parts = [{"type": "text", "text": CANARY}, {"type": "image_url", "image_url": {"url": image}}]
    messages = [
        {"role": "system", "content": CANARY},
        {"role": "tool", "content": CANARY, "tool_name": CANARY},
        {"role": "user", "content": CANARY, "images": [CANARY]},
    ]
    with httpx.Client(base_url=process.url, headers={**good, **context}, timeout=30) as to:
        for stream in (False, True):
            body = {"model": "tiny", "messages": messages, "stream": stream, "user": CANARY, "session_id": CANARY}
            assert CANARY in to.post("/api/chat", json=body).text
        to.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": parts}]})
        to.post("/api/generate", json={"model": CANARY, "prompt": CANARY, "system": CANARY})
        own = [
            to.post("/api/chat", content=f'{{"model": "{CANARY}", "{CANARY}": '),
            to.post("/api/chat", json={"model": "tiny", "Messages": CANARY}),
            to.post(f"/{CANARY}", json={}),
            to.post("/api/generate", json={"model": f"{CANARY}:cloud", "prompt": CANARY}),
            to.post("/api/chat", json={"model": "tiny"}, headers={"authorization": f"Bearer {CANARY}"}),
            to.post("/api/chat", json={"model": "tiny"}, headers={"authorization": f"Bearer eyJ.{CANARY}.x"}),
            to.post("/api/chat", json={"model": "tiny"}, headers={"x-api-key": CANARY}),
            to.get(f"/api/tags?{CANARY}", headers={"authorization": CANARY}),
        ]
        return [answer.content + repr(answer.headers).encode() for answer in own]


@contextmanager
def in_flight(process: Process, upstream: Ollama) -> Iterator[None]:
    """A request that the server works on; its answer is held, so its head does not come."""
    before = len(upstream.bodies)
    headers = {"authorization": f"Bearer {process.key}"}
    body = {"model": "tiny", "prompt": CANARY, "system": CANARY}

    def ask() -> None:
        with suppress(httpx.HTTPError):
            httpx.post(f"{process.url}/api/generate", json=body, headers=headers, timeout=120)

    asking = threading.Thread(target=ask)
    asking.start()
    wait(lambda: "POST /api/generate" in [row for row, _ in upstream.bodies[before:]])
    yield
    asking.join(60)


@pytest.mark.parametrize(
    "by",
    [
        signal.SIGABRT,
        *(pytest.param(other, marks=pytest.mark.soak) for other in (signal.SIGTERM, signal.SIGSEGV, signal.SIGKILL)),
    ],
)
def test_no_word_of_a_client_is_in_any_output(
    process: Process, upstream: tuple[Ollama, str], by: signal.Signals
) -> None:
    """Answers of ours, events, status records, log with the traces of a crash, journal; and no core is written."""
    limits = Path(f"/proc/{process.process.pid}/limits").read_text()
    assert limits.partition("Max core file size")[2].split()[0] == "0"
    assert int(Path(f"/proc/{process.process.pid}/coredump_filter").read_text(), 16) == 0
    answers = say(process)
    assert [answer for answer in answers if CANARY.encode() in answer] == []
    upstream[0].pause_s, upstream[0].words = 0.2, 3_000
    with in_flight(process, upstream[0]):
        status = process.end(by)
    upstream[0].pause_s, upstream[0].words = 0.0, 0
    assert status == (0 if by is signal.SIGTERM else -by)
    log = (process.folder / "proxy.log").read_bytes()
    assert (b"Current thread" in log or b"most recent call first" in log) == (by in (signal.SIGABRT, signal.SIGSEGV))
    crashed = process.outputs()
    process.start()
    assert process.end(signal.SIGTERM) == 0
    written = crashed | {f"{name}, after the next start": raw for name, raw in process.outputs().items()}
    assert [name for name, raw in written.items() if CANARY.encode() in raw] == []
    events = [record for record in process.records() if isinstance(record, AuditEvent)]
    assert len({event.event_id for event in events}) == 13
    last = {event.event_id: event.status for event in events if event.route == "POST /api/generate"}
    assert sorted(last.values()) == sorted(["aborted" if by is signal.SIGTERM else "lost", "rejected", "rejected"])
    assert any(isinstance(record, Goodbye) for record in process.records())
    assert not [file for file in ROOT.glob("core*") if file.is_file()]


def test_a_proxy_without_a_server_behind_says_what_it_needs(tmp_path: Path) -> None:
    """One sentence, exit status 1."""
    command = [sys.executable, "-m", "inferwatch.cli", "proxy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=_environment())
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "--upstream" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"), [({"upstream": "http://x/path"}, "http://HOST:PORT"), ({"kind": "other"}, "--kind")]
)
def test_a_flag_that_can_not_be_used_is_one_sentence(flags: dict[str, str], said: str) -> None:
    """Which, and what it may be."""
    with pytest.raises(ConfigError, match=said):
        proxy_config(ProxyConfig(upstream="http://127.0.0.1:1"), flags)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
