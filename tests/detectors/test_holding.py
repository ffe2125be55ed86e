"""What commands do: what is acknowledged or suppressed is told again when it gets worse, and a suppression hides nobody
but whom it names."""

import msgspec
import pytest

from detectors.commands import Change, FalsePositive, Maintenance, Revoke
from detectors.rollup import Command
from tests.detectors.commanding import COMMANDS, T0, TENANT, Desk, S, Story, alarm

GUARD = {"user": "m/guard", "kind": "model"}


def maintenance(desk: Desk, at_s: int, begin_s: int, end_s: int, **fields: str) -> Command:
    span = {"from_us": T0 + begin_s * S, "until_us": T0 + end_s * S}
    return desk.record(Maintenance(**desk.head(at_s), **span, **fields))


def test_a_suppressed_entity_is_kept_and_others_are_told() -> None:
    """The next episode of the entity is made, marked and counted; another user, detector or tenant is told."""
    story = Story()
    story.command(story.desk.suppress(0))
    story.alarms(alarm(10), alarm(11, user="u_2"), alarm(12, tenant="other"))
    story.alarms(alarm(13), detector="token_length")
    marks = [(f.tenant, f.detector, f.entity.id, f.suppressed_by, f.handled_by, f.quiet) for f in story.said]
    assert marks == [
        (TENANT, "probing", "u_1", "0" * 32, "alice", True),
        (TENANT, "probing", "u_2", "", "", False),
        ("other", "probing", "u_1", "", "", False),
        (TENANT, "token_length", "u_1", "", "", False),
    ]
    story.until(1_000)
    assert [f.quiet for f in story.said if f.state == "close"] == [True, False, False, False]
    assert story.lifecycle.counters["suppressed"] == 1
    assert story.lifecycle.counters["quiet"] == 2


def test_a_suppression_ends() -> None:
    """What still goes on then is told at once, as new to people, and rings the pager."""
    story = Story()
    story.command(story.desk.suppress(0, until_us=T0 + 100 * S))
    story.alarms(*(alarm(at_s) for at_s in (50, 99, 100)))
    assert story.told() == [("u_1", "open", 50, False), ("u_1", "open", 100, True)]


def test_what_gets_worse_is_told_though_suppressed() -> None:
    """Suppressed at medium: high is told at once, and stays told to its close."""
    story = Story()
    story.command(story.desk.suppress(0))
    story.alarms(alarm(10), alarm(20, severity="high"), alarm(200))
    assert [f.leads for f in story.said] == [False, True, False]
    story.until(1_000)
    assert story.told() == [
        ("u_1", "open", 10, False),
        ("u_1", "open", 20, True),
        ("u_1", "update", 200, True),
        ("u_1", "close", 500, True),
    ]


def test_people_who_were_told_hear_that_it_is_suppressed_and_that_it_closes() -> None:
    """Else a ticket would stay open for ever; what lies between is held back."""
    story = Story()
    story.alarms(alarm(0)).command(story.desk.suppress(5))
    story.alarms(alarm(70), alarm(140)).until(1_000)
    assert [f.suppressed_by != "" for f in story.said] == [False, True, True, True, True]
    assert story.told() == [
        ("u_1", "open", 0, True),
        ("u_1", "update", 5, True),
        ("u_1", "update", 70, False),
        ("u_1", "update", 140, False),
        ("u_1", "close", 440, True),
    ]


@pytest.mark.parametrize(
    ("by", "users", "told"),
    [
        (["u_a", "u_b"], 2, False),
        (["u_a"], 1, False),
        ([], None, False),
        (["u_a", "u_b", "u_victim"], 3, True),
        (["u_victim"], 1, True),
        (["u_a", "u_b"], 3, True),
        (["u_a", "u_b", "u_c", "u_d", "u_e"], None, True),
    ],
    ids=["the same", "fewer", "nobody named", "one more", "another", "one more, unnamed", "a full list"],
)
def test_a_suppressed_guard_hides_no_new_victim(by: list[str], users: int | None, told: bool) -> None:
    """An entity that stands for many is held back only while all behind it are named and were known."""
    story = Story()
    known = ["u_a", "u_b", "u_c", "u_d", "u_e"] if users is None else ["u_a", "u_b"]
    story.command(story.desk.suppress(0, detector="block_rate", known=known, **GUARD))
    story.alarms(alarm(10, by=by, users=users, **GUARD), detector="block_rate")
    assert [not f.quiet for f in story.said] == [told]


