"""The demo itself, as a newcomer starts it: its last line says what became of every event."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inferwatch.demo_setup import engine_python

ROOT = Path(__file__).parent.parent.parent


def run_demo(folder: Path, engine: str, timeout_s: float) -> dict[str, object]:
    """The last line of `inferwatch demo --once --json`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INFERWATCH_")}
    command = [sys.executable, "-m", "inferwatch.cli", "demo", "--once", "--json", "--engine", engine]
    answer = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    report: dict[str, object] = json.loads(answer.stdout.splitlines()[-1])
    return report


def judge(report: dict[str, object]) -> None:
    """All four detectors spoke, every event is accounted for, each finding was delivered at least once."""
    findings = report["findings"]
    assert isinstance(findings, dict)
    assert findings.keys() == {"block_rate", "latency", "probing", "token_length"}
    assert report["unaccounted"] == 0
    assert report["events_stored"] == report["events_published"]
    assert int(str(report["webhooks_delivered"])) >= sum(findings.values())
    assert report.keys() == {
        "events_published", "events_stored", "unaccounted", "findings", "webhooks_delivered", "seconds",
    }  # fmt: skip


@pytest.mark.kafka
def test_the_replayed_day_goes_through_everything(tmp_path: Path) -> None:
    """Broker, both stages, store, delivery and the receiver; nothing is left in the temporary folder."""
    report = run_demo(tmp_path, "replay", 240)
    judge(report)
    assert int(str(report["events_published"])) > 15_000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
@pytest.mark.engine
@pytest.mark.skipif(engine_python() is None, reason="vLLM is not installed here")
def test_the_real_engine_is_watched_from_cold(tmp_path: Path) -> None:
    """A real vLLM engine, four campaigns, and a canary that is nowhere to be found."""
    judge(run_demo(tmp_path, "vllm", 600))
