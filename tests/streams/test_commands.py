"""Commands of people on a real broker, with the real command line: what is suppressed is kept and hides nobody else."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from collector.event import AnyRecord, Heartbeat, Hello, encode
from collector.kafka import BrokerAway, KafkaConfig, ensure_topics
from detectors.commands import Change, sign
from detectors.finding import Finding
from detectors.finding import decode as decode_finding
from detectors.rollup import Command, decode
from inferwatch.config import Config, load
from streams.backtest import backtest
from streams.commands import Forwarder, send_command
from streams.stage2 import stage2
from tests.streams import traffic
from tests.streams.traffic import Collector

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).parents[2]
TOML = """
data_dir = "{folder}/data"
[kafka]
bootstrap_servers = "{servers}"
topic_prefix = "{prefix}"
partitions = {{ events = 1, rollups = 2, findings = 1 }}
[streams]
session_timeout_s = 2.0
tick_after_s = 300
state_interval_s = 0.3
[detect.lifecycle]
quiet_s = 15
update_s = 1
[sinks.file]
path = "{folder}/told.jsonl"
"""


class Place:
    """A folder with a configuration, and the command line in it."""

    def __init__(self, kafka: KafkaConfig, folder: Path) -> None:
        self.folder, self.file = folder, folder / "inferwatch.toml"
        servers, prefix = kafka.bootstrap_servers, kafka.topic_prefix
        self.file.write_text(TOML.format(folder=folder, servers=servers, prefix=prefix))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("INFERWATCH_")}
        self.environment = environment | {"INFERWATCH_CONFIG": str(self.file), "PYTHONPATH": str(ROOT)}

    async def say(self, *words: str) -> str:
        """`inferwatch WORDS`; its standard output."""
        answer = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "inferwatch.cli", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        return str(answer.stdout)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """A role that runs on; its log is NAME.log."""
        with (self.folder / f"{'-'.join(words).replace('--', '')}.log").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "inferwatch.cli", *words],
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    async def up(self, *names: str) -> None:
        """Waits until these stages have their partitions."""
        end_s = time.monotonic() + 60
        while not all("partitions restored" in (self.folder / f"{name}.log").read_text() for name in names):
            assert time.monotonic() < end_s, self.logs()
            await asyncio.sleep(0.2)

    def logs(self) -> str:
        """What all roles said."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


