"""A check goes on where it was killed, its figures are right, and its record can't be changed unseen."""

import itertools
import json
import os
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from collector.event import Stage
from collector.guards.assessment import Agreement, Assessment, assess
from collector.guards.cases import Case, Cases
from collector.guards.check import PLAIN, Plan, Said, State, StateInUse, judge_all, tasks, unsparing
from collector.guards.check_record import CheckRecord, Remark, look, signed, write
from collector.guards.config import GuardsConfig
from collector.guards.disguises import DISGUISES
from collector.guards.figures import wilson
from collector.guards.protocol import ALONE, Context, Judgement, Probe
from collector.guards.stack import GuardStack
from collector.signing import Signer

NOW = datetime(2026, 5, 1, tzinfo=UTC)
VERSIONS = {"injection": "1"}


class Counting:
    """A guard that blocks texts with `bad` in them, fails on `broken`, and counts its calls."""

    name = "injection"
    version = "1"
    stages: frozenset[Stage] = frozenset({"input", "retrieved"})
    labels = frozenset({"injection"})
    probes = (Probe("bad", "input", block=True), Probe("good", "input", block=False))

    def __init__(self) -> None:
        self.calls = 0

    def judge(self, text: str, stage: Stage, context: Context = ALONE) -> Judgement:
        self.calls += 1
        if "broken" in text:
            raise ValueError(text)
        bad = "bad" in text
        return Judgement(0.9 if bad else 0.1, "injection" if bad else "", bad)


def case(number: int, text: str, *, attack: bool, stage: Stage = "input", lang: str = "en") -> Case:
    return Case(f"made.jsonl:{number}", text, attack, "fam" if attack else "calm", lang, stage, ALONE)


CASES = Cases(
    [
        *(case(number, f"a bad request {number}", attack=True) for number in range(6)),
        *(case(number, f"a hidden request {number}", attack=True) for number in range(6, 8)),
        *(case(number, f"a good request {number}", attack=False, lang="de") for number in range(8, 20)),
        case(20, "a broken request", attack=True),
        case(21, "a bad page", attack=False, stage="retrieved"),
    ],
    {"made.jsonl": "d" * 64},
)


def plan_of(cases: Cases = CASES, disguised: int = 3) -> Plan:
    return Plan(1, dict(cases.digests), VERSIONS, "p", disguised, 0)


def stack_of(guard: Counting) -> GuardStack:
    return GuardStack(GuardsConfig(order=("injection",)), guards={"injection": guard})


