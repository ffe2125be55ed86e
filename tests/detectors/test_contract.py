"""One contract for every detector: what any new one must keep, picked up from the catalogue."""

import builtins
import datetime as dt
import random
import time
from collections import Counter

import msgspec
import numpy as np
import pytest

from collector.event import AuditEvent, Decision, GuardResult, decode_all, encode, timestamp_us
from detectors import finding, rollup
from detectors.catalogue import cards, detectors
from detectors.chunk import Chunk, in_order
from detectors.columns import EVERYTHING, Columns, columns_of, picked
from detectors.config import DetectConfig
from detectors.detector import Alarm, Detector, StageOne, StageTwo, printable
from detectors.lifecycle import RANK
from detectors.registry import Registry
from detectors.rollup import Cell, Partial, Signal
from detectors.time import SECOND_US
from tests.detectors.test_demo import CONFIG
from tests.sim.campaigns import DEMO, four_campaigns
from tests.sim.layout import Layout, lay_out, partition_of
from tests.sim.pipe import run
from tests.sim.traffic import TENANT, Traffic

STAGED = [detector for detector in detectors() if detector.stage_one is not None]
NAMES = [detector.card.name for detector in STAGED]


def seconds(
    events: list[AuditEvent], *, step: int = 1, reads: frozenset[str] = EVERYTHING
) -> list[tuple[int, Columns]]:
    """Events of `step` seconds at a time, in order, each with the last of its seconds."""
    clean = [event for event in map(printable, events) if isinstance(event, AuditEvent)]
    moments = np.array([timestamp_us(event.timestamp) for event in clean], np.int64)
    numbers = np.arange(len(clean))
    whole = in_order(columns_of(clean, [encode(event) for event in clean], numbers, moments, reads), numbers)
    blocks = whole.moment_us // SECOND_US // step
    return [(int(block + 1) * step - 1, picked(whole, np.flatnonzero(blocks == block))) for block in np.unique(blocks)]


def part_of(columns: Columns, parts: int, part: int) -> Columns:
    """The events that a partition would have."""
    events = [event for event in decode_all(columns.raws)[0] if isinstance(event, AuditEvent)]
    return picked(columns, np.array([i for i, e in enumerate(events) if partition_of(e, parts) == part], np.int64))


def staged(detector: Detector, seed: int) -> list[AuditEvent]:
    """The demo, and for two detectors the campaigns that the demo leaves out."""
    return four_campaigns(seed, which="brlt" + {"campaign": "d", "volume": "v"}.get(detector.card.name, "")).events


class Halves:
    """A detector alone: `parts` first halves, told apart by user, and the second half."""

    def __init__(self, detector: Detector, parts: int = 1, config: DetectConfig = CONFIG) -> None:
        self.detector, self.config, self.parts = detector, config, parts
        self.ones = [self.new_one() for _ in range(parts)]
        self.two: StageTwo = detector.stage_two(config)

    def new_one(self) -> tuple[StageOne, Registry]:
        assert self.detector.stage_one is not None
        registry = Registry(self.config.entities_max)
        return self.detector.stage_one(self.config, registry), registry

    def told(self, columns: Columns) -> dict[int, list[Partial | Signal]]:
        """What the first halves say of some seconds, by second."""
        found: dict[int, list[Partial | Signal]] = {}
        for part, (one, registry) in enumerate(self.ones):
            mine = part_of(columns, self.parts, part) if self.parts > 1 else columns
            if len(mine):
                for rollup_ in one.events(Chunk(mine, part, registry)):
                    found.setdefault(rollup_.second, []).append(rollup_)
        return found

    def second(self, second: int, told: list[Partial | Signal]) -> list[Alarm]:
        alarms = list(self.two.advance(second))
        merged: dict[tuple[str, str], Cell] = {}
        for each in told:
            if isinstance(each, Partial):
                merged.setdefault((each.tenant, each.key), Cell()).absorb(each)
        rows = [(*name, merged[name]) for name in sorted(merged)]
        alarms += self.two.second(second, rows) if rows else []
        signals = [each for each in told if isinstance(each, Signal)]
        for signal in sorted(signals, key=lambda signal: (signal.tenant, signal.key)):
            alarms += self.two.signal(signal)
        return alarms

    def restart(self) -> None:
        """New halves from snapshots of the old."""
        old, self.ones = self.ones, [self.new_one() for _ in self.ones]
        for (one, registry), (other, others) in zip(self.ones, old, strict=True):
            registry.load(others.dump())
            one.restore(other.snapshot())
        raw = self.two.snapshot()
        self.two = self.detector.stage_two(self.config)
        self.two.restore(raw)


