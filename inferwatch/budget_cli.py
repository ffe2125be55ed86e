"""`inferwatch budget`: what the alert budget compiles to, and what people called false against it."""

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from inferwatch.config import Config, load
from inferwatch.options import ConfigOption, JsonOption

if TYPE_CHECKING:  # each command loads its own room
    from detectors.finding import Finding

app = typer.Typer(no_args_is_help=True, help="The budget of false alarms.")
WEEK_S = 7 * 86_400


@app.command()
def explain(
    *,
    weeks: Annotated[
        int, typer.Option(min=1, max=520, help="Count what was called false in the last so many weeks.")
    ] = 4,
    measure: Annotated[bool, typer.Option(help="Read the findings from Kafka, to count what was called false.")] = True,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what `alert_budget` compiles to for each detector, on what assumption, and the false alarms so far.

    Example: inferwatch budget explain --weeks 4
    """
    from detectors.budget import explain as explained  # noqa: PLC0415

    settings = load(config)
    rows: list[dict[str, Any]] = [
        {
            "detector": part.detector,
            "enabled": part.enabled,
            "budget_per_week": part.budget_per_week,
            "setting": part.setting,
            "value": part.value,
            "from": "budget" if part.compiled else "operator",
            "assumption": part.assumption,
        }
        for part in explained(settings.detect)
    ]
    measured, why = _measured(settings, weeks) if measure else (None, "not asked for")
    for row in rows:
        row.update(false_alarms(measured, str(row["detector"]), weeks))
    told: dict[str, Any] = {"alert_budget": settings.detect.alert_budget, "detectors": rows}
    told |= {"measured": why or f"findings of the last {weeks} weeks that people called false positives"}
    if as_json:
        typer.echo(orjson.dumps(told).decode())
        return
    table = Table("detector", "a week", "setting", "value", "from", "called false a week", "assumption", box=None)
    for row in rows:
        rate = row["false_a_week"]
        table.add_row(
            row["detector"] if row["enabled"] else f"{row['detector']} (off)",
            f"{row['budget_per_week']:g}",
            row["setting"],
            f"{row['value']:g}",
            row["from"],
            "?" if rate is None else f"{rate:g}",
            row["assumption"],
        )
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(f"alert_budget = {settings.detect.alert_budget}", table, f"Measured: {told['measured']}.", sep="\n")


def _measured(settings: Config, weeks: int) -> tuple["list[Finding] | None", str]:
    """The findings of these weeks, or why there are none."""
    from collector.login import BrokerAway  # noqa: PLC0415
    from streams.findings import newest_findings  # noqa: PLC0415

    since_us = int((time.time() - weeks * WEEK_S) * 1e6)
    try:
        found = asyncio.run(
            newest_findings(
                settings.kafka,
                timeout_s=settings.streams.broker_timeout_s,
                wanted=lambda finding: finding.first_seen_us >= since_us,
            )
        )
    except BrokerAway:
        return None, "Kafka is away, so nothing was measured"
    return found, ""


def false_alarms(findings: "list[Finding] | None", detector: str, weeks: int) -> dict[str, Any]:
    """How many of a detector's findings were called false, and how many a week that is for the worst tenant."""
    if findings is None:
        return {"findings": None, "false": None, "false_a_week": None, "tenant": ""}
    mine = [finding for finding in findings if finding.detector == detector]
    false = Counter(finding.tenant for finding in mine if finding.false_positive)
    tenant, worst = min(false.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
    return {
        "findings": len(mine),
        "false": false.total(),
        "false_a_week": round(worst / weeks, 3),
        "tenant": tenant,
    }
