"""Reading iw.findings for people: the newest revision of each, named by the first digits of its uid."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from collector.kafka import KafkaConfig, ensure_topics
from detectors.finding import encode
from streams.findings import NoSuchFinding, find, newest_findings
from tests.sinks.samples import START_US, finding
from tests.streams import traffic

pytestmark = pytest.mark.kafka

ONE, TWO, TWIN = "0123456789abcdef" * 2, "fedcba9876543210" * 2, "0123456789abcdef0" + "f" * 15
EVIL = "[bold]x[/nonsense] \x1b[31mred\x07 \n:boom:"


async def test_the_newest_revision_of_each_is_found_by_its_first_digits(
    kafka_config: KafkaConfig, tmp_path: Path
) -> None:
    """Out of order, twice, among poison; unknown and ambiguous digits are said to be; a terminal obeys nothing."""
    await ensure_topics(kafka_config)
    early, late = START_US, START_US + 1_000_000
    revisions = [
        finding(ONE, 1, last_seen_us=early),
        finding(ONE, 3, last_seen_us=late, state="close"),
        finding(ONE, 2, last_seen_us=late),
        finding(TWIN, 1, last_seen_us=early, tenant="other"),
        finding(TWO, 1, last_seen_us=early, summary=EVIL, acknowledged_by="c1", handled_by="al\x1bice"),
    ]
    records = [(f.uid.encode(), encode(f), 0) for f in [*revisions, *revisions]]
    await traffic.send(kafka_config, [*records, (b"0123", b"\xff no finding", 1)], topic="findings")
    newest = await newest_findings(kafka_config)
    assert [(f.uid, f.revision) for f in newest] == [(ONE, 3), (TWIN, 1), (TWO, 1)]
    assert [f.uid for f in await newest_findings(kafka_config, wanted=lambda f: f.state != "close")] == [TWIN, TWO]
    assert (await find(kafka_config, TWO[:8])).uid == TWO
    assert (await find(kafka_config, ONE)).revision == 3
    with pytest.raises(NoSuchFinding, match="2 findings have a uid that begins with 01234567: give more digits"):
        await find(kafka_config, ONE[:8])
    with pytest.raises(NoSuchFinding, match=r"no finding on .* has a uid that begins with 99999999"):
        await find(kafka_config, "99999999")
    shown = _list(kafka_config, tmp_path)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold]x[/nonsense] \N{REPLACEMENT CHARACTER}[31mred" in shown
    assert "acknowledged by al\N{REPLACEMENT CHARACTER}ice" in shown


def _list(kafka: KafkaConfig, folder: Path) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "inferwatch.cli", "finding", "list"],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("INFERWATCH_")},
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "INFERWATCH_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "INFERWATCH_KAFKA__TOPIC_PREFIX": kafka.topic_prefix,
            "COLUMNS": "300",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return answer.stdout
