"""Commands: who may, when, and how many; what stage 2 refuses, and that it takes each once."""

import base64
import json

import msgspec
import pytest

from detectors.commands import (
    Acknowledge,
    BadCommand,
    Change,
    Maintenance,
    Revoke,
    Suppress,
    public_keys,
    sign,
    verify,
)
from detectors.config import CommandsConfig, DetectConfig
from detectors.engine import BadSnapshot, TenantEngine
from detectors.finding import Entity
from detectors.lifecycle import Lifecycle
from detectors.rollup import Command, Marker
from tests.detectors.commanding import COMMANDS, KEY, PUBLIC, STRANGER, T0, Desk, S, Story, alarm

KEYS = public_keys(COMMANDS)
MS = T0 // 1000


def change(**fields: object) -> Change:
    return Change(**Desk().head(0, **fields), from_us=T0)  # type: ignore[arg-type]


def _tampered(raw: bytes) -> bytes:
    signed = json.loads(raw)
    signed["payload"] = signed["payload"].replace("because", "because!")
    return json.dumps(signed).encode()


def _suppress(**fields: object) -> Suppress:
    values = {"detector": "probing", "entity": Entity(kind="user", id="u"), "severity": "low", "until_us": T0 + S}
    return Suppress(**Desk().head(0), **(values | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "append_ms", "why"),
    [
        (b"", MS, "1 to 16384 bytes"),
        (b"x" * 20_000, MS, "1 to 16384 bytes"),
        (b"[" * 9_000, MS, "no signed command"),
        (b'{"payload": "{}", "signature": ""}', MS, "no signed command: ValidationError"),
        (msgspec.json.encode({"payload": msgspec.json.encode(change()).decode()}), MS, "no signed command"),
        (sign(change(), STRANGER), MS, "its signature is not that of its operator"),
        (_tampered(sign(change(), KEY)), MS, "its signature is not that of its operator"),
        (sign(change(by="bob"), KEY), MS, "its operator is not in detect.commands.operators"),
        (sign(change(), KEY), MS + 601_000, "signed more than 600 s before"),
        (sign(change(), KEY), MS - 61_000, "signed more than 60 s after"),
        (sign(change(reason="a\nb"), KEY), MS, "one line of printable characters"),
        (sign(_suppress(until_us=T0), KEY), MS, "ends before it begins"),
        (sign(_suppress(until_us=T0 + 91 * 86_400 * S), KEY), MS, "longer than the 7776000 s allowed"),
        (sign(Maintenance(**Desk().head(0), from_us=T0 - 9 * S, until_us=T0 - S), KEY), MS, "ends before it begins"),
        (sign(Maintenance(**Desk().head(0), from_us=T0, until_us=T0 + 8 * 86_400 * S), KEY), MS, "longer than"),
        (sign(Change(**Desk().head(0), from_us=T0 + 91 * 86_400 * S), KEY), MS, "ahead"),
    ],
)
def test_a_bad_command_is_refused_with_its_reason(raw: bytes, append_ms: int, why: str) -> None:
    """Unsigned, badly signed, changed, of a stranger, stale, far ahead, endless, or no command at all; never quoted."""
    with pytest.raises(BadCommand, match=why) as refused:
        verify(raw, append_ms, KEYS, COMMANDS)
    assert "because" not in str(refused.value)


def test_a_field_that_is_not_known_is_refused() -> None:
    """An older reader must not pass over what narrows a suppression, signed though it be."""
    payload = json.loads(msgspec.json.encode(_suppress())) | {"only_weekdays": True}
    text = json.dumps(payload).encode()
    signature = base64.b64encode(KEY.sign(b"inferwatch command 1\n" + text)).decode()
    raw = json.dumps({"payload": text.decode(), "signature": signature}).encode()
    with pytest.raises(BadCommand, match="no signed command: ValidationError"):
        verify(raw, MS, KEYS, COMMANDS)


def test_a_signature_of_the_bare_text_is_none_of_a_command() -> None:
    """The domain is signed with it: a text signed for another purpose is no command."""
    text = msgspec.json.encode(change())
    raw = json.dumps({"payload": text.decode(), "signature": base64.b64encode(KEY.sign(text)).decode()}).encode()
    with pytest.raises(BadCommand, match="its signature"):
        verify(raw, MS, KEYS, COMMANDS)


def test_the_same_command_twice_is_taken_once() -> None:
    """Carried over again after a crash: dropped and counted. Sent again by somebody who copied it: refused."""
    story = Story()
    record = story.desk.suppress(0)
    story.command(record).command(record)
    copied = Command(0, story.desk.offset + 1, record.append_ms + 1, record.value)
    with pytest.raises(BadCommand, match="this id was taken before"):
        story.command(copied)
    story.command(copied)
    counters = story.lifecycle.counters
    names = ("taken", "repeated", "refused", "active")
    assert [counters[f"commands.{name}"] for name in names] == [1, 2, 1, 1]


