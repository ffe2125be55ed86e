"""`inferwatch demo`: the whole pipe on one machine, with staged traffic and an honest count at the end.

Everything is the deployed path: a real broker, the Faust stages, chDB, delivery, and a real vLLM engine on a tiny
random model; or, without vLLM, a seeded day of events. Nothing is planted: the detectors start cold.
"""

import asyncio
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import orjson
import structlog
from rich.console import Console
from rich.table import Table

from collector.event import AuditEvent, decode, encode
from collector.kafka import BatchWriter, KafkaConfig, ensure_topics, make_producer, read_topic
from inferwatch import demo_setup, leaks, replay
from inferwatch.config import Config, load
from inferwatch.processes import Child, ProcessDied, Supervisor
from inferwatch.receiver import Receiver
from inferwatch.traffic import Traffic
from inferwatch.up import BROKER_START_S, ROLE_START_S, analysis_children, broker_child

DETECTORS: Final = ("block_rate", "probing", "latency", "token_length")
PSEUDONYM: Final = re.compile(r"\b([usak]_[0-9a-f]{6})[0-9a-f…]+")
CALM_S: Final = 60.0
ENGINE_START_S: Final = 300.0
SETTLE_S: Final = 45.0


class Leaked(RuntimeError):
    """Something that a client sent was found where only hashes may be."""


