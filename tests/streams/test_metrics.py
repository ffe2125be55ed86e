"""The figures of a real worker, as Prometheus scrapes them: each by its name, and right."""

import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from collector.event import Hello, encode
from collector.kafka import KafkaConfig, ensure_topics
from streams.metrics import Histogram, Rate, Tally, troubles
from tests.streams import traffic
from tests.streams.traffic import Collector
from tests.streams.worker import ROOT, Worker, wait_until

NAMES = (
    "lag_records", "watermark_delay_seconds", "records_total", "records_per_second", "batch_records",
    "state_size_bytes", "evictions_total", "unwatched_total", "detector_failures_total", "forced_seconds_total",
    "late_total", "quarantined_total", "duplicates_total", "dead_letters_total", "rebalances_total",
    "commit_seconds", "state_write_seconds", "ready",
)  # fmt: skip


def test_a_histogram_counts_by_upper_bound() -> None:
    """A value at a bound belongs to it; what is larger than all is in +Inf alone."""
    histogram = Histogram((1, 10))
    for value in (0, 1, 1.5, 10, 11, 1000):
        histogram.add(value)
    assert (histogram.cumulative(), histogram.sum) == ([("1", 2), ("10", 4), ("+Inf", 6)], 1023.5)


def test_a_rate_is_that_of_the_last_seconds() -> None:
    """Over one to two windows, whoever asks in between; zero at the first call and where nothing comes."""
    now = [100.0]
    rate = Rate(lambda: now[0])
    said = []
    for second in range(40):
        now[0] = 100.0 + second
        said.append(rate.of(second * 50 if second < 20 else 1000))
    assert said[0] == 0
    assert set(said[1:20]) == {50.0}
    assert said[39] == 0


def test_what_is_forgotten_not_watched_or_failed_is_told_apart() -> None:
    """By the names that the engines count under; a refused command is none of these."""
    stage1 = {
        "entities.evicted": 1,
        "probing.evicted_with_evidence": 2,
        "entities.refused": 4,
        "volume.failed_chunks": 8,
    }
    stage2 = {"block_rate.refused_keys": 16, "campaign.refused_tenants": 32, "volume.refused": 64}
    stage2 |= {"failed_judgements": 128, "lifecycle.commands.refused": 256, "forced_seconds": 512}
    assert troubles(stage1) == {"evictions": 3, "unwatched": 4, "forced_seconds": 0, "detector_failures": 8}
    assert troubles(stage2) == {"evictions": 0, "unwatched": 112, "forced_seconds": 512, "detector_failures": 128}


def test_counters_of_a_process_never_go_back() -> None:
    """Partitions come with what others counted and go again: the total is what was counted here."""
    seed = random.randrange(2**32)  # noqa: S311
    print("seed", seed)
    chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
    tally, real, last = Tally(), 0, 0
    engines = {partition: Counter(late=chance.randrange(100)) for partition in range(4)}
    owned: dict[int, Counter[str]] = {}
    for _ in range(500):
        if chance.random() < 0.1:
            tally.end(owned)
            owned = {partition: engines[partition] for partition in chance.sample(range(4), chance.randrange(5))}
            tally.begin(owned)
        partition = chance.randrange(4)
        engines[partition]["late"] += 1
        real += partition in owned
        assert last <= (last := tally.totals(owned)["late"]) == real