def test_a_copied_command_is_refused_for_ever() -> None:
    """While its id is remembered, for its id; afterwards for its age; so ids need not be kept for ever."""
    story = Story()
    record = story.desk.suppress(0)
    story.command(record)
    for later_s in (1, 599, 601, 1_400, 10_000):
        story.desk.record(change())
        with pytest.raises(BadCommand):
            story.command(Command(0, story.desk.offset, record.append_ms + later_s * 1_000, record.value))
    assert story.lifecycle.counters["commands.refused"] == 5


def test_at_the_limit_a_new_command_is_refused_and_a_revoke_is_not() -> None:
    """Letting an old suppression go would tell people what they asked not to hear."""
    story = Story(commands=CommandsConfig(operators={"alice": PUBLIC}, delay_s=0, active_max=2))
    story.command(story.desk.suppress(0)).command(story.desk.suppress(1, user="u_2"))
    with pytest.raises(BadCommand, match="2 commands are in force, the most allowed"):
        story.command(story.desk.suppress(2, user="u_3"))
    story.command(story.desk.record(Revoke(**story.desk.head(3), command="0" * 32))).until(4)
    story.command(story.desk.suppress(5, user="u_3"))
    assert story.lifecycle.counters["commands.active"] == 2


def test_what_has_ended_makes_room() -> None:
    """By event time."""
    story = Story(commands=CommandsConfig(operators={"alice": PUBLIC}, delay_s=0, active_max=1))
    story.command(story.desk.suppress(0, until_us=T0 + 10 * S)).until(20)
    story.lifecycle.command(story.desk.suppress(30, user="u_2"), T0 + 21 * S)
    assert story.lifecycle.counters["commands.active"] == 1


def test_who_reads_old_commands_from_the_beginning_takes_the_newest_too() -> None:
    """As a backtest and a partition with new state do, before any second is judged: of five days, two a day and two of
    them in force at most, none is refused."""
    story = Story(commands=CommandsConfig(operators={"alice": PUBLIC}, delay_s=0, active_max=2))
    for day in range(5):
        at_s = day * 86_400
        story.command(story.desk.suppress(at_s)).command(story.desk.ack(at_s + 1, "0" * 32))
    story.alarms(alarm(4 * 86_400 + 10))
    assert story.told() == [("u_1", "open", 4 * 86_400 + 10, False)]
    assert story.lifecycle.counters["commands.taken"] == 10


def test_a_late_command_takes_effect_at_the_next_second() -> None:
    """What was said before stands."""
    story = Story()
    story.alarms(alarm(0)).until(100)
    story.lifecycle.command(story.desk.suppress(5), T0 + 101 * S)
    story.until(102)
    assert story.told() == [("u_1", "open", 0, True), ("u_1", "update", 101, True)]
    assert story.lifecycle.counters["commands.late"] == 1


def _engine(through: int | None = None) -> TenantEngine:
    """Stage 2 of one partition, which has judged everything through that second after T0."""
    engine = TenantEngine(DetectConfig(commands=COMMANDS), partition=0, partitions=1)
    if through is not None:
        engine.observe(Marker("iw.events", 0, 1, T0 // S + through))
    return engine


def test_the_engine_remembers_commands_that_wait() -> None:
    """Restored between a command and its time, it applies it, knows it again, and says up to where it has read."""
    record = Desk(partition=3).suppress(10)
    engine, other = _engine(through=0), _engine()
    engine.observe(record)
    other.restore(engine.snapshot())
    assert (other.applied(3), other.applied(0)) == ((0, record.append_ms), None)
    other.observe(record)
    other.observe(Marker("iw.events", 0, 1, T0 // S + 20))
    names = ("taken", "repeated", "refused", "late", "active")
    assert [other.counters[f"lifecycle.commands.{name}"] for name in names] == [1, 1, 0, 0, 1]
    assert other.snapshot() != engine.snapshot()


def test_a_command_for_what_is_judged_is_late() -> None:
    """The seconds that are closed stay as they were told."""
    engine = _engine(through=100)
    engine.observe(Desk().suppress(5))
    assert engine.counters["lifecycle.commands.late"] == 1


def test_a_refused_command_is_told_by_the_engine() -> None:
    """So that the stage writes its dead letter; the record counts as read."""
    engine = _engine()
    with pytest.raises(BadCommand, match="1 to 16384 bytes"):
        engine.observe(Command(0, 7, MS, b""))
    assert engine.applied(0) == (7, MS)


def test_a_lifecycle_of_another_version_is_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the worker reads its topic again."""
    monkeypatch.setattr(Lifecycle, "snapshot", lambda _: msgspec.msgpack.encode(([], {})))
    with pytest.raises(BadSnapshot, match="no snapshot of this lifecycle"):
        _engine().restore(_engine(through=1).snapshot())


def test_a_topic_made_anew_is_read_again() -> None:
    """Offsets begin at 0 once more, append times go on: the commands are new."""
    story = Story()
    story.command(story.desk.suppress(0)).command(story.desk.suppress(1, user="u_2"))
    story.desk.offset = -1
    ack = Acknowledge(**story.desk.head(50, id="e" * 32), uid="0" * 32, severity="low")
    story.command(story.desk.record(ack))
    assert story.lifecycle.counters["commands.taken"] == 3