def test_a_newcomer_in_the_middle_is_told_at_once_and_the_finding_does_not_come_and_go() -> None:
    """Within `update_s`; without him afterwards it stays told, until it is suppressed anew."""
    story = Story()
    story.command(story.desk.suppress(0, detector="block_rate", known=["u_a"], **GUARD))
    story.alarms(alarm(10, by=["u_a"], users=1, **GUARD), detector="block_rate")
    story.alarms(
        alarm(11, by=["u_a", "u_v"], users=2, **GUARD), alarm(80, by=["u_a"], users=1, **GUARD), detector="block_rate"
    )
    assert story.told() == [
        ("m/guard", "open", 10, False),
        ("m/guard", "open", 11, True),
        ("m/guard", "update", 80, True),
    ]
    story.command(story.desk.suppress(90, detector="block_rate", known=["u_a", "u_v"], **GUARD))
    story.alarms(alarm(160, by=["u_v"], users=1, **GUARD), detector="block_rate")
    assert story.told() == [("m/guard", "update", 90, True), ("m/guard", "update", 160, False)]
    assert story.lifecycle.counters["pierced"] == 1


def test_a_peak_that_speaks_hides_no_newcomer() -> None:
    """A stronger earlier alarm describes the episode; who is behind it is said by the newest."""
    story = Story()
    story.command(story.desk.suppress(0, detector="latency", known=["u_a"], **GUARD))
    peak = msgspec.structs.replace(alarm(10, by=["u_a"], users=1, **GUARD), peak_speaks=True)
    weaker = msgspec.structs.replace(peak.statistic, observed=0.5)
    newer = msgspec.structs.replace(alarm(20, by=["u_v"], users=1, **GUARD), peak_speaks=True, statistic=weaker)
    story.alarms(peak, newer, detector="latency")
    assert [(f.summary, f.quiet) for f in story.said] == [("at 10", True), ("at 10", False)]


def test_a_suppressed_entity_takes_nobody_elses_page() -> None:
    """It is told, then suppressed; whoever joins its incident afterwards rings the pager though he is no worse."""
    story = Story()
    story.alarms(alarm(0, user="u_1/s_1", kind="session")).command(
        story.desk.suppress(1, user="u_1/s_1", kind="session")
    )
    story.alarms(alarm(10, user="m/guard", kind="model", by=["u_1", "u_2"], users=2), detector="block_rate")
    assert [(f.incident == story.said[0].incident, f.leads) for f in story.said] == [
        (True, True),
        (True, False),
        (True, True),
    ]


def test_acknowledged_is_held_back_until_it_is_worse() -> None:
    """Update at medium: held back. High: told, and the acknowledgement is void. The close is told."""
    story = Story()
    story.alarms(alarm(0))
    story.command(story.desk.ack(5, story.said[0].uid))
    story.alarms(alarm(70), alarm(80, severity="high")).until(1_000)
    assert [f.acknowledged_by != "" for f in story.said] == [False, True, True, False, False]
    assert story.told() == [
        ("u_1", "open", 0, True),
        ("u_1", "update", 5, True),
        ("u_1", "update", 70, False),
        ("u_1", "update", 80, True),
        ("u_1", "close", 380, True),
    ]
    assert (story.lifecycle.counters["acknowledged"], story.lifecycle.counters["reopened"]) == (1, 1)


def test_an_acknowledged_finding_that_goes_on_for_a_day_is_told_again() -> None:
    """Somebody may have forgotten it."""
    story = Story(commands=COMMANDS.model_copy(update={"acknowledge_s": 600}))
    story.alarms(alarm(0))
    story.command(story.desk.ack(5, story.said[0].uid))
    story.alarms(*(alarm(at_s) for at_s in range(100, 800, 100)))
    assert story.told()[-2:] == [("u_1", "update", 600, False), ("u_1", "update", 700, True)]


