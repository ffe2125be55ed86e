"""One real engine for the session, under vLLM's real OpenAI app, behind the gate, served by uvicorn on a loopback port.

Run with the engine's environment: `.venv-engine/bin/python -m pytest tests/engine`. Where vLLM is not installed, every
test here is skipped by name.
"""

import asyncio
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    TORCH_COMPILE_DISABLE="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

from collector.event import AuditEvent, decode
from collector.guards.config import GuardsConfig
from collector.guards.protocol import Judgement, Probe
from collector.guards.secrets import SecretsConfig
from collector.guards.stack import GuardStack
from collector.identity import create_key_file
from collector.kafka import KafkaConfig, make_consumer
from inferwatch.keys import add_api_key
from tests.engine.tiny_adapter import write_tiny_adapter

MODEL = "tiny"
ADAPTER = "support"
FLAGS = [
    *("--served-model-name", MODEL, "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "16"),
    *("--enforce-eager", "--distributed-executor-backend", "uni"),
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test here, and skips it where there is no vLLM."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed in this environment"))


class SwitchGuard:
    """Blocks what holds the word `blockme`, and answers while `block_output` is set. Stands in for a model."""

    name = "secrets"
    version = "test"
    stages = frozenset({"input", "tool", "retrieved", "output"})
    labels = frozenset({"switch"})
    probes = (Probe("blockme", "input", block=True), Probe("fine", "input", block=False))

    def __init__(self) -> None:
        self.block_output = False
        self.fail = False
        self.window_chars = 0
        """Above 0: judges answers in windows, and blocks when `passes` of them have passed."""
        self.passes = 1_000_000
        self.saw: list[tuple[str, str]] = []

    def judge(self, text: str, stage: str, context: object = None) -> Judgement:
        """The judgement."""
        self.saw.append((stage, text))
        if self.fail:
            raise RuntimeError(text)
        bad = self.block_output if stage == "output" else "blockme" in text
        if stage == "output" and self.window_chars:
            self.passes -= 1
            bad = bad or self.passes < 0
        return Judgement(0.9 if bad else 0.1, "switch" if bad else "", bad)


@dataclass
class Site:
    """The files of one collector: keys, configuration, journal."""

    folder: Path
    kafka: KafkaConfig
    api_key: str = field(repr=False)
    proxy_key: str = field(repr=False)
    config_file: Path

    def records(self) -> list[Any]:
        """Everything on the events topic now, in order of partition and offset."""
        return asyncio.run(_read_all(self.kafka))

    def raw_topics(self) -> bytes:
        """All bytes, keys too, of every topic."""
        return asyncio.run(_read_raw(self.kafka))

    def logs(self) -> dict[int, list[tuple[bytes, int, int]]]:
        """By partition: bytes, append time (ms) and offset of each record on the events topic."""
        found: dict[int, list[tuple[bytes, int, int]]] = {}
        for message in asyncio.run(_messages(self.kafka, "events")):
            found.setdefault(message.partition, []).append((message.value, message.timestamp, message.offset))
        return found

    def events(self) -> list[AuditEvent]:
        """Events and rejections."""
        return [record for record in self.records() if isinstance(record, AuditEvent)]


async def _read_raw(kafka: KafkaConfig) -> bytes:
    return b"\n".join(
        [
            (m.key or b"") + b"\0" + (m.value or b"")
            for name in ("events", "status")
            for m in await _messages(kafka, name)
        ]
    )


async def _read_all(kafka: KafkaConfig) -> list[Any]:
    return [decode(message.value) for message in await _messages(kafka, "events")]


async def _messages(kafka: KafkaConfig, name: Any) -> list[Any]:
    consumer = make_consumer(kafka, kafka.topic(name), group_id=None)
    await consumer.start()
    try:
        while not (partitions := consumer.assignment()):  # noqa: ASYNC110 - the client gives no event for it
            await asyncio.sleep(0.02)
        ends = await consumer.end_offsets(partitions)
        found: list[Any] = []
        while any([await consumer.position(p) < end for p, end in ends.items()]):
            for batch in (await consumer.getmany(timeout_ms=500)).values():
                found += batch
        return sorted(found, key=lambda message: (message.partition, message.offset))
    finally:
        await consumer.stop()