@pytest.mark.kafka
async def test_every_figure_is_scraped_from_a_real_worker(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Lag, delay, rate, batches, state, evictions, late, quarantined, duplicates, dead letters, rebalances, commits."""
    await ensure_topics(kafka_config)
    collector = Collector(4, at_us=1_767_000_000_000_000)
    made = list(collector.control(Hello))
    for number in range(400):
        collector.at_us += 50_000
        made.append(collector.event(f"user-{number % 40}"))
    made += made[4:14]  # ten duplicates
    late = Collector(4, boot="late", at_us=1_767_000_000_000_000)
    made += [*late.control(Hello), *(late.event(f"user-{number}") for number in range(3))]
    ahead = Collector(4, boot="ahead", at_us=4_000_000_000_000_000)
    made += [ahead.event("user") for _ in range(2)]
    sent = [(key, encode(record), partition) for key, record, partition in made]
    with Worker("stage1", kafka_config, tmp_path, tick_after_s=300) as one:
        await traffic.send(kafka_config, [*sent, (b"", b"no event", 0)])
        done = lambda: one.metric("records_total") == len(sent) + 1  # noqa: E731
        wait_until(done, "all is read", 60, one)
        wait_until(lambda: one.metric("commit_seconds_count") > 0, "offsets are committed", 20, one)
        wait_until(lambda: one.metric("state_size_bytes") > 0, "state is stored", 20, one)
        page = one.get("metrics")
    values = {name: _value(page, name) for name in NAMES}
    print(values)
    assert not [name for name, value in values.items() if math.isnan(value)], page
    exact = {
        "lag_records": 0,
        "records_total": len(sent) + 1,
        "duplicates_total": 10,
        "quarantined_total": 2,
        "dead_letters_total": 1,
        "late_total": 3,
    }
    assert {name: values[name] for name in exact} == exact
    assert 0 < values["records_per_second"] <= len(sent) + 1
    assert values["watermark_delay_seconds"] > 3600
    assert values["batch_records"] == _value(page, "records_total")
    assert 500 < values["state_size_bytes"] < 1_000_000
    assert values["evictions_total"] == values["unwatched_total"] == values["detector_failures_total"] == 0
    assert 0 <= values["rebalances_total"] < 10
    assert 0 < values["commit_seconds"] < 10
    assert 0 < values["state_write_seconds"] < 10


@pytest.mark.kafka
async def test_ingest_tells_the_same_of_the_store(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Lag, delay, rate, batches, late, duplicates, quarantined and dead letters, under the same names."""
    await ensure_topics(kafka_config)
    collector = Collector(4, at_us=1_767_000_000_000_000)
    made = [*collector.control(Hello), *(collector.event(f"user-{number}") for number in range(50))]
    made += made[10:13]
    sent = [(key, encode(record), partition) for key, record, partition in made]
    with Worker("ingest", kafka_config, tmp_path) as ingest, Worker("deliver", kafka_config, tmp_path) as deliver:
        await traffic.send(kafka_config, sent)
        wait_until(lambda: ingest.metric("stored_total") == 53, "all is stored", 60, ingest)
        wait_until(lambda: deliver.metric("ready") == 1, "delivery is ready", 60, deliver)
        page = ingest.get("metrics")
        assert deliver.metric("dead_letters_total") == deliver.metric("lag_records") == 0
    names = [
        name
        for name in NAMES
        if not name.startswith(("state_", "commit_", "rebalances", "evictions", "unwatched", "detector_", "forced_"))
    ]
    values = {name: _value(page, name) for name in names}
    assert not [name for name, value in values.items() if math.isnan(value)], page
    assert [values[name] for name in ("records_total", "duplicates_total", "batch_records")] == [57, 3, 57]


def _value(page: str, name: str) -> float:
    """Of a metric, or the sum of a histogram; NaN where it is not told."""
    for line in page.splitlines():
        if line.startswith((f"inferwatch_{name}{{", f"inferwatch_{name}_sum{{")):
            return float(line.rpartition(" ")[2])
    return math.nan


def test_rules_and_documentation_speak_of_metrics_that_exist() -> None:
    """Every metric is documented, and every alert rule uses documented ones."""
    told = (ROOT / "docs/operations.md").read_text()
    missing = [name for name in NAMES if f"`inferwatch_{name}`" not in told]
    assert not missing
    rules = yaml.safe_load((ROOT / "compose/prometheus/inferwatch.rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert rule["alert"] in told
            for name in re.findall(r"inferwatch_(\w+?)(?:_bucket|_count|_sum)?[\[{) ]", rule["expr"] + " "):
                assert name in NAMES, rule["alert"]
