"""The settings of the HTML view and of the Grafana dashboards."""

import re
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from dashboards.panels import BY_NAME
from detectors.budget import BUDGET, per_week

RANGES_S: Final = {"15m": 900, "1h": 3_600, "6h": 21_600, "24h": 86_400, "7d": 604_800}
"""The time ranges of the picker, in seconds."""

RangeName = Literal["15m", "1h", "6h", "24h", "7d"]
HostName = Annotated[str, StringConstraints(pattern=re.compile(r"^[A-Za-z0-9.\-]{1,253}$"))]


class DashboardsConfig(BaseModel):
    """`[dashboards]` in inferwatch.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(
        "127.0.0.1", description="Address that the HTML view listens on. It has no log-in: keep it local."
    )
    port: int = Field(8480, ge=0, le=65_535, description="Port of the HTML view; 0 takes a free one.")
    allowed_hosts: tuple[HostName, ...] = Field(
        (),
        max_length=32,
        description="Names a browser may call the view by, beside localhost, 127.0.0.1, ::1 and `host`; "
        "any other Host header is refused (DNS rebinding).",
    )
    refresh_s: int = Field(10, ge=1, le=3_600, description="Seconds between two refreshes of an open page.")
    default_range: RangeName = Field("1h", description="The time range shown where the address names none.")
    query_timeout_s: float = Field(
        5.0, gt=0, le=60, description="A panel whose query takes longer says so; the others live on."
    )
    queries_parallel: int = Field(4, ge=1, le=32, description="Most queries sent to the store at once.")
    series_max: int = Field(
        8, ge=1, le=16, description="Most series drawn in one plot; the plot says how many it left out."
    )
    rows_max: int = Field(500, ge=10, le=5_000, description="Most rows of a table on a page of its own.")
    watch: dict[str, float] = Field(
        {},
        max_length=64,
        description="By a panel's name, the value from which it asks for attention, in its unit (a share, ms, tokens); "
        "a line across its plot. For example `latency = 5000`.",
    )
    grafana_datasource_uid: str = Field(
        "inferwatch", min_length=1, max_length=40, description="The uid of the ClickHouse data source in Grafana."
    )

    alert_budget: str = Field(
        BUDGET, description="What findings called false are held against; where it is not written, that of `[detect]`."
    )

    @field_validator("alert_budget")
    @classmethod
    def _is_a_budget(cls, value: str) -> str:
        per_week(value)
        return value

    def pieces(self) -> dict[str, str]:
        """What panels take from the configuration, for `Panel.query`."""
        return {"budget_a_week": f"{per_week(self.alert_budget):.9g}"}

    @field_validator("watch")
    @classmethod
    def _known_panels(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in BY_NAME or BY_NAME[name].kind not in ("timeseries", "stat"):
                known = ", ".join(panel.name for panel in BY_NAME.values() if panel.kind in ("timeseries", "stat"))
                raise ValueError(f"there is no plot or figure called {name[:40]!r}; there are {known}")
        return value