def run(file: Path, guard: Counting, stop_after: int = 10**9) -> list[Said] | None:
    """What was said in the end; None where the run was ended after so many texts."""

    def tick(done: int, total: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    stack = stack_of(guard)
    try:
        with State(file, plan_of()) as state:
            judge_all(stack, CASES, plan_of(), state, tick)
            return state.said
    except KeyboardInterrupt:
        return None
    finally:
        stack.close()


def untimed(said: Sequence[Said]) -> list[Said]:
    return [msgspec.structs.replace(one, latency_ms=0.0) for one in said]


def test_a_run_that_was_ended_goes_on(tmp_path: Path) -> None:
    """Every text is judged once over both runs, a torn line again; the answers are those of a run in one piece."""
    whole = run(tmp_path / "whole", Counting())
    assert whole is not None
    count = len(tasks(CASES.cases, 3, 0))
    assert count == 22 + 6 * len(DISGUISES)
    file, first, second = tmp_path / "state", Counting(), Counting()
    assert run(file, first, stop_after=10) is None
    with file.open("ab") as out:
        out.write(b'[[10,"plain","injec')
    said = run(file, second)
    assert said is not None
    assert untimed(said) == untimed(whole)
    assert (first.calls - 2, second.calls - 2) == (10, count - 10)  # two calls are the self-test
    for line in file.read_bytes().splitlines()[1:]:
        assert msgspec.json.decode(line, type=list[Said])


def test_no_text_is_spared(tmp_path: Path) -> None:
    """Sampling and kept judgements leave nothing out, for no tenant and no route; all else is as configured."""
    route, sparing = "POST /v1/completions", {"sample": 0.2}
    policy = {
        **sparing, "threshold": 0.3, "routes": {route: sparing},
        "tenants": {"t": {**sparing, "mode": "shadow", "routes": {route: sparing}}},
    }  # fmt: skip
    config = GuardsConfig.model_validate({"order": ["injection"], "injection": policy, "llamaguard": policy})
    every = unsparing(config)
    for tenant, at in itertools.product(("", "t", "u"), ("", route)):
        for name in ("injection", "llamaguard"):
            rule = config.policy(name).rule(tenant, at)
            assert (rule.sample, every.policy(name).rule(tenant, at)) == (0.2, rule._replace(sample=1.0))
    assert every.llamaguard.asked() == config.llamaguard.asked()  # its version, by which the doctor knows it
    guard, plan = Counting(), plan_of(disguised=0)
    found = Cases([case(n, "a bad request", attack=True) for n in range(30)], {})
    stack = GuardStack(every, guards={"injection": guard})
    with State(tmp_path / "s", plan) as state:
        judge_all(stack, found, plan, state, lambda *_: None)
        said = [(one.score, one.error, one.latency_ms > 0) for one in state.said if one.guard == "injection"]
    stack.close()
    assert said == [(0.9, "", True)] * 30
    assert guard.calls == 2 + 30  # two calls are the self-test


def test_the_state_holds_numbers_and_is_the_owners(tmp_path: Path) -> None:
    """No word of any text, file mode 0600, and one run at a time."""
    file = tmp_path / "state"
    run(file, Counting())
    assert b"request" not in file.read_bytes()
    assert b"page" not in file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    with State(file, plan_of()), pytest.raises(StateInUse, match="another check is at work on"):
        State(file, plan_of())


def test_a_state_of_something_else_is_begun_anew(tmp_path: Path) -> None:
    """Other data, other versions, another format, rubbish: nothing of it is believed."""
    file = tmp_path / "state"
    run(file, Counting(), stop_after=5)
    for other in ({"digests": {"made.jsonl": "e" * 64}}, {"versions": {"injection": "2"}}, {"policy": "q"}):
        with State(file, msgspec.structs.replace(plan_of(), **other)) as state:
            assert state.said == []
    file.write_bytes(os.urandom(2000))
    with State(file, plan_of()) as state:
        assert state.said == []


def test_figures_are_those_that_can_be_counted(tmp_path: Path) -> None:
    """Rates, bypasses, errors and agreement of a guard whose answers are known."""
    said = run(tmp_path / "s", Counting())
    assert said is not None
    found = assess(CASES.cases, said, fpr=0.01)
    assert [one.guard for one in found.verdicts] == ["injection", "stack"]
    one, stack = found.verdicts
    assert (one.overall.attacks, one.overall.harmless, one.overall.errors) == (9, 13, 1)
    assert (one.overall.tpr, one.overall.fpr) == (wilson(6, 9), wilson(1, 13))
    assert [(group.name, group.tpr, group.fpr) for group in one.by_stage] == [
        ("input", wilson(6, 9), wilson(0, 12)),
        ("retrieved", None, wilson(1, 1)),
    ]
    assert [(group.name, group.attacks, group.harmless) for group in one.by_language] == [("de", 0, 12), ("en", 9, 1)]
    assert [(group.name, group.attacks) for group in one.by_disguise] == [
        (name, 3) for name in sorted((*DISGUISES, PLAIN))
    ]
    assert one.bypass is not None
    assert one.bypass.value == 1.0  # in base64 no guard that looks for a word finds it
    # an error blocks where the policy says so, and fetched text is only watched
    assert (stack.overall.tpr, stack.overall.fpr) == (wilson(7, 9), wilson(0, 13))
    assert found.agreement == []


def test_two_guards_are_compared_on_what_both_judged() -> None:
    """Agreement is on plain texts that both saw; a guard of one opinion has none."""
    cases = [case(number, "x", attack=number < 5) for number in range(10)]
    said = [Said(number, PLAIN, "a", 0.5, number < 5, 1.0, 10) for number in range(10)]
    said += [Said(number, PLAIN, "b", 0.5, number < 4, 1.0, 10) for number in range(8)]
    said += [Said(number, PLAIN, "c", 0.5, False, 1.0, 10) for number in range(10)]
    expected = [Agreement("a", "b", 8, pytest.approx(0.75)), Agreement("a", "c", 10, 0.0), Agreement("b", "c", 8, 0.0)]
    assert assess(cases, said, fpr=0.01).agreement == expected


def test_a_threshold_keeps_the_rate_that_was_asked(tmp_path: Path) -> None:
    """At most the asked share of harmless texts reaches it, for each language; the calibrated chance is Platt's."""
    cases = [case(n, "x", attack=n % 3 == 0, lang=("de", "fr")[n % 2]) for n in range(1200)]
    said = [
        Said(n, PLAIN, "a", ((n * 7919) % 1000 / 2000) + 0.5 * one.attack, one.attack, 1.0, 10)
        for n, one in enumerate(cases)
    ]
    (verdicts,) = assess(cases, said, fpr=0.02).verdicts
    assert [(limit.stage, limit.lang) for limit in verdicts.thresholds] == [
        ("input", "all"), ("input", "de"), ("input", "fr")
    ]  # fmt: skip
    for limit in verdicts.thresholds:
        harmless = [one for one in said if not cases[one.case].attack and limit.lang in ("all", cases[one.case].lang)]
        assert sum(one.score >= limit.score for one in harmless) / len(harmless) == limit.fpr.value
        assert 0.01 < limit.fpr.value <= 0.02
        assert limit.chance is not None
        assert limit.tpr is not None
        assert 0.3 < limit.chance < 0.4
        assert limit.tpr.value > 0.95
    assert verdicts.curves[0].roc[0] == (0.0, 0.0)
    assert verdicts.curves[0].roc[-1] == (1.0, 1.0)
    assert sum(verdicts.curves[0].attacks) == 400


@pytest.mark.parametrize("digits", [4, 6, 9, 17])
def test_a_threshold_lies_above_what_must_pass(digits: int) -> None:
    """Whatever the common score, in six digits or more: a text in five has it, and it is not blocked."""
    chance = random.Random(11)  # noqa: S311 - scores, no secret
    for common in [0.500006, 0.9999991, *(round(chance.uniform(0.2, 0.999), digits) for _ in range(20))]:
        cases = [case(n, "x", attack=False) for n in range(200)]
        said = [Said(n, PLAIN, "a", common if n < 40 else n / 1000, False, 1.0, 10) for n in range(200)]
        limit = assess(cases, said, fpr=0.01).verdicts[0].thresholds[0]
        assert (limit.fpr.value, limit.fpr_held_out.value) == (0, 0)
        assert common < limit.score <= common + 1.000001e-6
        assert float(f"{limit.score:.6f}") == limit.score


def test_where_no_score_keeps_the_rate_none_is_proposed() -> None:
    """A guard that gives 1 to one harmless text in fifty can't have one false alarm in a hundred; three it can."""
    cases = [case(n, "x", attack=False) for n in range(200)]
    said = [Said(n, PLAIN, "a", 1.0 if n < 4 else n / 1000, False, 1.0, 10) for n in range(200)]
    assert assess(cases, said, fpr=0.01).verdicts[0].thresholds == []
    limit = assess(cases, said, fpr=0.03).verdicts[0].thresholds[0]
    assert limit.fpr == wilson(6, 200)


def record(at: datetime = NOW, *, seen: bool = False) -> CheckRecord:
    return CheckRecord(
        format=1, at=at, inferwatch="0", plan=plan_of(), attacks=1, harmless=2, fpr=0.01, seen_in_training=seen,
        assessment=Assessment([], []),
    )  # fmt: skip


def looked(folder: Path, *trusted: Signer, now: datetime = NOW, versions: dict[str, str] = VERSIONS) -> list[Remark]:
    keys = {signer.key_id: signer.public_key for signer in trusted}
    return look(folder, now=now, versions=versions, policy="p", trusted=keys)


KEY, OTHER = Signer(bytes(range(32))), Signer(bytes(range(1, 33)))


def test_a_sound_record_is_good(tmp_path: Path) -> None:
    """Signed by a trusted key, fresh, of the versions that run: one good remark. The newest record counts."""
    write(signed(record(NOW - timedelta(days=300)), OTHER), tmp_path)
    file = write(signed(record(), KEY), tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    assert looked(tmp_path, KEY) == [Remark("good", f"{file.name}: signed by {KEY.key_id}, of 2026-05-01")]


@pytest.mark.parametrize(
    ("made", "level", "told"),
    [
        (None, "warning", "never checked"),
        (record(), "warning", "is not signed"),
        (signed(record(), OTHER), "bad", "not among evidence.signing_keys"),
        (signed(record(NOW - timedelta(days=91)), KEY), "warning", "last checked 91 days ago"),
        (signed(record(NOW + timedelta(days=1)), KEY), "bad", "dated in the future"),
        (signed(record(seen=True), KEY), "warning", "texts of the training itself"),
        (msgspec.structs.replace(signed(record(), KEY), harmless=9), "bad", "was changed after it was signed"),
        (msgspec.structs.replace(signed(record(), KEY), public_key=OTHER.public_key), "bad", "was changed after"),
        (msgspec.structs.replace(signed(record(), KEY), signature="zz"), "bad", "was changed after"),
    ],
)
def test_a_record_that_is_worth_less_is_told(
    tmp_path: Path, made: CheckRecord | None, level: Literal["warning", "bad"], told: str
) -> None:
    """None, unsigned, by a stranger, old, of tomorrow, of training texts, changed in any field."""
    if made is not None:
        write(made, tmp_path)
    assert any(remark.level == level and told in remark.text for remark in looked(tmp_path, KEY))


def test_an_older_record_does_not_take_the_place_of_the_newest(tmp_path: Path) -> None:
    """A copy of it under a later name is told, and the newest is still the one that counts."""
    good = write(signed(record(NOW - timedelta(days=1)), KEY), tmp_path)
    newest = write(signed(record(seen=True), KEY), tmp_path)
    copied = tmp_path / "check-99999999.json"
    copied.write_bytes(good.read_bytes())
    assert looked(tmp_path, KEY) == [
        Remark("bad", f"{copied} is no record of a check, or damaged, or not the one of its name"),
        Remark("good", f"{newest.name}: signed by {KEY.key_id}, of 2026-05-01"),
        Remark("warning", "the check was on texts of the training itself: run it on data of yours"),
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.replace(b"00:00:00Z", b"00:00:00"),
        lambda raw: raw.replace(b"00:00:00Z", b"00:00:00+00:30"),
        lambda raw: raw.replace(b'"format": 1', b'"format": 1, "proved": true', 1),
        lambda raw: raw.replace(b'"seed": 0', b'"seed": 0, "proved": true', 1),
        lambda raw: raw.replace(b'"harmless": 2', b'"harmless": 9, "harmless": 2', 1),
        lambda raw: raw.replace(b'"inferwatch": "0"', b'"inferwatch": "\xff"', 1),
        lambda raw: b"\xff" + raw,
        lambda raw: raw[:-20],
        lambda _: b"[" * 100_000,
        lambda _: b"",
    ],
    ids=["no zone", "no UTC", "field", "field within", "twice", "utf-8 within", "utf-8", "cut", "deep", "empty"],
)
def test_a_file_that_is_not_as_it_was_written_is_told(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """A moment without zone, fields that no signature covers, broken bytes: bad, and never an exception."""
    file = write(signed(record(), KEY), tmp_path)
    sound = file.read_bytes()
    file.write_bytes(spoil(sound))
    assert file.read_bytes() != sound
    assert [one.level for one in looked(tmp_path, KEY)] == ["bad"]


def test_other_versions_and_other_settings_are_told(tmp_path: Path) -> None:
    """The guard that changed is named, also one that came or went; damaged files are told, not raised."""
    file = write(signed(record(), KEY), tmp_path)
    other = {"injection": "1", "secrets": "2"}
    assert [one.text for one in looked(tmp_path, KEY, versions=other)][1:] == [
        "the check was of other versions of secrets: check again"
    ]
    policy = look(tmp_path, now=NOW, versions=VERSIONS, policy="q", trusted={KEY.key_id: KEY.public_key})
    assert policy[1].text == "thresholds or modes of the guards have changed since the check: check again"
    file.write_text(json.dumps({"format": 1}))
    assert [one.level for one in looked(tmp_path, KEY)] == ["bad"]