def make_site(folder: Path, bootstrap: str, extra: str = "") -> Site:
    """Keys and a configuration in `folder`; topics that no other site sees."""
    kafka = KafkaConfig(bootstrap_servers=bootstrap, topic_prefix=f"e{uuid.uuid4().hex[:10]}")
    create_key_file(folder / "keys" / "default.key")
    api_key, _ = add_api_key(folder / "api-keys.toml", tenant="default", user="alice", on_behalf=False)
    proxy_key, _ = add_api_key(folder / "api-keys.toml", tenant="default", user="proxy", on_behalf=True)
    config_file = folder / "inferwatch.toml"
    config_file.write_text(
        f"""\
data_dir = "{folder}"
[kafka]
bootstrap_servers = "{bootstrap}"
topic_prefix = "{kafka.topic_prefix}"
[collector]
collector_id = "test"
[collector.identity]
key_dir = "{folder}/keys"
api_keys_file = "{folder}/api-keys.toml"
[collector.journal]
dir = "{folder}/journal"
{extra}
"""
    )
    return Site(folder, kafka, api_key, proxy_key, config_file)


@dataclass
class Server:
    """The running server of the session."""

    site: Site
    url: str
    guard: SwitchGuard
    auditor: Callable[[], Any]
    engine: Any
    app: Any
    run: Callable[[Any], Any]
    """Runs a coroutine on the server's event loop."""

    def mark(self) -> set[str]:
        """The ids of all events so far, those still on their way to Kafka included."""
        return {event.event_id for event in self.settled(0, set())}

    def settled(self, count: int, mark: set[str], timeout_s: float = 15) -> list[AuditEvent]:
        """The events since `mark` in order of time, once there are `count` and Kafka has everything."""
        end = time.monotonic() + timeout_s
        while True:
            counters = self.auditor().publisher.counters
            events = self.site.events()
            new = sorted((e for e in events if e.event_id not in mark), key=lambda e: (e.timestamp, e.event_id))
            complete = len(new) >= count and counters.events + counters.rejections == len(events)
            if complete or time.monotonic() > end:
                return new
            time.sleep(0.1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model."""
    from inferwatch.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / MODEL)


@pytest.fixture(scope="session")
def server(broker: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's engine, app, plugin and gate in this process; only its command line is left out."""
    site = make_site(tmp_path_factory.mktemp("site"), broker.bootstrap)
    os.environ["INFERWATCH_CONFIG"] = str(site.config_file)
    guard = SwitchGuard()
    import collector.startup

    def stack(_config: GuardsConfig) -> GuardStack:
        policy = SecretsConfig(stages=frozenset(SwitchGuard.stages))
        return GuardStack(GuardsConfig(order=("secrets",), secrets=policy, cache_entries=0), guards={"secrets": guard})

    collector.startup.GuardStack = stack  # type: ignore[assignment,misc]  # a guard that the tests can turn
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(300)

    engine, app, uvicorn_server, serving, port = run(_boot(model))
    from collector.engine.process import current

    yield Server(site, f"http://127.0.0.1:{port}", guard, lambda: current.auditor, engine, app, run)
    uvicorn_server.should_exit = True
    run(serving)
    engine.shutdown()
    loop.call_soon_threadsafe(loop.stop)


async def _boot(model: Path) -> tuple[Any, Any, Any, Any, int]:
    import uvicorn
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    from inferwatch.serve import vllm_arguments

    adapter = write_tiny_adapter(model.parent / ADAPTER, model)
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{ADAPTER}={adapter}"]
    line = vllm_arguments(["--model", str(model), *FLAGS, *lora, "--enable-scale-out"], {})
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    validate_parsed_serve_args(args)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # the CPU platform forces spawn; forking saves 15 s
    engine = AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER)
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="on"))
    app.state.server = server  # where vLLM looks for it when its engine has died
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        if serving.done():
            raise RuntimeError("the server did not start")
        await asyncio.sleep(0.02)
    return engine, app, server, _done(serving), port


async def _done(task: "asyncio.Future[None]") -> None:
    await task


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    """The official client with a good key."""
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.site.api_key, max_retries=0) as made:
        yield made


@pytest.fixture
def web(server: Server) -> Iterator[httpx.Client]:
    """Plain HTTP with a good key."""
    headers = {"authorization": f"Bearer {server.site.api_key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as made:
        yield made
