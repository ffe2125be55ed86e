"""Whole findings against golden files, and per detector what must not be told.

`python -m tests.detectors.test_findings` writes the golden files anew; read the difference before committing it.
"""

import json
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from collector.event import AuditEvent, GuardResult
from detectors import finding
from detectors.finding import Finding
from tests.detectors.test_demo import CONFIG
from tests.sim.campaigns import four_campaigns
from tests.sim.layout import Layout, lay_out
from tests.sim.pipe import run
from tests.sim.traffic import START_US, Traffic

GOLDEN = Path(__file__).parent.parent / "golden" / "findings"
LAYOUT = Layout(partitions=4, heartbeat_ms=1_000)
CASES = {"block_rate": "b", "campaign": "d", "probing": "r", "latency": "l", "token_length": "t", "volume": "v"}


def findings_of(traffic: Traffic) -> list[Finding]:
    return run(lay_out(traffic.events, LAYOUT), CONFIG).findings


def golden(name: str) -> list[object]:
    """Every revision of the case, as JSON objects."""
    findings = coverage_case() if name == "coverage" else findings_of(four_campaigns(1, which=CASES[name]))
    return [json.loads(finding.encode(each)) for each in findings]


def coverage_case() -> list[Finding]:
    """A lane with a hole of three records, a late event, and one from a clock two hours ahead."""
    traffic = Traffic(5)
    traffic.calm(0, 20)
    (log,) = lay_out(traffic.events, Layout(partitions=1, heartbeat_ms=1_000))
    kept = [logged for logged in log if logged.record.seq not in (30, 31, 32) or logged.record.collector_id != "c0"]
    positions = [number for number, logged in enumerate(kept) if isinstance(logged.record, AuditEvent)]
    late, ahead = positions[100], positions[110]
    for position, shift_s in ((late, -8), (ahead, 7_200)):
        record = kept[position].record
        moved = msgspec.structs.replace(record, timestamp=record.timestamp + timedelta(seconds=shift_s))
        kept[position] = type(kept[position])(moved, kept[position].append_ms, kept[position].offset)
    return run([kept], CONFIG).findings


@pytest.mark.parametrize("name", [*CASES, "coverage"])
def test_whole_findings_are_those_of_the_golden_file(name: str) -> None:
    """Every revision, every field."""
    assert golden(name) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_a_prompt_resent_thirty_times_is_no_probing_and_no_spike() -> None:
    """One client repeats one blocked prompt, the same to the letter: one trial, not thirty."""
    traffic = Traffic(2)
    traffic.calm(0, 60)
    shingles = set(range(60))
    for number in range(30):
        traffic.one(61 + number / 3, 500, 40, 32, 0, blocked=True, shingles=shingles, session=3)
    traffic.calm(60, 20)
    assert findings_of(traffic) == []


def test_a_prober_who_changes_session_each_time_is_told_as_a_user() -> None:
    """No session alone shows it; the user does."""
    traffic = Traffic(3)
    traffic.calm(0, 90)
    for number in range(12):
        traffic.one(60 + number, 501, 40, 32, 0, blocked=True, session=100 + number)
    found = [each for each in findings_of(traffic) if each.detector == "probing"]
    assert {each.entity.kind for each in found} == {"user"}


def test_blocks_by_three_users_are_told_as_few() -> None:
    """The second stream: distinct prompts of few users, none with two thirds of them."""
    traffic = Traffic(4)
    traffic.calm(0, 90)
    for number in range(15):
        traffic.one(60 + number / 2, 600 + number % 3, 40, 32, 0, blocked=True)
    told = [each for each in findings_of(traffic) if each.detector == "block_rate"]
    assert told[0].summary.endswith("(few users)")


def test_a_spike_by_callers_without_a_name_is_told() -> None:
    """No user, no key, no address: they are not one user, and no other detector knows them."""
    traffic = Traffic(2)
    traffic.calm(0, 90)
    traffic.block_burst(90)
    traffic.calm(90, 20)
    traffic.events = [msgspec.structs.replace(event, user_id="") for event in traffic.events]
    (opened,) = [each for each in findings_of(traffic) if each.state == "open"]
    assert (opened.detector, opened.contributors) == ("block_rate", [])
    assert "by callers without a name (many users)" in opened.summary


def test_a_guard_that_only_watches_or_fails_is_no_block() -> None:
    """Shadow verdicts are trials that passed; errors are no trials."""
    traffic = Traffic(6)
    traffic.calm(0, 60)
    traffic.block_burst(60)
    for decision in ("shadow", "error"):
        result = GuardResult(guard="injection", version="1", stage="input", decision=decision)
        traffic.events = [
            msgspec.structs.replace(event, guardrail_results=[result], blocked=False, status="ok", response_tokens=20)
            for event in traffic.events
        ]
        assert findings_of(traffic) == []


@pytest.mark.parametrize("others", [[], [GuardResult(guard="secrets", version="1", stage="input", decision="allow")]])
def test_a_guard_that_fails_closed_makes_nobody_an_attacker(others: list[GuardResult]) -> None:
    """For three minutes every request of thirty users is blocked because a guard failed: none is evidence."""
    traffic = Traffic(3)
    traffic.calm(0, 300)
    failed = GuardResult(guard="injection", version="1", stage="input", decision="error", error="DeadlineExceeded")
    traffic.events = [
        msgspec.structs.replace(event, guardrail_results=[failed, *others], blocked=True, status="blocked_input")
        if event.timestamp.timestamp() > START_US / 1e6 + 120
        else event
        for event in traffic.events
    ]
    assert findings_of(traffic) == []


def test_heavier_prompts_alone_are_no_slow_model() -> None:
    """A third of the calls becomes ten times heavier and slower, each as slow as its size always was."""
    traffic = Traffic(7)
    for begin_s in (0, 60):
        traffic.calm(begin_s, 60)
        at_s = float(begin_s)
        while at_s < begin_s + 60:
            traffic.one(at_s, 30, 3_000, 48, 30)
            at_s += 2.0 if begin_s == 0 else 0.25
    assert [each for each in findings_of(traffic) if each.detector == "latency"] == []


def test_one_slow_window_is_no_finding() -> None:
    """A hiccup of four seconds: two adjoining windows are needed."""
    traffic = Traffic(8)
    traffic.calm(0, 90)
    traffic.calm(90, 4, slow=5.0)
    traffic.calm(94, 60)
    assert findings_of(traffic) == []


def test_one_freakish_completion_a_user_is_no_finding() -> None:
    """Twenty users with one long answer each: one completion is never enough."""
    traffic = Traffic(9)
    traffic.calm(0, 90)
    traffic.long_answers(90, users=20)
    traffic.calm(90, 12)
    assert findings_of(traffic) == []


def test_a_guard_that_blocks_twice_as_much_all_day_becomes_normal() -> None:
    """After a day of the new level the baseline takes it, and the episode closes."""
    traffic = Traffic(10, rate=0.2, block_rate=0.3)
    traffic.calm(0, 2.2 * 86_400)
    only = CONFIG.model_copy(
        update={
            name: getattr(CONFIG, name).model_copy(update={"enabled": False})
            for name in ("latency", "probing", "token_length")
        }
    )
    layout = Layout(partitions=1, heartbeat_ms=20_000)
    findings = run(lay_out(traffic.events, layout), only).findings
    assert [each.state for each in findings][-1] == "close"
    assert findings[-1].updated_us < findings[0].updated_us + int(1.3 * 86_400e6)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case in (*CASES, "coverage"):
        (GOLDEN / f"{case}.json").write_text(json.dumps(golden(case), indent=1, ensure_ascii=False) + "\n")
