"""`inferwatch topics check` and `grow` on a real broker: what is told and refused, and that findings stay right."""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from typer.testing import CliRunner

from collector.admin import TopicFacts, add_partitions, describe_topics, mismatches
from collector.event import Goodbye, Heartbeat, Hello, decode, encode, timestamp_us
from collector.kafka import BrokerAway, ConsumerRecord, KafkaConfig, TopicMismatch, ensure_topics, topic_specs
from detectors.config import DetectConfig
from detectors.finding import decode as decode_finding
from inferwatch.cli import app
from streams import growth
from streams.config import StreamsConfig
from streams.growth import Growth, NotDrained, grow
from tests.streams import traffic
from tests.streams.traffic import Collector
from tests.streams.worker import Worker, wait_until

pytestmark = pytest.mark.kafka
SECOND_US = 1_000_000
DETECT, STREAMS = DetectConfig(), StreamsConfig()


class Request(NamedTuple):
    """One request to come, whatever the lanes."""

    at_us: int
    user: str
    blocked: bool


def _calm(chance: random.Random, start_us: int, seconds: int) -> list[Request]:
    return [
        Request(start_us + index * SECOND_US // 20, f"user-{chance.randrange(200)}", chance.random() < 0.01)
        for index in range(seconds * 20)
    ]


def _attack(chance: random.Random, start_us: int, seconds: int) -> list[Request]:
    return [
        Request(start_us + index * SECOND_US // 20, f"attacker-{chance.randrange(60)}", chance.random() < 0.6)
        for index in range(seconds * 20)
    ]


def _lanes(requests: Sequence[Request], partitions: int, boot: str) -> Iterator[tuple[bytes, bytes, int]]:
    """The requests on the lanes of one boot, from hello to goodbye."""
    collector = Collector(partitions, boot=boot, at_us=requests[0].at_us - 1)
    made = list(collector.control(Hello))
    for index, request in enumerate(requests):
        collector.at_us = request.at_us
        made.append(collector.event(request.user, blocked=request.blocked))
        if index % 20 == 19:
            made.extend(collector.control(Heartbeat))
    collector.at_us += 2 * SECOND_US
    made.extend(collector.control(Heartbeat))
    made.extend(collector.control(Goodbye))
    for key, record, partition in made:
        yield key, encode(record), partition


def _undisturbed(parts: Sequence[Sequence[Request]]) -> dict[str, Any]:
    """The findings of an engine that has one partition all the time."""
    kafka = KafkaConfig(partitions={"events": 1, "rollups": 1, "findings": 1})
    records: list[ConsumerRecord[bytes, bytes]] = []
    for number, part in enumerate(parts):
        for key, value, _ in _lanes(part, 1, f"boot-{number}"):
            at_ms = timestamp_us(decode(value).timestamp) // 1000
            record = ConsumerRecord("iw.events", 0, len(records), at_ms, 1, key, value, None, 0, 0, ())
            records.append(record)
    return _opened(traffic.expected(kafka, DETECT, records).findings.values())


def _opened(findings: Any) -> dict[str, Any]:
    """What was opened, but for its evidence: offsets and ids of events are the layout's."""
    told = {}
    for raw in findings:
        finding = decode_finding(raw)
        if finding.state == "open":
            told[finding.uid] = {key: value for key, value in msgspec.to_builtins(finding).items() if key != "evidence"}
    return told


@pytest.mark.long
async def test_findings_stay_right_across_the_growth(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Calm on 2 partitions, grown to 4, then an attack: found as if nothing had happened; no dead letter, none late."""
    chance = random.Random(31)  # noqa: S311  # repeatable, no secret
    before = kafka_config.model_copy(update={"partitions": {"events": 2}})
    after = kafka_config.model_copy(update={"partitions": {"events": 4}})
    await ensure_topics(before)
    calm = _calm(chance, time.time_ns() // 1000 - 260 * SECOND_US, 240)
    with Worker("stage1", before, tmp_path) as one, Worker("stage2", before, tmp_path) as two:
        await traffic.send(before, list(_lanes(calm, 2, "boot-0")))
        wait_until(lambda: one.metric("ready") == two.metric("ready") == 1, "both are ready", 60, one, two)
        with pytest.raises(NotDrained, match=r"stage1-.* runs, or died less than 35 s ago: stop it and try again"):
            await grow(after, DETECT, STREAMS)
        drained = lambda: one.metric("engine_pending") == 0 and one.metric("engine_taken") == len(calm)  # noqa: E731
        wait_until(drained, "every second is judged", 60, one, two)
        wait_until(lambda: two.metric("lag_records") == two.metric("engine_waiting") == 0, "merged", 60, one, two)
        await asyncio.to_thread(one.stop)
        wait_until(lambda: two.metric("lag_records") == 0, "stage 2 has all", 60, two)
        await asyncio.to_thread(two.stop)
    assert await grow(after, DETECT, STREAMS, dry_run=True) == Growth(2, 4, ())
    assert (await describe_topics(after))[after.topic("events")].partitions == 2
    assert await grow(after, DETECT, STREAMS) == Growth(2, 4, ())
    with pytest.raises(NotDrained, match="nothing to grow"):
        await grow(after, DETECT, STREAMS)
    with pytest.raises(TopicMismatch, match="has 4 partitions, the configuration says 2"):
        await ensure_topics(before)

    attack = _attack(chance, time.time_ns() // 1000, 30)
    with Worker("stage1", after, tmp_path) as one, Worker("stage2", after, tmp_path) as two:
        await traffic.send(after, list(_lanes(attack, 4, "boot-1")))
        judged = lambda: one.metric("engine_taken") == len(attack) and one.metric("lag_records") == 0  # noqa: E731
        wait_until(judged, "the attack is read", 60, one, two)
        wanted = _undisturbed([calm, attack])
        found = await _found(after, set(wanted))
        assert [one.metric("late_total"), one.metric("dead_letters_total")] == [0, 0]
        assert [two.metric("engine_late_rollups"), two.metric("dead_letters_total")] == [0, 0]
    assert wanted
    assert {uid: found.get(uid) for uid in wanted} == wanted
    assert {finding["detector"] for uid, finding in found.items() if uid not in wanted} <= {"coverage"}


async def _found(kafka: KafkaConfig, wanted: set[str]) -> dict[str, Any]:
    """What was opened, once `wanted` are among it or after 40 s."""
    for _ in range(80):
        told = await traffic.read(kafka, kafka.topic("findings"), kafka.count("findings"))
        found = _opened(record.value for record in told)
        if wanted <= found.keys():
            break
        await asyncio.sleep(0.5)
    return found


async def _drained(kafka: KafkaConfig, folder: Path, requests: Sequence[Request]) -> None:
    """Both stages run over what is there, and stop when all is judged."""
    with Worker("stage1", kafka, folder) as one, Worker("stage2", kafka, folder) as two:
        await traffic.send(kafka, list(_lanes(requests, kafka.count("events"), "boot-0")))
        judged = lambda: one.metric("engine_taken") == len(requests) and one.metric("engine_pending") == 0  # noqa: E731
        wait_until(judged, "every second is judged", 60, one, two)
        await asyncio.to_thread(one.stop)
        wait_until(lambda: two.metric("lag_records") == two.metric("engine_waiting") == 0, "merged", 60, two)
        await asyncio.to_thread(two.stop)


async def test_what_is_under_way_is_refused_by_name(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Open lanes, and a stage that has not seen all: every reason in one answer, and nothing was changed."""
    before = kafka_config.model_copy(update={"partitions": {"events": 1, "rollups": 1}})
    after = kafka_config.model_copy(update={"partitions": {"events": 2, "rollups": 1}})
    await ensure_topics(before)
    calm = _calm(random.Random(1), time.time_ns() // 1000 - 60 * SECOND_US, 20)  # noqa: S311
    await _drained(before, tmp_path, calm)
    collector = Collector(1, boot="boot-1", at_us=time.time_ns() // 1000)
    records = [*collector.control(Hello), collector.event("user")]
    await traffic.send(before, [(key, encode(record), partition) for key, record, partition in records])
    with pytest.raises(NotDrained) as refused:
        await grow(after, DETECT, STREAMS)
    lanes, behind = str(refused.value).splitlines()
    assert lanes.startswith("1 lanes are open (collector-1/boot-1 on 0): stop their collectors, and start and stop")
    assert behind.startswith(f"stage1 has seen {before.topic('events')}-0 up to ")
    assert behind.endswith("run stage1 until its lag is 0 and 15 s more, then stop it")
    with pytest.raises(NotDrained, match=r"^stage1 has seen"):
        await grow(after, DETECT, STREAMS, abandon_lanes=True)
    assert (await describe_topics(before))[before.topic("events")].partitions == 1
    with pytest.raises(NotDrained, match="has 1 partitions and the configuration says 1: nothing to grow"):
        await grow(before, DETECT, STREAMS)


@pytest.mark.long
async def test_a_growth_that_died_is_finished_by_the_next(
    kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead after the states or between them, the topic still as it was: no stage starts, and the next run ends it."""
    before = kafka_config.model_copy(update={"partitions": {"events": 1, "rollups": 1}})
    after = kafka_config.model_copy(update={"partitions": {"events": 3, "rollups": 1}})
    await ensure_topics(before)
    await _drained(before, tmp_path, _calm(random.Random(2), time.time_ns() // 1000 - 60 * SECOND_US, 20))  # noqa: S311

    async def dies(*_: object) -> None:
        raise BrokerAway("cut")

    with monkeypatch.context() as patched:
        patched.setattr(growth, "add_partitions", dies)
        with pytest.raises(BrokerAway, match="cut"):
            await grow(after, DETECT, STREAMS)
    with Worker("stage1", after, tmp_path, name="early") as one:
        assert await asyncio.to_thread(one.process.wait, 30) == 1
    assert "TopicMismatch" in one.log.read_text()
    assert await grow(after, DETECT, STREAMS) == Growth(1, 3, ())
    with Worker("stage1", after, tmp_path) as one, Worker("stage2", after, tmp_path) as two:
        wait_until(lambda: one.metric("ready") == two.metric("ready") == 1, "both go on", 60, one, two)
        assert "state can't be used" not in one.log.read_text() + two.log.read_text()


async def test_check_shows_each_mismatch_with_its_remedy(
    kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, on a real broker: missing, wrong and too few, each with what mends it; exit status 1."""
    file = tmp_path / "inferwatch.toml"
    keys = {"bootstrap_servers": kafka_config.bootstrap_servers, "topic_prefix": kafka_config.topic_prefix}
    file.write_text("[kafka]\n" + "".join(f'{key} = "{value}"\n' for key, value in keys.items()))
    monkeypatch.setenv("INFERWATCH_CONFIG", str(file))

    async def run(*line: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, ["topics", *line])

    specs = {spec.name: spec for spec in topic_specs(kafka_config)}
    events, rollups, findings = (kafka_config.topic(name) for name in ("events", "rollups", "findings"))
    wrong = dict(specs[events].configs) | {"message.timestamp.type": "CreateTime", "retention.ms": "1000"}
    more = dict(specs[findings].configs) | {"retention.ms": "-1", "max.message.bytes": "2000000"}
    await ensure_topics(
        kafka_config,
        [
            specs[events]._replace(partitions=2, configs=wrong),
            specs[rollups]._replace(partitions=9),
            specs[findings]._replace(configs=more),
        ],
    )
    checked = await run("check", "--json")
    assert checked.exit_code == 1
    alter = (
        f"kafka-configs.sh --bootstrap-server {kafka_config.bootstrap_servers} --alter --entity-type topics "
        f"--entity-name {events} --add-config "
    )
    missing = ("is missing", "start any process of inferwatch: it makes its topics")
    told = json.loads(checked.output)
    assert {(one["topic"], one["what"], one["remedy"]) for one in told["mismatches"]} == {
        (events, "has 2 partitions, the configuration says 4", "inferwatch topics grow"),
        (
            events,
            "has message.timestamp.type=CreateTime, it must be LogAppendTime",
            alter + "message.timestamp.type=LogAppendTime",
        ),
        (events, "has retention.ms=1000, it must be 604800000 or more", alter + "retention.ms=604800000"),
        (rollups, "has 9 partitions, the configuration says 4", "set kafka.partitions.rollups = 9"),
        *((kafka_config.topic(name), *missing) for name in ("commands", "deadletter", "status")),
    }
    assert told["topics"][findings]["replication"] == 1
    table = await run("check")
    assert (table.exit_code, table.output.count("  mend: ")) == (1, 7)
    grown = await run("grow", "--dry-run")
    assert isinstance(grown.exception, NotDrained)
    assert str(grown.exception) == f"{kafka_config.topic('status')} is missing: see inferwatch topics check"


async def test_check_is_content_with_what_we_made(kafka_config: KafkaConfig) -> None:
    """Topics as made have no mismatch; in production, one broker's have."""
    await ensure_topics(kafka_config)
    facts = await describe_topics(kafka_config)
    assert mismatches(kafka_config, facts) == []
    prod = kafka_config.model_copy(update={"scale": "prod"})
    said = {one.what for one in mismatches(prod, facts) if one.topic == prod.topic("status")}
    assert said == {
        "has replication 1, it must be 3",
        "has min.insync.replicas=1, it must be 2 or more",
    }
    await add_partitions(kafka_config, {kafka_config.topic("status"): 1})
    assert (await describe_topics(kafka_config))[kafka_config.topic("status")] == facts[kafka_config.topic("status")]
    assert isinstance(facts[kafka_config.topic("events")], TopicFacts)
