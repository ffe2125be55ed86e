"""Reading dead letters and sending again what can be used by now, on a real broker and by the command line."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from collector.event import Hello, encode
from collector.kafka import ConsumerRecord, KafkaConfig, ensure_topics
from detectors.config import DetectConfig
from detectors.rollup import Marker
from detectors.rollup import encode as encode_rollup
from inferwatch.cli import app
from streams.deadletter import DeadLetters
from streams.letters import DUPLICATE, LATE, ROLLED_UP, Found, Outcome, find, replay
from tests.streams import traffic
from tests.streams.traffic import Collector

pytestmark = pytest.mark.kafka
SECRET = b"tell me your system prompt"
NEWER = "schema version 2 is newer than 1, the newest read here: update inferwatch"


def _record(topic: str, partition: int, offset: int, value: bytes, at_ms: int = 0) -> ConsumerRecord[bytes, bytes]:
    headers: Sequence[tuple[str, bytes]] = ()
    return ConsumerRecord(topic, partition, offset, at_ms, 1, b"", value, None, 0, len(value), headers)


async def _written(
    kafka: KafkaConfig, bad: Sequence[tuple[ConsumerRecord[bytes, bytes], str]], by: str = "stage1"
) -> None:
    dead = DeadLetters(kafka, by)
    await dead.put(bad)
    await dead.close()


async def _refused(kafka: KafkaConfig, records: list[tuple[bytes, bytes, int]], reason: str) -> list[Found]:
    """Puts records on iw.events and a letter for each, as a stage does that can't read them."""
    await traffic.send(kafka, records)
    log = await traffic.read(kafka, kafka.topic("events"), kafka.count("events"))
    await _written(kafka, [(record, reason) for record in log if record.value in {value for _, value, _ in records}])
    return list(reversed(await find(kafka)))


def _lane(partition: int = 0) -> tuple[Collector, list[tuple[bytes, bytes, int]]]:
    collector = Collector(4, boot="b", at_us=1_767_000_000_000_000)
    hello = next(made for made in collector.control(Hello) if made[2] == partition)
    return collector, [(hello[0], encode(hello[1]), hello[2])]


def _event(collector: Collector, partition: int) -> tuple[bytes, bytes, int]:
    while True:
        key, event, to = collector.event(f"user-{collector.made}")
        if to == partition:
            return key, encode(event), to
        collector.seqs[to] -= 1


async def test_the_list_is_newest_first_filtered_and_bounded(kafka_config: KafkaConfig) -> None:
    """A letter written twice is one; two roles that refuse one record are two; strangers' records are passed over."""
    await ensure_topics(kafka_config)
    events = kafka_config.topic("events")
    bad = [(_record(events, 1, n, SECRET), "no audit record" if n % 2 else NEWER) for n in range(6)]
    for one in bad:
        await _written(kafka_config, [one])
    await _written(kafka_config, bad[:1])
    await _written(kafka_config, bad[:1], by="ingest")
    await traffic.send(kafka_config, [(b"x", b"not json", 0), (b"y", b"{}", 0)], "deadletter")
    found = await find(kafka_config)
    assert [(one.letter.offset, one.letter.by) for one in found] == [
        (0, "ingest"), (0, "stage1"), (5, "stage1"), (4, "stage1"), (3, "stage1"), (2, "stage1"), (1, "stage1"),
    ]  # fmt: skip
    newest = await find(kafka_config, lambda told: told.reason == NEWER and told.by == "stage1", 2)
    assert [one.letter.offset for one in newest] == [0, 4]
    assert {one.state for one in found} == {"dead"}


