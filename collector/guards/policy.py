"""What guards are allowed to decide, for whom: the same few settings, by tenant, by route, and by both.

The narrower one wins, setting by setting: tenant and route, then tenant, then route, then the guard's own table. Routes
are named as in the event, `POST /v1/chat/completions`.
"""

from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from collector.event import Stage

Threshold = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Sample = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Mode = Literal["enforce", "shadow"]
OnError = Literal["block", "allow"]
Poisoned = Literal["block", "drop"]
ROUTE: Final = "^(GET|POST|PUT|PATCH|DELETE) /[!-~]{0,200}$"
Route = Annotated[str, Field(pattern=ROUTE)]


class RoutePolicy(BaseModel):
    """What one guard has otherwise on one route, or for one tenant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Threshold | None = Field(None, description="Block at this score and above.")
    mode: Mode | None = Field(None, description="shadow: judge and report, never block.")
    on_error: OnError | None = Field(None, description="What happens to a text it failed to judge.")
    sample: Sample | None = Field(None, description="The share of requests that it judges.")
    poisoned: Poisoned | None = Field(None, description="What happens to a retrieved text or tool output it blocks.")


class TenantPolicy(RoutePolicy):
    """What one guard has otherwise for one tenant."""

    routes: dict[Route, RoutePolicy] = Field({}, max_length=256, description="The same for single routes.")


class RouteOrder(BaseModel):
    """Which guards judge on one route."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: tuple[str, ...] | None = Field(None, max_length=16, description="The guards that judge, in this order.")


class TenantOrder(RouteOrder):
    """Which guards judge for one tenant."""

    routes: dict[Route, RouteOrder] = Field({}, max_length=256, description="The same for single routes.")


class Rule(NamedTuple):
    """What holds for one guard, one tenant and one route."""

    threshold: float | None
    mode: Mode
    on_error: OnError
    sample: float
    poisoned: Poisoned
    shadow_stages: frozenset[Stage]

    def mode_at(self, stage: Stage) -> Mode:
        return "shadow" if stage in self.shadow_stages else self.mode

    def blocks_on_error(self, stage: Stage) -> bool:
        """Whether a text that the guard failed to judge does not pass."""
        return self.on_error == "block" and self.mode_at(stage) == "enforce"

    def drops(self, stage: Stage) -> bool:
        """Whether what is blocked at this stage is taken out of the request instead of it being refused."""
        return self.poisoned == "drop" and stage in ("retrieved", "tool")


def narrowest(name: str, layers: "list[RoutePolicy | None]", base: Any) -> Any:
    """A setting's value in the first of the layers that has one, else the base."""
    for layer in layers:
        if layer is not None and (value := getattr(layer, name)) is not None:
            return value
    return base
