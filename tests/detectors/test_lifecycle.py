"""Episodes: open, update, close; the same uid and revisions however time is cut."""

import msgspec

from detectors.catalogue import cards
from detectors.config import LifecycleConfig
from detectors.detector import Alarm
from detectors.finding import Entity, Finding, Severity, Statistic, finding_uid
from detectors.lifecycle import Lifecycle

S = 1_000_000
T0 = 1_800_000_000 * S
ENTITY = Entity(kind="user", id="u_1")
CONFIG = LifecycleConfig(quiet_s=300, update_s=60)


def alarm(at_s: int, *, severity: Severity = "medium", user: str = "u_1", observed: float = 1.0) -> Alarm:
    return Alarm(
        tenant="acme",
        entity=Entity(kind="user", id=user),
        model="m",
        at_us=T0 + at_s * S,
        first_seen_us=T0 + at_s * S - 1,
        last_seen_us=T0 + at_s * S,
        severity=severity,
        confidence="low",
        statistic=Statistic(name="x", observed=observed, baseline=0.0, threshold=1.0),
        counts={"n": at_s},
        summary=f"at {at_s}",
        offsets={0: (at_s, at_s)},
        samples=[(at_s, f"e{at_s}")],
    )


def lifecycle(config: LifecycleConfig = CONFIG) -> Lifecycle:
    made = Lifecycle(config, cards(), "digest")
    made.topics = {0: "iw.events"}
    return made


def told(findings: list[Finding]) -> list[tuple[str, int, int, str]]:
    """(state, revision, seconds after T0, summary)."""
    return [(each.state, each.revision, (each.updated_us - T0) // S, each.summary) for each in findings]


def test_an_episode_opens_is_updated_at_most_once_a_minute_and_closes_when_quiet() -> None:
    """Ten alarms in ninety seconds make one open, updates at 60 and 120, one close."""
    episodes = lifecycle()
    said: list[Finding] = []
    for at_s in range(0, 100, 10):
        said += episodes.advance(T0 + at_s * S - 1) + episodes.alarm("probing", alarm(at_s))
    said += episodes.advance(T0 + 1_000 * S)
    assert told(said) == [
        ("open", 1, 0, "at 0"),
        ("update", 2, 60, "at 60"),
        ("update", 3, 120, "at 90"),
        ("close", 4, 390, "at 90"),
    ]
    assert {each.uid for each in said} == {finding_uid("acme", "probing", ENTITY, T0)}
    assert said[-1].evidence.offsets[0].first == 0
    assert said[-1].evidence.offsets[0].last == 90
    assert said[-1].evidence.event_ids == ["e0", "e10", "e20", "e30", "e40"]
    assert episodes.open_episodes == 0


def test_a_rise_in_severity_is_told_at_once_and_never_taken_back() -> None:
    """Medium, high, medium again: the update is immediate, the close is high."""
    episodes = lifecycle()
    said = episodes.alarm("probing", alarm(0))
    said += episodes.alarm("probing", alarm(1, severity="high"))
    said += episodes.alarm("probing", alarm(2))
    said += episodes.advance(T0 + 900 * S)
    assert [(each.state, each.severity) for each in said] == [
        ("open", "medium"),
        ("update", "high"),
        ("update", "high"),
        ("close", "high"),
    ]


def test_one_long_step_says_what_many_short_steps_say() -> None:
    """advance(1000) equals advance(1), advance(2), …"""
    long, short = lifecycle(), lifecycle()
    for episodes in (long, short):
        for at_s, user in ((0, "u_1"), (5, "u_2"), (30, "u_1")):
            episodes.alarm("probing", alarm(at_s, user=user))
    stepwise = [each for second in range(31, 1_000) for each in short.advance(T0 + second * S)]
    assert long.advance(T0 + 999 * S) == stepwise != []


def test_a_new_alarm_after_the_close_is_a_new_episode() -> None:
    """Another uid, revision 1."""
    episodes = lifecycle()
    first = episodes.alarm("probing", alarm(0))[0]
    episodes.advance(T0 + 400 * S)
    second = episodes.alarm("probing", alarm(400))[0]
    assert (second.revision, second.state) == (1, "open")
    assert second.uid != first.uid


def test_at_the_limit_the_longest_quiet_episode_closes_early() -> None:
    """Bounded, told and counted: nothing disappears without a close."""
    episodes = lifecycle(LifecycleConfig(episodes_max=2))
    for at_s, user in ((0, "u_1"), (1, "u_2"), (2, "u_1")):
        episodes.alarm("probing", alarm(at_s, user=user))
    said = episodes.alarm("probing", alarm(3, user="u_3"))
    assert [(each.state, each.entity.id) for each in said] == [("close", "u_2"), ("open", "u_3")]
    assert (episodes.open_episodes, episodes.counters["closed_early"]) == (2, 1)


def test_at_the_limit_a_flood_closes_its_own_tenants_episodes() -> None:
    """One tenant's five users come one after the other; another tenant's finding, quiet for longest, stays open."""
    episodes = lifecycle(LifecycleConfig(episodes_max=3))
    episodes.alarm("probing", msgspec.structs.replace(alarm(0, user="u_victim"), tenant="other"))
    said = [each for at_s in range(1, 6) for each in episodes.alarm("probing", alarm(at_s, user=f"u_{at_s}"))]
    assert [each.entity.id for each in said if each.state == "close"] == ["u_1", "u_2", "u_3"]


def test_the_strongest_window_describes_an_episode_whose_peak_speaks() -> None:
    """A latency episode is not told by its last, mildest window."""
    episodes = lifecycle()
    for at_s, observed in ((0, 5.0), (1, 9.0), (2, 3.0)):
        episodes.alarm("latency", msgspec.structs.replace(alarm(at_s, observed=observed), peak_speaks=True))
    closed = episodes.advance(T0 + 900 * S)[-1]
    assert (closed.summary, closed.last_seen_us) == ("at 1", T0 + 2 * S)


def test_a_snapshot_goes_on_where_it_was() -> None:
    """Deadlines included."""
    episodes = lifecycle()
    episodes.alarm("probing", alarm(0))
    episodes.alarm("probing", alarm(10))
    other = lifecycle()
    other.restore(episodes.snapshot())
    assert other.advance(T0 + 900 * S) == episodes.advance(T0 + 900 * S) != []


def test_a_tenant_with_spaces_and_quotes_can_be_pasted_into_a_shell() -> None:
    """The replay command quotes what it names."""
    said = lifecycle().alarm("probing", msgspec.structs.replace(alarm(0), tenant="a b'; rm -rf /"))
    assert """--tenant 'a b'"'"'; rm -rf /' --from""" in said[0].evidence.replay
