"""Incidents: what belongs together carries one id and rings once; what does not, does not."""

from detectors.config import LifecycleConfig
from tests.detectors.commanding import Story, alarm

GUARD = {"user": "m/guard", "kind": "model"}
SESSION = {"user": "u_1/s_1", "kind": "session"}


def incidents(story: Story) -> list[tuple[str, str, int, bool]]:
    """(detector, entity, number of its incident in order of appearance, whether it leads) of each opening."""
    numbers: dict[str, int] = {}
    return [
        (f.detector, f.entity.id, numbers.setdefault(f.incident, len(numbers)), f.leads)
        for f in story.said
        if f.revision == 1
    ]


def test_the_same_actor_is_one_incident_across_detectors_and_sessions() -> None:
    """A user, two of his sessions, a block-rate spike that he drives with another: one page."""
    story = Story()
    story.alarms(alarm(0, **SESSION))
    story.alarms(alarm(1, user="u_1"), detector="token_length")
    story.alarms(alarm(2, user="u_1/s_2", kind="session"))
    story.alarms(alarm(3, by=["u_2", "u_1"], users=2, **GUARD), detector="block_rate")
    story.alarms(alarm(4, user="u_2"))
    assert incidents(story) == [
        ("probing", "u_1/s_1", 0, True),
        ("token_length", "u_1", 0, False),
        ("probing", "u_1/s_2", 0, False),
        ("block_rate", "m/guard", 0, False),
        ("probing", "u_2", 0, False),
    ]
    assert story.lifecycle.counters["incidents"] == 1


def test_others_are_incidents_of_their_own() -> None:
    """Another user, the same user id at another tenant, a user of whom latency only says that he sends much."""
    story = Story()
    story.alarms(alarm(0), alarm(1, user="u_2"), alarm(2, tenant="other"))
    story.alarms(alarm(3, by=["u_1"], user="m", kind="model"), detector="latency")
    assert [number for _, _, number, _ in incidents(story)] == [0, 1, 2, 3]
    assert all(leads for *_, leads in incidents(story))


def test_latency_of_one_model_is_one_incident() -> None:
    """Two entities of the same model; another model is another."""
    story = Story()
    story.alarms(
        alarm(0, user="m short", kind="model"),
        alarm(1, user="m long", kind="model"),
        alarm(2, user="n", kind="model", model="n"),
        detector="latency",
    )
    assert [number for _, _, number, _ in incidents(story)] == [0, 0, 1]


def test_what_is_worse_leads_again_and_so_does_its_close() -> None:
    """The second of an incident rings when its severity is above all that people were told; and rings off."""
    story = Story()
    story.alarms(alarm(0, **SESSION), alarm(1, user="u_1", severity="high"))
    story.alarms(alarm(2, user="u_1/s_2", kind="session", severity="high")).until(1_000)
    assert [(f.entity.id, f.state, f.leads) for f in story.said] == [
        ("u_1/s_1", "open", True),
        ("u_1", "open", True),
        ("u_1/s_2", "open", False),
        ("u_1/s_1", "close", True),
        ("u_1", "close", True),
        ("u_1/s_2", "close", False),
    ]


def test_updates_do_not_lead() -> None:
    """An episode of an hour rings once."""
    story = Story()
    story.alarms(*(alarm(at_s) for at_s in range(0, 3_600, 30)))
    assert [f.leads for f in story.said] == [True] + [False] * (len(story.said) - 1)
    assert len(story.said) > 50


def test_after_a_quiet_time_it_is_a_new_incident() -> None:
    """`incident_s` after the last alarm of any of its findings."""
    story = Story(LifecycleConfig(quiet_s=10, incident_s=100))
    story.alarms(alarm(0), alarm(90), alarm(191 + 10))
    assert [number for _, _, number, _ in incidents(story)] == [0, 0, 1]


def test_an_incident_outlives_its_quiet_while_its_finding_is_open() -> None:
    """The finding keeps its incident, does not ring again, and others still find it."""
    story = Story(LifecycleConfig(quiet_s=1_000, incident_s=100))
    story.alarms(alarm(0), alarm(500, user="u_2"), alarm(600))
    story.alarms(alarm(601), detector="token_length")
    assert incidents(story) == [
        ("probing", "u_1", 0, True),
        ("probing", "u_2", 1, True),
        ("token_length", "u_1", 0, False),
    ]
    assert [f.leads for f in story.said if f.revision > 1] == [False]


def test_one_busy_user_does_not_gather_everybody() -> None:
    """Incidents never merge: two that a later finding would join stay two, and it joins the older."""
    story = Story()
    story.alarms(alarm(0, user="u_1"), alarm(1, user="u_2"))
    story.alarms(alarm(2, by=["u_2", "u_1", "u_3"], users=3, **GUARD), detector="block_rate")
    story.alarms(alarm(3, user="u_2/s", kind="session"), alarm(4, user="u_3"))
    assert [number for _, _, number, _ in incidents(story)] == [0, 1, 0, 1, 0]


def test_at_the_limit_the_longest_quiet_incident_is_forgotten() -> None:
    """Counted; what would have joined it is an incident, and a page, of its own."""
    story = Story(LifecycleConfig(incidents_max=2))
    story.alarms(alarm(0), alarm(1, user="u_2"), alarm(2, user="u_3"))
    story.alarms(alarm(3), detector="token_length")
    assert [(number, leads) for _, _, number, leads in incidents(story)] == [(n, True) for n in range(4)]
    assert story.lifecycle.counters["incidents_forgotten"] == 2


def test_an_incident_is_recognised_by_a_bounded_number_of_names() -> None:
    """The first ones."""
    story = Story(LifecycleConfig(incident_links_max=2))
    story.alarms(alarm(0, by=["u_1", "u_2", "u_3"], users=3, **GUARD), detector="block_rate")
    story.alarms(alarm(1, user="u_1"), alarm(2, user="u_3"))
    assert [number for _, _, number, _ in incidents(story)] == [0, 0, 1]