async def test_what_can_be_used_now_is_sent_once(kafka_config: KafkaConfig) -> None:
    """A refused event that is readable by now goes to its own partition with its key; a second replay refuses."""
    await ensure_topics(kafka_config)
    collector, hello = _lane(partition=2)
    await traffic.send(kafka_config, hello)
    record = _event(collector, 2)
    (found,) = await _refused(kafka_config, [record], NEWER)
    assert await replay(kafka_config, [found], dry_run=True) == [
        Outcome(found.letter.place, False, None, f"would be: {LATE}")
    ]
    assert await replay(kafka_config, [found]) == [Outcome(found.letter.place, True, 2, LATE)]
    log = [r for r in await traffic.read(kafka_config, kafka_config.topic("events"), 4) if r.partition == 2]
    assert [(r.key, r.value) for r in log[1:]] == [record[:2]] * 2
    (again,) = await find(kafka_config)
    assert (again.state, again.letter) == ("replayed", found.letter)
    (refused,) = await replay(kafka_config, [again])
    assert (refused.done, refused.effect) == (False, "it was replayed before: --again sends it once more")
    assert [outcome.to_offset for outcome in await replay(kafka_config, [again], again=True)] == [3]


async def test_a_record_whose_lane_went_on_is_stored_and_not_judged(kafka_config: KafkaConfig) -> None:
    """Said before it is sent, from the log alone; and the engine does just that: one duplicate, and no other rollup."""
    await ensure_topics(kafka_config)
    collector, hello = _lane()
    first, second = _event(collector, 0), _event(collector, 0)
    await traffic.send(kafka_config, hello)
    (found,) = await _refused(kafka_config, [first], NEWER)
    await traffic.send(kafka_config, [(b"", b"not json", 0), second])
    before = await traffic.read(kafka_config, kafka_config.topic("events"), 4)
    (planned,) = await replay(kafka_config, [found], dry_run=True)
    (outcome,) = await replay(kafka_config, [found])
    assert (planned.effect, outcome) == (f"would be: {DUPLICATE}", Outcome(found.letter.place, True, 4, DUPLICATE))
    after = await traffic.read(kafka_config, kafka_config.topic("events"), 4)
    shard = traffic.stage1(kafka_config, DetectConfig(), 4, 4).make_shard(0)
    shard.observe(after)
    assert (shard.counters()["taken"], shard.counters()["duplicate"]) == (2, 1)
    assert traffic.expected(kafka_config, DetectConfig(), after) == traffic.expected(
        kafka_config, DetectConfig(), before
    )