class Demo:
    """One run. Progress goes to `console`."""

    def __init__(self, setup: demo_setup.Setup, console: Console, seed: int) -> None:
        self.setup = setup
        self.config: Config = load(setup.config_file)
        self.console = console
        self.seed = seed
        self.supervisor = Supervisor([])
        self.began_s = time.monotonic()
        self.http_requests = 0
        self.canary = f"canary{secrets.token_hex(6)}"

    def say(self, what: str) -> None:
        """One line of progress, with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self.began_s:6.1f} s[/dim]  {what}")

    def start(self, python: Path | None) -> None:
        """Starts every process; the engine is the slowest, so it starts as soon as Kafka serves."""
        model_dir = self.setup.folder / "tiny-model"
        writing = demo_setup.write_tiny_model(python, model_dir) if python else None
        self.say("starting Apache Kafka (the first time ever it fetches 44 MB of jars)")
        self.supervisor.start(broker_child(self.config, self.setup.config_file), wait_s=BROKER_START_S)
        asyncio.run(_topics(self.config.kafka))
        if python is not None and writing is not None:
            if writing.wait(120):
                said = writing.stderr.read().decode(errors="replace") if writing.stderr else ""
                raise ProcessDied(f"the tiny model could not be written: {said.strip().splitlines()[-1:]}")
            engine = Child(
                role="engine",
                command=demo_setup.engine_command(python, self.setup, model_dir),
                data_dir=self.setup.folder,
                environment=demo_setup.engine_environment(),
                ready_path="/health",
                url=f"http://127.0.0.1:{self.setup.engine_port}",
            )
            self.say("starting a real vLLM engine on a tiny random model")
            self.supervisor.start(engine)
        children = analysis_children(self.config, self.setup.config_file)
        for child in children:
            self.supervisor.start(child)
        for child in children:
            child.wait_ready(ROLE_START_S)
        self.say("store, both Faust stages and delivery are ready")
        if python is not None:
            engine.wait_ready(ENGINE_START_S)
            self.say("the engine serves, with the collector inside")

    async def drive(self) -> None:
        """Sends the staged traffic to the engine."""
        traffic = Traffic(
            f"http://127.0.0.1:{self.setup.engine_port}/v1",
            self.setup.api_key,
            demo_setup.MODEL,
            seed=self.seed,
            canary=self.canary,
        )
        stages: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
            ("a calm background: 30 people chat, complete and stream", lambda: traffic.calm(CALM_S)),
            ("campaign: many users send attack prompts that are blocked", traffic.blocked_burst),
            ("campaign: one session probes the guard by small variations", traffic.probing),
            ("campaign: heavy prompts make everybody wait", traffic.heavy_prompts),
            ("campaign: two accounts draw unusually long completions", traffic.long_completions),
            ("calm again", lambda: traffic.calm(6)),
        )
        try:
            for what, stage in stages:
                self.say(what)
                await stage()
        finally:
            await traffic.close()
        self.http_requests = traffic.sent.requests
        answers = ", ".join(f"{count} × {status}" for status, count in sorted(traffic.sent.answers.items()))
        self.say(f"{self.http_requests} requests answered: {answers}")

    async def play(self) -> None:
        """Publishes the seeded day as one made-up collector would have."""
        self.say("playing a seeded day of events, four campaigns in its last half hour")
        counts = await ensure_topics(self.config.kafka)
        topic = self.config.kafka.topic("events")
        producer = make_producer(self.config.kafka, client_id="replay")
        await producer.start()
        try:
            writer = BatchWriter(producer, topic)
            end_us = time.time_ns() // 1000
            for partition, key, record in replay.records(self.seed, end_us, counts[topic]):
                await writer.append(key, encode(record), partition)
                self.http_requests += isinstance(record, AuditEvent)
            await writer.flush(60)
        finally:
            await producer.stop()
        self.say(f"{self.http_requests} events published")

    async def settle(self) -> tuple[dict[str, str], int]:
        """Waits until all that was published is stored and each detector has spoken; returns (published, missing).

        Gives up after `SETTLE_S`: the count at the end then says what is missing.
        """
        end_s = time.monotonic() + SETTLE_S
        while True:
            published = await read_events(self.config.kafka)
            stored = self.stored()
            missing = published.keys() - stored
            if (not missing and set(DETECTORS) <= self.findings().keys()) or time.monotonic() > end_s:
                return published, len(missing)
            await asyncio.sleep(1)

    async def search(self) -> None:
        """Looks for the canary that was sent as prompt, user and session. Raises `Leaked` where it is found."""
        places = await leaks.find(
            self.canary,
            self.config.kafka,
            self.setup.folder,
            face_url=f"http://127.0.0.1:{self.setup.face_port}",
            view_url=f"http://127.0.0.1:{self.setup.view_port}",
        )
        if places:
            raise Leaked(f"text that a client sent was found in {', '.join(places)}")
        self.say("a canary sent as prompt, user and session is in no topic, table, page, log or journal")

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """Asks the store over its read-only HTTP face."""
        answer = httpx.post(
            f"http://127.0.0.1:{self.setup.face_port}/", content=f"{sql} FORMAT JSON", timeout=30, trust_env=False
        )
        answer.raise_for_status()
        rows: list[dict[str, Any]] = orjson.loads(answer.content)["data"]
        return rows

    def stored(self) -> set[str]:
        """Ids of the events in the store."""
        return {row["id"] for row in self.rows("SELECT DISTINCT toString(event_id) AS id FROM events")}

    def findings(self) -> Counter[str]:
        """Findings by detector."""
        return Counter(row["detector"] for row in self.rows("SELECT detector FROM findings_now"))

    def show_findings(self) -> None:
        """The findings as a table, one line of plain reason each."""
        table = Table("severity", "detector", "state", "what and why", title="Findings", title_justify="left")
        for row in self.rows(
            "SELECT severity, detector, state, summary FROM findings_now ORDER BY first_seen, detector"
        ):
            table.add_row(row["severity"], row["detector"], row["state"], PSEUDONYM.sub(r"\1…", row["summary"]))
        self.console.print(table)


async def _topics(kafka: KafkaConfig) -> None:
    await ensure_topics(kafka)


async def read_events(kafka: KafkaConfig) -> dict[str, str]:
    """event_id → http_request_id of every request's event on the topic, read independently of the pipe.

    The collector's own test request has no HTTP request.
    """
    events = [decode(record.value) async for record in read_topic(kafka, "events")]
    return {event.event_id: event.http_request_id for event in events if isinstance(event, AuditEvent)}


def run_demo(*, once: bool, as_json: bool, engine: str, seed: int, port: int) -> int:
    """Runs the demo; exit status 0 when nothing is unaccounted for and all four detectors spoke."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))  # progress says enough
    console = Console(stderr=as_json, highlight=False)
    python = None if engine == "replay" else demo_setup.engine_python()
    if engine not in ("auto", "vllm", "replay"):
        raise ValueError(f"--engine {engine}: use vllm, replay or auto")
    if python is None and engine == "vllm":
        raise ValueError("--engine vllm: no vLLM here; `make engine` installs it, `--engine replay` does without")
    if python is None:
        console.print("No vLLM engine in this run: a seeded day of events is played through everything else.")
    secret = demo_setup.webhook_secret()
    folder = Path(tempfile.mkdtemp(prefix="inferwatch-demo-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Receiver(secret) as receiver:
        setup = demo_setup.prepare(
            folder,
            webhook_url=receiver.url,
            webhook_secret=secret,
            with_engine=python is not None,
            view_port=port,
        )
        demo = Demo(setup, console, seed)
        sound = False
        try:
            demo.start(python)
            report = asyncio.run(_run(demo, receiver, with_engine=python is not None))
            sound = report["unaccounted"] == 0 and set(DETECTORS) <= report["findings"].keys()
            if not once:
                _stay(demo)
        except (ProcessDied, TimeoutError, Leaked) as error:
            console.print(f"[red]{error}[/red]")
            report = {}
        finally:
            demo.supervisor.stop()
            if sound:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                console.print(f"Logs and data of this run: {folder}")
    if as_json and report:
        print(orjson.dumps(report).decode())
    return 0 if sound else 1


async def _run(demo: Demo, receiver: Receiver, *, with_engine: bool) -> dict[str, Any]:
    """Traffic, then the count: each HTTP request needs an event, each event on the topic a row in the store."""
    await (demo.drive() if with_engine else demo.play())
    published, missing = await demo.settle()
    unaccounted = missing + max(0, demo.http_requests - len(set(published.values()) - {""}))
    findings = demo.findings()
    for _ in range(50):
        if receiver.delivered >= findings.total():
            break
        await asyncio.sleep(0.1)
    demo.show_findings()
    if with_engine:
        await demo.search()
    report = {
        "events_published": len(published),
        "events_stored": len(demo.stored()),
        "unaccounted": unaccounted,
        "findings": dict(sorted(findings.items())),
        "webhooks_delivered": receiver.delivered,
        "seconds": round(time.monotonic() - demo.began_s, 1),
    }
    demo.say(
        f"{report['events_published']} events published, {report['events_stored']} stored, "
        f"{unaccounted} unaccounted; {receiver.delivered} signed webhooks delivered"
    )
    return report


def _stay(demo: Demo) -> None:
    """Leaves the view up until Ctrl-C."""
    demo.console.print(f"The view stays up: [bold]http://127.0.0.1:{demo.setup.view_port}/[/bold]  (Ctrl-C ends it)")
    try:
        while True:
            demo.supervisor.watch_once()
            time.sleep(0.5)
    except KeyboardInterrupt:
        demo.say("stopping")
