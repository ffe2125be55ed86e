"""The guards' part of the config, and the table of all guards: one field, one guard.

`[collector.guards]` says which run and in what order; `[collector.guards.NAME]` is a guard's own table. To add a guard,
write its file and add its field here; the contract tests find it by that.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from collector.guards.injection import InjectionConfig
from collector.guards.protocol import GuardPolicy
from collector.guards.secrets import SecretsConfig
from collector.guards.sidecar_config import SidecarConfig


class GuardsConfig(BaseModel):
    """Which guards judge, in what order, within which bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: tuple[str, ...] = Field(
        ("injection", "secrets"),
        max_length=16,
        description="The guards that run, in this order, by the names of their tables. Empty: none. All of them judge, "
        "also after the first has blocked.",
    )
    text_chars_max: int = Field(
        4_000_000,
        ge=1_000,
        le=100_000_000,
        description="Longest text that is judged, to its very end. A longer one is not judged at all: the verdict is "
        "error TextTooLong, and on_error decides.",
    )
    workers: int = Field(2, ge=1, le=64, description="Requests judged at the same time, each on its own thread.")
    stuck_max: int = Field(
        2,
        ge=1,
        le=16,
        description="Calls of one guard that may hang beyond their deadline at once; then it is not called until one "
        "returns, and its verdicts are error Stuck.",
    )
    sidecar: SidecarConfig = Field(SidecarConfig(), description="The process that guards run in by where = sidecar.")

    injection: InjectionConfig = Field(
        default_factory=InjectionConfig, description="Prompt injection and jailbreak classifier."
    )
    secrets: SecretsConfig = Field(default_factory=SecretsConfig, description="Secrets and personal data by pattern.")

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """The names of all guards there are."""
        return tuple(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, GuardPolicy)
        )

    def policy(self, name: str) -> GuardPolicy:
        """A guard's own table. Raises KeyError for a name that is no guard."""
        if name not in self.known():
            raise KeyError(name)
        policy = getattr(self, name)
        assert isinstance(policy, GuardPolicy)  # noqa: S101 - known() chose the fields by this very type
        return policy

    @model_validator(mode="after")
    def _order_names_guards_once(self) -> Self:
        unknown = [name for name in self.order if name not in self.known()]
        if unknown:
            raise ValueError(f"order names {unknown[0]!r}, which is no guard; there are {', '.join(self.known())}")
        if len(set(self.order)) != len(self.order):
            raise ValueError("order names a guard twice")
        return self