class Source:
    """A collector whose lanes move with the clock."""

    def __init__(self, kafka: KafkaConfig) -> None:
        self.kafka = kafka
        self.collector = Collector(1, boot="live", at_us=time.time_ns() // 1000)

    async def send(self, records: Iterator[tuple[bytes, AnyRecord, int]]) -> None:
        await traffic.send(self.kafka, [(key, encode(record), partition) for key, record, partition in records])

    async def blocks(self, user: str, count: int) -> None:
        """Blocked prompts of one user, all different, now."""

        def made() -> Iterator[tuple[bytes, AnyRecord, int]]:
            for _ in range(count):
                self.collector.at_us = max(self.collector.at_us + 1, time.time_ns() // 1000)
                yield self.collector.event(user, blocked=True)

        await self.send(made())

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Heartbeats four times a second, meanwhile."""

        async def beat() -> None:
            while True:
                self.collector.at_us = max(self.collector.at_us + 1, time.time_ns() // 1000)
                await self.send(self.collector.control(Heartbeat))
                await asyncio.sleep(0.25)

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def told(kafka: KafkaConfig) -> list[Finding]:
    """Every revision on iw.findings, in order."""
    records = await traffic.read(kafka, kafka.topic("findings"), 1)
    return [decode_finding(record.value) for record in records]


async def until(
    kafka: KafkaConfig, place: Place, true: Callable[[Finding], bool], what: str, timeout_s: float = 60
) -> Finding:
    """The first finding of which `true`."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        for finding in await told(kafka):
            if true(finding):
                return finding
        await asyncio.sleep(0.3)
    raise AssertionError(f"not within {timeout_s:g} s: {what}\n{place.logs()}")


@pytest.mark.long
async def test_a_suppressed_entity_is_kept_and_nobody_else_is_hidden(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Findings, then suppress, SIGKILL of stage 2, next episodes: the one is marked and not told, the other is told
    and called false; a change is named; commands of a stranger are refused; the log of rollups, and that of events
    with that of commands, give the same findings again."""
    place = Place(kafka_config, tmp_path)
    lines = await place.say("keys", "operator", "alice")
    with place.file.open("a") as file:
        file.write(lines)
    kafka = load(place.file).kafka
    await ensure_topics(kafka)
    source = Source(kafka)
    await source.send(source.collector.control(Hello))
    with ExitStack() as running:

        def start(*words: str) -> subprocess.Popen[bytes]:
            process = place.start(*words)
            running.callback(lambda: (process.kill(), process.wait()))
            return process

        start("detect", "--stage", "1")
        two = start("detect", "--stage", "2")
        start("deliver")
        async with source.beating():
            await place.up("detect-stage-1", "detect-stage-2")
            await source.blocks("mallory", 12)
            first = await until(kafka, place, lambda f: f.severity == "high", "mallory is found")
            await send_command(kafka, "acme", sign(_change("eve"), Ed25519PrivateKey.generate()))
            said = await place.say("finding", "suppress", first.uid[:8], "--for", "1h", "--reason", "test", "--json")
            command = json.loads(said)["command"]
            mark = await until(kafka, place, lambda f: f.suppressed_by == command, "the command is answered")
            assert (mark.uid, mark.handled_by, mark.quiet) == (first.uid, "alice", False)
            two.send_signal(signal.SIGKILL)
            two.wait()
            start("detect", "--stage", "2")
            planned = json.loads(await place.say("change", "--tenant", "acme", "--reason", "guard 2", "--json"))
            await until(kafka, place, lambda f: f.uid == first.uid and f.state == "close", "the episode closes")
            await source.blocks("mallory", 3)
            await source.blocks("trudy", 12)
            second = await until(
                kafka, place, lambda f: f.entity == first.entity and f.uid != first.uid, "mallory is found again"
            )
            trudy = lambda f: f.detector == "probing" and f.entity != first.entity  # noqa: E731
            other = await until(kafka, place, trudy, "trudy is found")
            assert (second.suppressed_by, second.quiet, second.state) == (command, True, "open")
            assert second.change == planned["command"]
            await place.say("finding", "false-positive", other.uid[:12], "--reason", "drill")
            await until(kafka, place, lambda f: f.uid == other.uid and f.false_positive, "it is called false")
            assert (other.suppressed_by, other.quiet) == ("", False)
            later = [finding for finding in await told(kafka) if finding.updated_us >= second.updated_us]
            assert any(finding.leads for finding in later), "nobody would be paged for trudy"
            closes = lambda f: f.uid == other.uid and f.state == "close"  # noqa: E731
            await until(kafka, place, closes, "trudy's episode closes")
        delivered = await _delivered(tmp_path, other.uid)
        assert (first.uid in delivered, other.uid in delivered, second.uid in delivered) == (True, True, False)
        handled = await _handled(place)
        assert (handled[second.uid], handled[other.uid]) == ("suppressed", "false positive")
    assert await _refusals(kafka) == {"its operator is not in detect.commands.operators"}
    await _is_repeatable(load(place.file))


async def _refusals(kafka: KafkaConfig) -> set[str]:
    letters = await traffic.read(kafka, kafka.topic("deadletter"), 1)
    return {json.loads(letter.value)["reason"].partition(": ")[2] for letter in letters}


def _change(by: str) -> Change:
    now_us = time.time_ns() // 1000
    return Change(id="0" * 32, tenant="acme", by=by, at_us=now_us, from_us=now_us, reason="none")


async def _delivered(folder: Path, last: str, timeout_s: float = 20) -> set[str]:
    """The uids that the file sink was given, once `last` is among them."""
    file, uids = folder / "told.jsonl", set[str]()
    end_s = time.monotonic() + timeout_s
    while last not in uids and time.monotonic() < end_s:
        await asyncio.sleep(0.2)
        lines = file.read_text().splitlines() if file.exists() else []
        uids = {json.loads(line)["finding_info"]["uid"] for line in lines}
    return uids


async def _handled(place: Place) -> dict[str, str]:
    listed = json.loads(await place.say("finding", "list", "--closed", "--json"))
    return {row["uid"]: row["handled"] for row in listed}


async def _is_repeatable(config: Config) -> None:
    """From the log of rollups as it lies, and from events and commands alone."""
    findings = {(f.uid, f.revision): f for f in await told(config.kafka)}
    assert await _again(config) == findings
    assert {(f.uid, f.revision): f async for f in backtest(config.kafka, config.detect)} == findings


async def _again(config: Config) -> dict[tuple[str, int], Finding]:
    """The findings of fresh engines over the log of rollups as it lies, in one go."""
    kafka = config.kafka
    stage = stage2(kafka, config.detect, 1, 2, 1)
    log = await traffic.read(kafka, kafka.topic("rollups"), 2)
    found = {}
    for partition in range(2):
        shard = stage.make_shard(partition)
        shard.observe([record for record in log if record.partition == partition])
        for outgoing in shard.take():
            finding = decode_finding(outgoing.value)
            found[finding.uid, finding.revision] = finding
    return found


class Engine:
    """Stands where an engine stood when its state was stored."""

    def __init__(self, *seen: tuple[int, int]) -> None:
        self.seen = seen[-1] if seen else None

    def applied(self, partition: int) -> tuple[int, int] | None:
        return self.seen


async def _carried(kafka: KafkaConfig, count: int) -> list[tuple[int, int, bytes]]:
    """(partition, offset, value) of the first `count` commands on iw.rollups, all checked against their partition."""
    end_s = time.monotonic() + 30
    while True:
        log = await traffic.read(kafka, kafka.topic("rollups"), 4)
        found = [(record.partition, rollup) for record in log if isinstance(rollup := decode(record.value), Command)]
        assert all(partition == command.partition for partition, command in found)
        if len(found) >= count or time.monotonic() > end_s:
            return [(command.partition, command.offset, command.value) for _, command in found]
        await asyncio.sleep(0.2)


async def test_commands_are_carried_from_where_each_engine_stands(kafka_config: KafkaConfig) -> None:
    """New state: all, from the beginning. Restored: what comes after. Given up: none. Too large: without its bytes."""
    await ensure_topics(kafka_config)
    sent = [(b"t", bytes([number]) * 10, partition) for partition in (0, 1, 2) for number in range(3)]
    await traffic.send(kafka_config, [*sent, (b"t", b"x" * 20_000, 3)], topic="commands")
    engines = {0: Engine(), 1: Engine((1, 0)), 3: Engine()}
    forwarder = asyncio.create_task(Forwarder(kafka_config, engines).run())
    try:
        first = [(0, 0, b"\0" * 10), (0, 1, b"\1" * 10), (0, 2, b"\2" * 10), (1, 2, b"\2" * 10), (3, 0, b"")]
        assert sorted(await _carried(kafka_config, 5)) == first
        del engines[0]
        engines[1] = Engine((9, 0))  # its topic was longer once: all comes again
        engines[2] = Engine((0, 0))
        again = [(1, n, bytes([n]) * 10) for n in range(3)] + [(2, n, bytes([n]) * 10) for n in (1, 2)]
        assert sorted(await _carried(kafka_config, 10)) == sorted(first + again)
        await traffic.send(kafka_config, [(b"t", b"new", p) for p in (0, 2)], topic="commands")
        assert (2, 3, b"new") in await _carried(kafka_config, 11)
        assert (0, 3, b"new") not in await _carried(kafka_config, 11)
    finally:
        forwarder.cancel()
        await asyncio.gather(forwarder, return_exceptions=True)


async def test_a_command_that_kafka_does_not_take_is_one_sentence() -> None:
    """Without a broker, at once and by name."""
    with pytest.raises(BrokerAway, match=r"no Kafka at 127\.0\.0\.1:9"):
        await send_command(KafkaConfig(bootstrap_servers="127.0.0.1:9"), "acme", b"{}", timeout_s=1)