def test_what_got_worse_since_the_operator_looked_is_not_acknowledged() -> None:
    """He acknowledged a medium one."""
    story = Story()
    story.alarms(alarm(0), alarm(4, severity="high"))
    story.command(story.desk.ack(5, story.said[0].uid)).until(6)
    assert len(story.said) == 2
    assert story.lifecycle.counters["unmatched"] == 1


def test_a_closed_finding_can_be_called_false() -> None:
    """One more revision, counted once for its detector; then it is known as such."""
    story = Story()
    story.alarms(alarm(0)).until(400)
    uid = story.said[0].uid
    story.command(story.desk.ack(500, uid, FalsePositive)).command(story.desk.ack(501, uid, FalsePositive)).until(502)
    assert [(f.state, f.revision, f.false_positive, f.handled_by) for f in story.said[1:]] == [
        ("close", 2, False, ""),
        ("close", 3, True, "alice"),
        ("close", 4, True, "alice"),
    ]
    counters = story.lifecycle.counters
    assert (counters["false_positives"], counters["false_positives.probing"], counters["acknowledged"]) == (1, 1, 1)


def test_nobody_commands_another_tenants_finding() -> None:
    """A command of tenant `other` about a finding of `acme` changes nothing, open or closed."""
    story = Story()
    story.alarms(alarm(0))
    uid = story.said[0].uid
    story.command(story.desk.ack(5, uid, tenant="other")).until(400)
    story.command(story.desk.ack(500, uid, tenant="other")).until(600)
    assert [f.acknowledged_by for f in story.said] == ["", ""]
    assert story.lifecycle.counters["unmatched"] == 2


def test_a_maintenance_window_holds_back_its_model_and_detector_only() -> None:
    """Before, after, another model, another detector, and what is critical: told."""
    story = Story()
    story.command(maintenance(story.desk, 0, 100, 200, model="m", detector="latency"))
    latency = [
        alarm(99, user="a"),
        alarm(100, user="b"),
        alarm(150, user="c", model="other"),
        alarm(160, user="d", severity="critical"),
        alarm(200, user="e"),
    ]
    story.alarms(*latency[:4], detector="latency").alarms(alarm(170, user="f")).alarms(latency[4], detector="latency")
    assert story.told() == [
        ("a", "open", 99, True),
        ("b", "open", 100, False),
        ("c", "open", 150, True),
        ("d", "open", 160, True),
        ("f", "open", 170, True),
        ("e", "open", 200, True),
    ]
    assert story.lifecycle.counters["maintained"] == 1


def test_a_command_can_be_revoked() -> None:
    """Of a suppression, the next alarm is told; of an acknowledgement, at once. What is not there is counted."""
    story = Story()
    story.command(story.desk.suppress(0)).alarms(alarm(10))
    story.command(story.desk.record(Revoke(**story.desk.head(20), command="0" * 32))).alarms(alarm(30))
    assert story.told() == [("u_1", "open", 10, False), ("u_1", "open", 30, True)]
    story.alarms(alarm(31, user="u_2"))
    story.command(story.desk.ack(40, story.said[0].uid))
    story.command(story.desk.record(Revoke(**story.desk.head(50), command=f"{story.desk.offset:032x}"))).until(51)
    assert story.told() == [("u_2", "open", 31, True), ("u_2", "update", 40, True), ("u_2", "update", 50, True)]
    story.command(story.desk.record(Revoke(**story.desk.head(52), command="f" * 32))).until(60)
    assert story.lifecycle.counters["unmatched"] == 1


def test_a_finding_names_the_change_before_it() -> None:
    """Of its tenant and model, within the hour."""
    story = Story()
    story.command(story.desk.record(Change(**story.desk.head(0), from_us=T0 + 10 * S, model="m")))
    story.alarms(alarm(9), alarm(11, user="u_2"), alarm(12, user="u_3", model="other"), alarm(3_700, user="u_4"))
    opened = {f.entity.id: f.change for f in story.said if f.state == "open"}
    assert opened == {"u_1": "", "u_2": "0" * 32, "u_3": "", "u_4": ""}