def alarms_of(halves: Halves, events: list[AuditEvent], *, restart: bool = False, step: int = 1) -> list[Alarm]:
    found = []
    for _, columns in seconds(events, step=step):
        for second, told in sorted(halves.told(columns).items()):
            found += halves.second(second, told)
        if restart:
            halves.restart()
    return found


def bare(alarms: list[Alarm]) -> list[Alarm]:
    return [msgspec.structs.replace(alarm, offsets={}) for alarm in alarms]


@pytest.mark.parametrize("detector", STAGED, ids=NAMES)
def test_partitions_merged_say_what_one_partition_says(detector: Detector) -> None:
    """merge = sequential, on the whole demo, over 1, 4 and 16 parts."""
    events = staged(detector, 11)
    wanted = bare(alarms_of(Halves(detector), events))
    assert wanted
    for parts in (4, 16):
        assert bare(alarms_of(Halves(detector, parts), events)) == wanted


@pytest.mark.parametrize("detector", STAGED, ids=NAMES)
def test_a_snapshot_restored_after_every_second_changes_nothing(detector: Detector) -> None:
    """snapshot then restore gives the same half, counters included."""
    events = staged(detector, 12)
    plain, restarted = Halves(detector, 2), Halves(detector, 2)
    assert alarms_of(restarted, events, restart=True) == alarms_of(plain, events)
    assert [one.counters for one, _ in restarted.ones] == [one.counters for one, _ in plain.ones]
    assert restarted.two.counters == plain.two.counters


@pytest.mark.parametrize("detector", STAGED, ids=NAMES)
def test_a_detector_keeps_to_its_key_and_to_what_it_reads(detector: Detector) -> None:
    """Partials have as many names as the declared key; with only the declared columns filled in it says the same."""
    events = staged(detector, 19)
    assert detector.reads <= EVERYTHING
    said = []
    for reads in (EVERYTHING, detector.reads):
        halves = Halves(detector)
        told = [
            each for _, part in seconds(events, reads=reads) for found in halves.told(part).values() for each in found
        ]
        partials = [each for each in told if isinstance(each, Partial)]
        assert all(len(each.key.split("\n")) + 1 == len(detector.card.key) for each in partials)
        said.append([rollup.encode(each) for each in told])
    assert said[0] == said[1] != []


@pytest.mark.parametrize("detector", STAGED, ids=NAMES)
def test_what_is_said_of_a_second_does_not_depend_on_where_a_chunk_ends(detector: Detector) -> None:
    """One second at a time, seven, or all at once: the same partials and signals."""
    events = staged(detector, 18)

    def told(step: int) -> list[bytes]:
        halves = Halves(detector)
        said = [each for _, columns in seconds(events, step=step) for _, each in sorted(halves.told(columns).items())]
        return sorted(rollup.encode(each) for several in said for each in several)

    wanted = told(1)
    assert wanted
    assert told(7) == wanted
    assert told(10**6) == wanted