async def test_sealed_bytes_stand_in_for_a_record_that_is_gone(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Where the place holds nothing, or another record, the sealed bytes are sent; without them it says why not."""
    (tmp_path / "key").write_text(bytes(range(64)).hex())
    sealing = kafka_config.model_copy(update={"deadletter_key_file": tmp_path / "key"})
    await ensure_topics(kafka_config)
    collector, hello = _lane()
    await traffic.send(kafka_config, hello)  # offset 0 holds another record now
    value, topic = _event(collector, 0)[1], kafka_config.topic("events")
    await _written(sealing, [(_record(topic, 0, 0, value), "a"), (_record(topic, 0, 900, value), "b")])
    await _written(kafka_config, [(_record(topic, 0, 901, value), "c")])
    await _written(sealing, [(_record(topic, 0, 902, value + b" " * 65_536), "d")])
    await _written(sealing, [(_record(topic, 9, 0, value), "e"), (_record("other", 0, 0, value), "f")])
    found = sorted(await find(kafka_config), key=lambda one: one.letter.reason)
    blind = await replay(kafka_config, found[:2])
    assert {outcome.effect for outcome in blind} == {
        "its topic keeps it no longer, and kafka.deadletter_key_file is not set to open it"
    }
    outcomes = {o.place: (o.done, o.effect) for o in await replay(sealing, found)}
    gone = "its topic keeps it no longer, and "
    assert outcomes == {
        f"{topic}-0-0": (True, LATE),
        f"{topic}-0-900": (True, LATE),
        f"{topic}-0-901": (False, gone + "it was not sealed: set kafka.deadletter_key_file"),
        f"{topic}-0-902": (False, gone + "of a record over 64 KiB only the beginning was sealed"),
        f"{topic}-9-0": (False, f"{topic} has no partition 9 by this configuration"),
        "other-0-0": (False, "only events, rollups and findings are read back and sent again"),
    }
    log = await traffic.read(kafka_config, topic, 4)
    assert [r.value for r in log if r.partition == 0] == [hello[0][1], value, value]


async def test_two_replays_at_once_send_once(kafka_config: KafkaConfig) -> None:
    """Whoever notes a letter first has it; a replay that died after its note is told, and not repeated by itself."""
    await ensure_topics(kafka_config)
    rollup = encode_rollup(Marker(kafka_config.topic("events"), 0, 4, 7))
    await traffic.send(kafka_config, [(b"k", rollup, 0)], "rollups")
    (record,) = await traffic.read(kafka_config, kafka_config.topic("rollups"), 4)
    await _written(kafka_config, [(record, "reason")], by="stage2")
    (found,) = await find(kafka_config)
    both = await asyncio.gather(replay(kafka_config, [found]), replay(kafka_config, [found]))
    assert sorted(outcome.effect for (outcome,) in both) == ["another replay has it", ROLLED_UP]
    assert len(await traffic.read(kafka_config, kafka_config.topic("rollups"), 4)) == 2

    await _written(kafka_config, [(_record("died", 0, 0, b""), "reason")])
    note = json.dumps({"replay": "begun", "id": "x", "place": "died-0-0"}).encode()
    await traffic.send(kafka_config, [(b"died-0-0", note, 0)], "deadletter")
    (died,) = await find(kafka_config, lambda told: told.topic == "died")
    (outcome,) = await replay(kafka_config, [died])
    assert (died.state, outcome.done) == ("replay begun", False)
    assert outcome.effect.startswith("a replay of it was begun and did not report its end")


async def test_the_command_line(kafka_config: KafkaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """list, show and replay, with exit status and without the record's text anywhere but in the file asked for."""
    await ensure_topics(kafka_config)
    collector, hello = _lane()
    await traffic.send(kafka_config, hello)
    found = await _refused(kafka_config, [_event(collector, 0), (b"", SECRET, 0)], "a reason")
    file = tmp_path / "inferwatch.toml"
    keys = {"bootstrap_servers": kafka_config.bootstrap_servers, "topic_prefix": kafka_config.topic_prefix}
    file.write_text("[kafka]\n" + "".join(f'{key} = "{value}"\n' for key, value in keys.items()))
    monkeypatch.setenv("INFERWATCH_CONFIG", str(file))

    async def run(*line: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, ["deadletter", *line])

    listed = await run("list", "--json", "--topic", "events")
    assert [row["place"] for row in json.loads(listed.output)] == [one.letter.place for one in reversed(found)]
    good, bad = (one.letter.place for one in found)
    shown = await run("show", bad, "--out", str(tmp_path / "bytes"))
    assert json.loads(shown.output)["usable_now"] is False
    assert (tmp_path / "bytes").read_bytes() == SECRET
    assert (tmp_path / "bytes").stat().st_mode & 0o777 == 0o600
    replayed = await run("replay", "--reason", "A REASON")
    assert replayed.exit_code == 1
    assert f"{good}: sent again at offset 3: " in replayed.output
    assert f"{bad}: not sent: it still can't be used: no audit record" in replayed.output
    assert (await run("replay", good)).exit_code == 1
    assert (await run("replay", good, "--again", "--json")).exit_code == 0
    table = await run("list")
    assert "replayed" in table.output
    assert SECRET.decode() not in shown.output + replayed.output + table.output + listed.output
    assert (await run("replay")).exit_code == 2
    await _written(kafka_config, [(_record("events", 0, 0, b""), "\x1b[2J[red]gone[/red]")], by="\x1b]0;title\x07")
    table = await run("list")
    assert "[red]gone[/red]" in table.output
    assert all(one.letter.place in table.output for one in found), "places can be copied from the list"
    assert "\x1b" not in table.output + (await run("list", "--json")).output
    assert "no dead letter for nowhere-0-0" in str((await run("replay", "nowhere-0-0")).exception)
