"""`inferwatch status` as a person meets it."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from inferwatch import roles
from inferwatch.cli import app

HEALTHY = {
    "ready": True, "silent": False, "age_s": 1.5, "lag": 0, "watermark": "", "late": 0, "drops": 0, "version": "1",
    "config_digest": "c0ffee",
}  # fmt: skip
RECORDS = [
    {**HEALTHY, "role": "collector", "guard_drift": {"injection/tool": 0.1, "injection/input": 0.3172}},
    {**HEALTHY, "role": "collector", "guard_drift": {}},
    {**HEALTHY, "role": "stage1"},
]


def test_a_guard_whose_scores_moved_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that moved farthest, beside its collector; in JSON each of them."""

    async def records(_: object) -> list[dict[str, Any]]:
        return RECORDS

    monkeypatch.setattr(roles, "read_status", records)
    monkeypatch.setenv("COLUMNS", "200")
    told = CliRunner().invoke(app, ["status"])
    assert told.exit_code == 0
    header, *lines = told.stdout.splitlines()
    place = header.index("guard drift")
    assert [line[place : header.index("version")].strip() for line in lines] == ["injection/input 0.32", "", ""]
    assert json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout) == RECORDS