def test_detectors_read_no_clock_and_draw_no_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo with every clock, random source and file broken."""
    logs = lay_out(four_campaigns(13).events, Layout(partitions=2, heartbeat_ms=1_000))
    wanted = [finding.encode(each) for each in run(logs, CONFIG, batch=100).findings]

    def forbidden(*_: object, **__: object) -> object:
        raise AssertionError("a detector reached outside")

    class NoClock(dt.datetime):
        now = utcnow = today = forbidden  # type: ignore[assignment]  # broken on purpose

    for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "sleep"):
        monkeypatch.setattr(time, name, forbidden)
    monkeypatch.setattr(dt, "datetime", NoClock)
    for name in ("random", "randrange", "choice", "getrandbits"):
        monkeypatch.setattr(random, name, forbidden)
    monkeypatch.setattr("os.urandom", forbidden)
    monkeypatch.setattr(builtins, "open", forbidden)
    out = run(logs, CONFIG, batch=100)
    monkeypatch.undo()
    assert [finding.encode(each) for each in out.findings] == wanted


@pytest.mark.parametrize("detector", STAGED, ids=NAMES)
def test_nothing_is_said_of_nothing(detector: Detector) -> None:
    """Empty input: no alarm, snapshots that restore."""
    halves = Halves(detector)
    halves.restart()
    assert halves.second(1_800_000_000, []) == []
    assert list(halves.two.advance(2_000_000_000)) == []


@pytest.mark.parametrize("detector", STAGED, ids=NAMES)
def test_hostile_events_break_nothing(detector: Detector) -> None:
    """Every field at its bounds, in any combination that the schema lets through."""
    rng = random.Random(14)  # noqa: S311 seeded on purpose
    template = Traffic(14)
    template.calm(0, 60)
    events = [_hostile(event, rng) for event in template.events for _ in range(3)]
    halves = Halves(detector, 3)
    for alarm in alarms_of(halves, events, restart=True):
        assert alarm.severity in RANK
        assert "\n" not in alarm.summary


DECISIONS: list[Decision] = ["allow", "block", "shadow", "error"]


def _hostile(event: AuditEvent, rng: random.Random) -> AuditEvent:
    pick = rng.choice
    results = [
        GuardResult(guard=pick(["", "g", "g\n", "\x00", "é" * 200]), version="", stage="input", decision=decision)
        for decision in rng.sample(DECISIONS, rng.randrange(5))
    ]
    return msgspec.structs.replace(
        event,
        event_id=f"{rng.randrange(10**9)}",
        tenant=pick(["", "a", "a\nb", "\x00"]),
        user_id=pick(["", "u_1", "u_2", "u_\n"]),
        api_key=pick(["", "k_1"]),
        client_address=pick(["", "a_1"]),
        session_id=pick(["", "s_1", "s/2", "s\n"]),
        model_version=pick(["", "m", "m\nx", "m@é"]),
        guardrail_results=results,
        response_tokens=pick([0, 1, 2**53]),
        prompt_tokens=pick([0, 1, 2**53]),
        max_tokens=pick([0, 2**53]),
        latency_ms=pick([0.0, 1e-9, 1e10]),
        ttft_ms=pick([None, 0.0, 1e10]),
        queue_ms=pick([None, 0.0, 1e10]),
        ms_per_output_token=pick([None, 0.0, 1e10]),
        n=pick([0, 1, 65_536]),
        blocked=pick([True, False]),
        status=pick(["ok", "blocked_input", "blocked_output", "rejected", "aborted", "error", "lost"]),
        turn_hash=pick(["", "hmac:1"]),
        prompt_hash=pick(["", "hmac:2"]),
        minhash=pick(["", "!!!", "AAAA", "AAA", "A" * 1024, event.minhash]),
    )


SMALL = {
    "block_rate": {"users_max": 20, "keys_max": 5},
    "campaign": {"users_max": 20, "families_max": 20, "passed_max": 4},
    "latency": {"keys_max": 5, "window_s": 2, "min_calls": 10},
    "probing": {"suspects_max": 20},
    "volume": {"users_max": 5, "keys_max": 100, "sessions_max": 5, "requests_min": 1, "tenants_max": 1},
    "token_length": {"users_max": 5, "keys_max": 5, "baseline_calls_min": 20, "settle_s": 1},
}


@pytest.mark.parametrize("detector", STAGED, ids=NAMES)
def test_memory_stays_bounded_under_a_flood_of_made_up_names(detector: Detector) -> None:
    """Three times as many users, models and sessions, the same state; what was dropped is counted."""
    name = detector.card.name
    config = DetectConfig.model_validate({name: SMALL[name], "entities_max": 1_000})
    halves = Halves(detector, config=config)
    sizes = []
    for begin_s, span_s in ((0, 900), (900, 1_800)):
        traffic = Traffic(15, rate=20, users=5_000, block_rate=0.3)
        traffic.calm(begin_s, span_s)
        models = [f"m{number % 40}" for number in range(len(traffic.events))]
        events = [
            msgspec.structs.replace(event, model_version=model, session_id=f"s_{number}")
            for number, (event, model) in enumerate(zip(traffic.events, models, strict=True))
        ]
        alarms_of(halves, events)
        ones = sum(len(one.snapshot()) + len(registry.dump()) for one, registry in halves.ones)
        sizes.append(ones + len(halves.two.snapshot()))
    print("bytes of state", sizes)
    assert sizes[1] < 2 * sizes[0] + 20_000
    dropped = Counter[str]()
    ones_counters = [counters for one, registry in halves.ones for counters in (one.counters, registry.counters)]
    for counters in (*ones_counters, halves.two.counters):
        dropped.update({key: value for key, value in counters.items() if "evicted" in key or "refused" in key})
    assert dropped.total() > 0


@pytest.mark.parametrize("name", ["block_rate", "campaign", "latency", "token_length", "volume"])
def test_what_is_gone_for_a_month_makes_room_for_what_is_new(name: str) -> None:
    """A table with room for one tenant's one model and its two guards: the next is refused a day later, but not a
    month later."""
    detector = next(detector for detector in STAGED if detector.card.name == name)
    limit = {"block_rate": {"keys_max": 2}, "latency": {"keys_max": 1}, "token_length": {"keys_max": 1}}
    halves = Halves(detector, config=DetectConfig.model_validate({name: limit.get(name, {"tenants_max": 1})}))
    known = []
    for day in (0, 1, 30):
        traffic = Traffic(18, block_rate=0.5)
        traffic.calm(86_400 * day, 20)
        model, tenant = f"model-of-{day}", f"tenant-of-{day}"
        events = [msgspec.structs.replace(event, model_version=model, tenant=tenant) for event in traffic.events]
        alarms_of(halves, events)
        known.append([f"-of-{number}".encode() in halves.two.snapshot() for number in (0, 1, 30)])
    assert known == [[True, False, False], [True, False, False], [False, False, True]]


@pytest.mark.parametrize("name", sorted(cards()))
def test_every_detector_explains_itself(name: str) -> None:
    """A version, three things to check, ids of the right shape."""
    card = cards()[name]
    assert card.name == name
    assert card.version
    assert len(card.runbook) == 3
    assert all(step.strip() == step and step for step in card.runbook)
    assert all(technique.startswith("AML.T") for technique in card.atlas)
    assert all(entry.startswith("LLM") for entry in card.owasp)


def test_every_finding_is_bounded_and_explains_itself() -> None:
    """Of the whole demo: one line, at most five samples and contributors, a replay command, an episode that closes."""
    findings = run(lay_out(four_campaigns(16).events, Layout(partitions=16)), CONFIG).findings
    assert {each.detector for each in findings} == set(DEMO)
    for each in findings:
        assert "\n" not in each.summary
        assert 1 <= len(each.evidence.event_ids) <= 5
        assert 1 <= len(each.evidence.offsets) <= CONFIG.lifecycle.offset_ranges_max
        assert len(each.contributors) <= 5
        assert each.evidence.replay.startswith(f"inferwatch backtest --detector {each.detector} --tenant {TENANT} ")
        assert each.statistic.observed >= each.statistic.threshold > 0
        assert each.cold_start
        assert each.first_seen_us < each.last_seen_us <= each.updated_us
        assert finding.decode(finding.encode(each)) == each
    episodes = {each.uid: [other for other in findings if other.uid == each.uid] for each in findings}
    for revisions in episodes.values():
        assert [each.revision for each in revisions] == list(range(1, len(revisions) + 1))
        assert [revisions[0].state, revisions[-1].state] == ["open", "close"]


def test_no_prompt_hash_or_sketch_reaches_a_rollup_or_finding() -> None:
    """Rollups and findings carry pseudonyms, counts and event ids; digests of prompts stay in stage 1's state."""
    events = four_campaigns(17).events
    halves = Halves(next(detector for detector in STAGED if detector.card.name == "probing"))
    told = [
        rollup.encode(each) for _, columns in seconds(events) for said in halves.told(columns).values() for each in said
    ]
    assert told
    assert not any(b"hmac:" in raw for raw in told)
