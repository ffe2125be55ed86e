"""Every panel's SQL on a real store, and answers that were worked out by hand."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from dashboards.panel import Panel
from dashboards.panels import BY_NAME, PANELS
from dashboards.window import between
from detectors.budget import PARTS
from tests.dashboards import day
from tests.dashboards.conftest import HOURS_S, SEED
from tests.dashboards.stored import StoreProcess

START_US = 1_790_002_800_000_000
"""A whole hour; later than any retention reaches back."""


def asked(store: StoreProcess, name: str, from_us: int, to_us: int, tenant: str = "") -> list[dict[str, object]]:
    """The panel's answer over a stretch of time."""
    window = between(from_us // 1000, to_us // 1000)
    return store.query(BY_NAME[name].query(), {**window.parameters(), "tenant": tenant})


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_every_panel_answers_with_the_columns_it_draws(seeded: StoreProcess, end_us: int, panel: Panel) -> None:
    """On the seeded store each panel has rows, and each row the columns that its kind needs."""
    rows = asked(seeded, panel.name, end_us - 7_200_000_000, end_us + 1_000_000)
    needed = {
        "timeseries": {"time", "series", "value"} if panel.by else {"time", *(s.column for s in panel.series)},
        "table": {column.column for column in panel.columns},
        "stat": {"value", *(series.column for series in panel.series)},
        "status": {"label", "value", "tone"},
    }[panel.kind]
    assert rows
    assert all(needed <= set(row) for row in rows)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_no_panel_fails_on_an_empty_store(empty: StoreProcess, end_us: int, panel: Panel) -> None:
    """Without a single row, plots and tables answer nothing, and figures answer one row without a made-up value."""
    rows = asked(empty, panel.name, end_us - 3_600_000_000, end_us)
    match panel.kind:
        case "stat":
            assert [row["value"] in (None, 0) for row in rows] == [True]
        case "status":
            assert {row["value"] for row in rows} == {"0"}
        case _:
            assert rows == []


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    """Twelve events in two minutes whose figures can be worked out on paper."""
    maker = day.Maker(1, [0])
    minute = 60_000_000
    rows = [
        # minute 0: ten answered with latencies 100 … 1,000 ms and 1 … 10 tokens, two of them of tenant `other`
        *(
            maker.event(
                START_US + number * 1_000_000,
                f"user-{number % 2}",
                number=number,
                latency_ms=100.0 * number,
                response_tokens=number,
                prompt_tokens=10,
                tenant="other" if number > 8 else "acme",
            )
            for number in range(1, 11)
        ),
        # minute 1: one blocked, one rejected before the engine, one answered, one duplicate that must not count
        maker.event(START_US + minute, "user-0", number=21, blocked=True),
        maker.event(START_US + minute + 1, "user-0", number=22, status="rejected", guardrail_results=[]),
        maker.event(START_US + minute + 2, "user-1", number=23, latency_ms=50.0, response_tokens=4),
        maker.event(START_US + minute + 3, "user-1", number=24, latency_ms=9e9)._replace(flag="duplicate"),
        maker.event(START_US + minute + 4, "user-1", number=25, latency_ms=9e9)._replace(flag="quarantined"),
    ]
    store = StoreProcess(tmp_path_factory.mktemp("by_hand") / "store")
    store.fill(rows)
    yield store
    store.close()


def test_what_was_called_false_is_held_against_each_detectors_share(
    tmp_path_factory: pytest.TempPathFactory, end_us: int
) -> None:
    """A tenant of two weeks whose three block-rate findings were called false thrice: 1.5 a week where 0.5 are allowed;
    a verdict of five weeks ago counts no more, one tenant's verdicts are not another's, and no finding is no alarm."""
    day_us = 86_400_000_000
    maker = day.Maker(1, [0])
    events = [maker.event(end_us - age * day_us, "u", number=age, tenant="acme") for age in (1, 14)]
    events.append(maker.event(end_us - day_us, "u", number=30, tenant="other"))
    template = next(each for each in day.findings(end_us) if each.detector == "block_rate")
    verdicts = [("acme", 1, True), ("acme", 2, True), ("acme", 13, True), ("acme", 3, False), ("acme", 35, True)]
    findings = [
        msgspec.structs.replace(
            template, uid=f"{number:032x}", tenant=tenant, first_seen_us=end_us - age * day_us, false_positive=verdict
        )
        for number, (tenant, age, verdict) in enumerate([*verdicts, ("other", 1, False)])
    ]
    store = StoreProcess(tmp_path_factory.mktemp("verdicts") / "store")
    store.fill(events, findings)
    rows = asked(store, "false_alarms", end_us - 3_600_000_000, end_us)
    one = asked(store, "false_alarms", end_us - 3_600_000_000, end_us, tenant="other")
    store.close()
    assert len(rows) == 2 * len(PARTS)
    assert rows[0] == {
        "tenant": "acme",
        "detector": "block_rate",
        "findings": 4,
        "called_false": 3,
        "a_week": pytest.approx(1.5, 1e-3),
        "budget": 0.5,
        "of_budget": pytest.approx(3.0, 1e-3),
    }
    assert {row["called_false"] for row in rows[1:]} == {0}
    assert {(row["tenant"], row["findings"]) for row in one} == {("other", 1), ("other", 0)}


def test_the_block_rate_is_blocked_over_all_that_count(by_hand: StoreProcess) -> None:
    """One of three requests of minute 1; the duplicate and the quarantined one are no requests."""
    rows = asked(by_hand, "block_rate", START_US, START_US + 7_200_000_000)
    values = [(row["time"].minute, row["series"], row["value"]) for row in rows]  # type: ignore[attr-defined]
    assert values == [(0, day.MODELS[0], 0.0), (1, day.MODELS[0], pytest.approx(1 / 3))]


def test_a_guards_block_rate_is_over_the_requests_it_judged(by_hand: StoreProcess) -> None:
    """The rejected request was judged by no guard: 1 of 2 for `injection`, 0 of 1 for the guard of answers."""
    rows = asked(by_hand, "guards", START_US, START_US + 7_200_000_000)
    assert [(row["series"], row["value"]) for row in rows if row["time"].minute == 1] == [  # type: ignore[attr-defined]
        ("injection", 0.5),
        ("output-policy", 0.0),
        ("secrets", 0.0),
    ]


def test_latency_quantiles_are_those_of_the_answered_requests(by_hand: StoreProcess) -> None:
    """Of 100 … 1,000 ms the median is 600 (the sixth, as quantileExact counts) and p99 1,000; refusals don't count."""
    rows = asked(by_hand, "latency", START_US, START_US + 7_200_000_000)
    assert [(row["p50"], row["p99"]) for row in rows] == [(600.0, 1000.0), (50.0, 50.0)]


def test_a_tenant_sees_its_own_events_only(by_hand: StoreProcess) -> None:
    """Two of the twelve are the other tenant's; a name with a quote in it is a name and finds nothing."""
    counts = [
        asked(by_hand, "request_count", START_US, START_US + 120_000_000, tenant)[0]["value"]
        for tenant in ("", "acme", "other", "acme' OR '1'='1")
    ]
    assert counts == [13, 11, 2, 0]


def test_the_account_says_what_was_left_out(by_hand: StoreProcess) -> None:
    """All 15 rows are in it: 13 that count, one duplicate, one quarantined."""
    rows = asked(by_hand, "account", START_US, START_US + 120_000_000)
    assert [(str(row["label"]).partition(",")[0].partition(":")[0], row["value"], row["tone"]) for row in rows] == [
        ("stored", "15", ""),
        ("on Kafka", "0", ""),
        ("unusable", "0", ""),
        ("late", "0", ""),
        ("duplicates", "1", ""),
        ("quarantined", "1", "bad"),
        ("lost", "0", ""),
    ]


def test_the_account_tells_what_is_on_its_way(seeded: StoreProcess, end_us: int) -> None:
    """Records that the store's process has still to read, and those it could not use, are in the account."""
    rows = asked(seeded, "account", end_us - 3_600_000_000, end_us)
    assert [(row["value"], row["tone"]) for row in rows[1:3]] == [("31", ""), ("2", "bad")]


def test_sessions_are_ranked_by_distinct_blocked_prompts(seeded: StoreProcess, end_us: int) -> None:
    """The one who rephrases comes first, with as many prompts as were blocked; the figures match a count in Python."""
    rows = asked(seeded, "probing_sessions", end_us - HOURS_S * 1_000_000, end_us + 1_000_000)
    made, _ = day.seeded(SEED, end_us, day_s=HOURS_S)
    prompts: dict[str, set[str]] = {}
    for row in made:
        if row.event.blocked:
            key = f"{row.event.user_id}/{row.event.session_id}"
            prompts.setdefault(key, set()).add(row.event.prompt_hash)
    assert rows[0]["entity_id"] == f"{day.user_id('prober')}/{day.session_id('prober')}"
    assert {row["entity_id"]: row["prompts"] for row in rows[:20]} == {
        row["entity_id"]: len(prompts[str(row["entity_id"])]) for row in rows[:20]
    }


def test_the_seeded_stretch_matches_a_count_in_python(seeded: StoreProcess, end_us: int) -> None:
    """Requests, block share and tokens over the last two hours are those of the events that were put in."""
    window = between((end_us - 7_200_000_000) // 1000, end_us // 1000 + 1000)
    made, _ = day.seeded(SEED, end_us, day_s=HOURS_S)
    inside = [row.event for row in made if window.from_ms <= row.event.timestamp.timestamp() * 1000 < window.to_ms]
    parameters = {**window.parameters(), "tenant": "acme"}
    names = ("request_count", "block_share", "tokens_generated")
    requests, share, tokens = (seeded.query(BY_NAME[name].query(), parameters)[0]["value"] for name in names)
    assert requests == len(inside)
    assert math.isclose(float(str(share)), statistics.fmean(event.blocked for event in inside))
    assert tokens == sum(event.response_tokens for event in inside)
    rows = seeded.query(BY_NAME["requests"].query(), parameters)
    by_status = Counter(event.status for event in inside)
    counted: Counter[str] = Counter()
    for row in rows:
        counted[str(row["series"])] += round(float(str(row["value"])) * window.bucket_s / 60)
    assert counted == by_status


def test_findings_come_open_and_severe_first_in_their_newest_revision(seeded: StoreProcess, end_us: int) -> None:
    """Four findings of three revisions each are four rows; the closed one is last, though it is `high`."""
    rows = asked(seeded, "findings", end_us - 3 * 3_600_000_000, end_us)
    assert [(row["detector"], row["severity"], row["state"]) for row in rows] == [
        ("probing", "critical", "update"),
        ("token_length", "medium", "update"),
        ("latency", "medium", "update"),
        ("block_rate", "high", "close"),
    ]


def test_open_findings_stay_however_old_they_are(seeded: StoreProcess, end_us: int) -> None:
    """In a stretch of time before any of them, the three open ones are still listed, the closed one is not."""
    rows = asked(seeded, "findings", end_us - 50 * 3_600_000_000, end_us - 49 * 3_600_000_000)
    assert [row["detector"] for row in rows] == ["probing", "token_length", "latency"]


def test_a_process_that_fell_silent_is_told(tmp_path: Path) -> None:
    """45 s without a word make a process silent; one that said goodbye is stopped; unready ones come first."""
    now = datetime.now(UTC)
    one_s, twenty_one_s, five_min = (
        (now - timedelta(seconds=seconds)).isoformat(timespec="milliseconds") for seconds in (1, 21, 300)
    )
    base = day.statuses(one_s)
    records = [
        base[0],
        {**base[1], "at": five_min},
        base[2],
        {**base[3], "state": "stopped", "watermark": twenty_one_s},
    ]
    store = StoreProcess(tmp_path / "store")
    try:
        store.fill(statuses=records)
        rows = store.query(BY_NAME["processes"].query(), {})
    finally:
        store.close()
    assert [(row["role"], row["state"], row["delay_s"]) for row in rows] == [
        ("deliver", "not ready", None),
        ("stage2", "silent", 0.0),
        ("stage1", "running", 0.0),
        ("store", "stopped", 20.0),
    ]


def test_every_panel_is_named_once_and_says_what_it_answers() -> None:
    """Names are addresses and Grafana's files: unique, plain; every panel asks a question."""
    assert len(BY_NAME) == len(PANELS)
    assert all(panel.name.isidentifier() and panel.answers.rstrip().endswith(("?", ".")) for panel in PANELS)
    assert all(" FROM " in panel.query().replace("\n", " ") for panel in PANELS)
