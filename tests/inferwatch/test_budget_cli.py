"""`inferwatch budget explain`."""

from pathlib import Path

import msgspec
import orjson
from typer.testing import CliRunner

from inferwatch.budget_cli import false_alarms
from inferwatch.cli import app
from tests.sinks.samples import finding


def test_it_prints_each_detectors_share_and_setting(tmp_path: Path) -> None:
    """Without Kafka, what was measured is unknown rather than zero."""
    file = tmp_path / "inferwatch.toml"
    file.write_text('[detect]\nalert_budget = "1 per week per tenant"\n[detect.probing]\nthreshold = 6.3\n')
    answer = CliRunner().invoke(app, ["budget", "explain", "--no-measure", "--json", "--config", str(file)])
    assert answer.exit_code == 0, answer.output
    told = orjson.loads(answer.stdout)
    rows = {row["detector"]: row for row in told["detectors"]}
    assert set(rows) == {"block_rate", "campaign", "latency", "probing", "token_length", "volume"}
    assert (rows["block_rate"]["value"], rows["block_rate"]["from"]) == (0.2, "budget")
    assert (rows["probing"]["value"], rows["probing"]["from"]) == (6.3, "operator")
    assert {row["false_a_week"] for row in rows.values()} == {None}
    plain = CliRunner().invoke(app, ["budget", "explain", "--no-measure", "--config", str(file)], terminal_width=200)
    assert "alert_budget = 1 per week per tenant" in plain.output


def test_called_false_is_counted_by_the_worst_tenant() -> None:
    """Four weeks, three false findings of one tenant and one of another."""
    one = finding()
    told = [
        msgspec.structs.replace(one, uid=str(number), tenant=tenant, false_positive=false)
        for number, (tenant, false) in enumerate([("a", True)] * 3 + [("b", True), ("a", False)])
    ]
    wanted = {"findings": 5, "false": 4, "false_a_week": 0.75, "tenant": "a"}
    assert false_alarms(told, one.detector, 4) == wanted
    assert false_alarms(told, "other", 4) == {"findings": 0, "false": 0, "false_a_week": 0.0, "tenant": ""}
