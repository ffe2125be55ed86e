"""Flapping: an entity that opens again and again is held open for longer; and the whole tail, cut anywhere."""

import random
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from detectors import finding
from detectors.commands import BadCommand, Change, FalsePositive, Maintenance, Revoke
from detectors.config import CommandsConfig, LifecycleConfig
from detectors.detector import Alarm
from detectors.rollup import Command
from tests.detectors.commanding import PUBLIC, T0, Desk, S, Story, alarm, lifecycle

CONFIG = LifecycleConfig(quiet_s=10, flap_openings=3, flap_window_s=600, flap_quiet_s=100)


def openings(story: Story) -> list[tuple[int, int]]:
    """(seconds after T0, what it says of flapping) of each opening."""
    return [((f.updated_us - T0) // S, f.flapping) for f in story.said if f.revision == 1]


def test_the_third_opening_within_the_window_is_held_open_for_longer() -> None:
    """Every 20 s an alarm: two episodes of one alarm, then one that stays open, and says why; its close too."""
    story = Story(CONFIG)
    story.alarms(*(alarm(at_s) for at_s in range(0, 200, 20))).until(1_000)
    assert openings(story) == [(0, 0), (20, 0), (40, 3)]
    assert [((f.updated_us - T0) // S, f.flapping) for f in story.said if f.state == "close"] == [
        (10, 0),
        (30, 0),
        (280, 3),
    ]
    assert story.lifecycle.counters["flapping"] == 1


def test_openings_before_the_window_are_forgotten() -> None:
    """Two long ago and one now are not flapping."""
    story = Story(CONFIG)
    story.alarms(alarm(0), alarm(20), alarm(700))
    assert openings(story) == [(0, 0), (20, 0), (700, 0)]


def test_others_do_not_flap_with_it() -> None:
    """Neither another user nor another detector."""
    story = Story(CONFIG)
    story.alarms(alarm(0), alarm(20), alarm(40, user="u_2")).alarms(alarm(41), detector="token_length")
    assert [flapping for _, flapping in openings(story)] == [0, 0, 0, 0]


def test_what_gets_worse_is_told_while_flapping() -> None:
    """At once, and the pager rings."""
    story = Story(CONFIG)
    story.alarms(alarm(0), alarm(20), alarm(40), alarm(45, severity="critical"))
    assert [(f.state, f.severity, f.leads) for f in story.said][-1] == ("update", "critical", True)


def test_at_the_limit_the_longest_closed_is_forgotten() -> None:
    """Counted; it may open once more before it flaps."""
    story = Story(CONFIG.model_copy(update={"flap_entities_max": 1}))
    story.alarms(alarm(0), alarm(20), alarm(35, user="u_2")).until(49)
    story.alarms(alarm(50))
    assert openings(story)[-1] == (50, 0)
    assert story.lifecycle.counters["flapping_forgotten"] == 1


SMALL = LifecycleConfig(
    quiet_s=20,
    update_s=5,
    episodes_max=4,
    incident_s=40,
    incidents_max=3,
    incident_links_max=3,
    flap_openings=2,
    flap_window_s=100,
    flap_quiet_s=30,
    flap_entities_max=2,
    closed_max=3,
)
ORDERS = CommandsConfig(operators={"alice": PUBLIC}, delay_s=7, active_max=3, change_s=20)
USERS = ("u_1", "u_2", "u_3")


def _alarms(rng: random.Random) -> list[tuple[str, Alarm]]:
    """Bursts about a few entities, each at most once a second, in order of time."""
    drawn: dict[tuple[int, str, str], tuple[str, Alarm]] = {}
    for _ in range(rng.randrange(5, 15)):
        detector, kind, user = rng.choice(("probing", "block_rate")), rng.choice(("user", "model")), rng.choice(USERS)
        severity, at_s = rng.choice(("low", "medium", "medium", "high", "critical")), rng.randrange(250)
        for _ in range(rng.randrange(1, 6)):
            by = rng.sample(USERS, rng.randrange(3))
            made = alarm(at_s, user=user, kind=kind, severity=severity, by=by, users=len(by))
            drawn[at_s, detector, kind + user] = (detector, made)
            at_s += rng.randrange(1, 25)
    return [drawn[key] for key in sorted(drawn)]


def _records(rng: random.Random, said: list[finding.Finding]) -> list[tuple[int, Command]]:
    """Commands in order of time: about findings that there will be, about entities, some of them nonsense."""
    desk = Desk()
    return [(at_s, _record(desk, rng, at_s, rng.choice(said))) for at_s in sorted(rng.sample(range(280), 8))]


def _record(desk: Desk, rng: random.Random, at_s: int, about: finding.Finding) -> Command:
    severity = rng.choice(("low", "medium", "high"))
    match rng.randrange(6):
        case 0 | 1:
            at = {"detector": about.detector, "user": about.entity.id, "kind": about.entity.kind}
            return desk.suppress(at_s, **at, severity=severity, known=["u_1", "u_2"], until_us=T0 + (at_s + 90) * S)
        case 2:
            return desk.ack(at_s, about.uid, severity=severity)
        case 3:
            return desk.ack(at_s, about.uid, FalsePositive, severity=severity)
        case 4:
            span = {"from_us": T0 + at_s * S, "until_us": T0 + (at_s + 30) * S}
            return desk.record(Maintenance(**desk.head(at_s), **span))
    if rng.random() < 0.5:
        return desk.record(Change(**desk.head(at_s), from_us=T0 + at_s * S))
    return desk.record(Revoke(**desk.head(at_s), command=f"{rng.randrange(desk.offset + 2):032x}"))


def _play(
    alarms: list[tuple[str, Alarm]], records: list[tuple[int, Command]], cuts: set[int], *, steps: bool
) -> list[bytes]:
    """What is said, as `TenantEngine` drives it: a second's alarms, then time, then commands of the next seconds.

    At `cuts` it goes on from its snapshot. With `steps` time goes second by second, else from alarm to alarm.
    """
    tail, said = lifecycle(SMALL, ORDERS), []
    for at_s in range(400):
        for detector, each in alarms:
            if each.at_us == T0 + at_s * S:
                said += tail.advance(each.at_us - 1)
                said += tail.alarm(detector, each)
        read = [record for moment_s, record in records if moment_s == at_s]
        if steps or read or at_s == 399:
            said += tail.advance(T0 + at_s * S)
        for record in read:
            with suppress(BadCommand):
                tail.command(record, T0 + at_s * S)
        if at_s in cuts:
            raw = tail.snapshot()
            tail = lifecycle(SMALL, ORDERS)
            tail.restore(raw)
            tail.topics = {0: "iw.events"}
            assert tail.snapshot() == raw
    return [finding.encode(each) for each in said]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.sets(st.integers(0, 399), max_size=12))
def test_restarts_and_steps_change_no_byte(seed: int, cuts: set[int]) -> None:
    """Any alarms and commands, any restarts, one long step or many short: the same revisions, and each rule holds."""
    rng = random.Random(seed)  # noqa: S311  # repeatable, no secret
    alarms = _alarms(rng)
    records = _records(rng, [finding.decode(raw) for raw in _play(alarms, [], set(), steps=False)])
    wanted = _play(alarms, records, set(), steps=True)
    assert _play(alarms, records, cuts, steps=True) == wanted
    assert _play(alarms, records, cuts, steps=False) == wanted
    _rules_hold([finding.decode(raw) for raw in wanted])


def _rules_hold(said: list[finding.Finding]) -> None:
    """Revisions without a hole, one open at the start, who was told hears of the close, nothing quiet leads."""
    episodes: dict[str, list[finding.Finding]] = {}
    for each in said:
        episodes.setdefault(each.uid, []).append(each)
        assert not (each.quiet and each.leads)
        assert not (each.severity == "critical" and each.quiet and not (each.suppressed_by or each.acknowledged_by))
    for revisions in episodes.values():
        assert [each.revision for each in revisions] == list(range(1, len(revisions) + 1))
        assert revisions[0].state == "open"
        assert len({each.incident for each in revisions}) == 1
        told = [each for each in revisions if not each.quiet]
        closes = [each for each in revisions if each.state == "close"]
        assert closes, "every episode closes"
        if told:
            assert told[0].state == "open", "who is told is told of an opening first"
            assert not closes[0].quiet
