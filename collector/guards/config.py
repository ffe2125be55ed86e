"""The guards' part of the config, and the table of all guards: one field, one guard.

`[collector.guards]` says which run and in what order; `[collector.guards.NAME]` is a guard's own table. To add a guard,
write its file and add its field here; the contract tests find it by that.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from collector.guards.alignment import AlignmentConfig
from collector.guards.codeshield import CodeShieldConfig
from collector.guards.evaluator import EvaluatorConfig
from collector.guards.injection import InjectionConfig
from collector.guards.leakage import LeakageConfig
from collector.guards.llamafirewall import LlamaFirewallConfig
from collector.guards.llamaguard import LlamaGuardConfig
from collector.guards.pii import PiiConfig
from collector.guards.policy import Route, RouteOrder, TenantOrder
from collector.guards.promptguard import PromptGuardConfig
from collector.guards.protocol import GuardPolicy, MediaGuard
from collector.guards.secrets import SecretsConfig
from collector.guards.sidecar_config import SidecarConfig
from collector.guards.similarity import SimilarityConfig


class GuardsConfig(BaseModel):
    """Which guards judge, in what order, within which bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: tuple[str, ...] = Field(
        ("injection", "secrets"),
        max_length=16,
        description="The guards that run, in this order, by the names of their tables. Empty: none. All of them judge, "
        "also after the first has blocked.",
    )
    tenants: dict[str, TenantOrder] = Field(
        {}, max_length=4096, description="By tenant name: an order of its own, and by route within."
    )
    routes: dict[Route, RouteOrder] = Field({}, max_length=256, description="By route: an order of its own.")
    cache_entries: int = Field(
        4096,
        ge=0,
        le=1_000_000,
        description="Judgements kept in memory, by a keyed hash of the text and never across tenants, so that a "
        "conversation's earlier turns are not judged again. 0: none.",
    )
    cache_ttl_s: float = Field(300, gt=0, le=86_400, description="How long a judgement is kept.")
    canary_s: float = Field(
        30,
        ge=0,
        le=86_400,
        description="How often each guard is given a known attack or a known harmless text, in turn. One that answers "
        "wrongly is told in heartbeats and makes a finding. 0: never.",
    )
    text_chars_max: int = Field(
        4_000_000,
        ge=1_000,
        le=100_000_000,
        description="Longest text that is judged, to its very end. A longer one is not judged at all: the verdict is "
        "error TextTooLong, and on_error decides.",
    )
    workers: int = Field(2, ge=1, le=64, description="Requests judged at the same time, each on its own thread.")
    waiting_max: int = Field(
        256, ge=1, le=65_536, description="Requests that may wait to be judged; beyond them the answer is 503."
    )
    wait_ms_max: float = Field(
        5_000, gt=0, le=600_000, description="A request that waited longer is not judged any more: the answer is 503."
    )
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
    pii: PiiConfig = Field(default_factory=PiiConfig, description="Identity numbers, passports, dates of birth.")
    leakage: LeakageConfig = Field(
        default_factory=LeakageConfig, description="Canary tokens, and answers that recite the system prompt."
    )
    promptguard: PromptGuardConfig = Field(
        default_factory=PromptGuardConfig, description="Prompt Guard 2, or another classifier of injections, run here."
    )
    llamaguard: LlamaGuardConfig = Field(
        default_factory=LlamaGuardConfig,
        description="Llama Guard 4 at an endpoint: unsafe content by category, images.",
    )
    alignment: AlignmentConfig = Field(
        default_factory=AlignmentConfig, description="A model at an endpoint judges an agent's steps by the objective."
    )
    codeshield: CodeShieldConfig = Field(
        default_factory=CodeShieldConfig, description="CodeShield on the code in answers; in the sidecar."
    )
    similarity: SimilarityConfig = Field(
        default_factory=SimilarityConfig, description="Nearness to a bank of attacks that you have seen."
    )
    evaluator: EvaluatorConfig = Field(
        default_factory=EvaluatorConfig, description="A classifier of (prompt, answer) pairs, here or at an endpoint."
    )
    llamafirewall: LlamaFirewallConfig = Field(
        default_factory=LlamaFirewallConfig, description="LlamaFirewall's scanners by role; in the sidecar."
    )

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """The names of all guards there are."""
        return tuple(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, GuardPolicy)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every guard that is in some order, those of the general one first."""
        return tuple(dict.fromkeys(name for order in self._orders() for name in order))

    def _orders(self) -> list[tuple[str, ...]]:
        tenants = [layer for own in self.tenants.values() for layer in (own, *own.routes.values())]
        return [self.order, *(layer.order for layer in (*tenants, *self.routes.values()) if layer.order is not None)]

    def order_for(self, tenant: str, route: str) -> tuple[str, ...]:
        """The guards that judge for one tenant on one route: the narrowest order that is set."""
        own = self.tenants.get(tenant)
        layers = [own.routes.get(route) if own is not None else None, own, self.routes.get(route)]
        return next((layer.order for layer in layers if layer is not None and layer.order is not None), self.order)

    def policy(self, name: str) -> GuardPolicy:
        """A guard's own table. Raises KeyError for a name that is no guard."""
        if name not in self.known():
            raise KeyError(name)
        policy = getattr(self, name)
        assert isinstance(policy, GuardPolicy)  # noqa: S101 - known() chose the fields by this very type
        return policy

    def media_guard(self) -> MediaGuard | None:
        """The guard of images, where an order names one that judges them. Raises `GuardRefused`."""
        return self.llamaguard.build_media() if "llamaguard" in self.names else None

    @model_validator(mode="after")
    def _order_names_guards_once(self) -> Self:
        unknown = [name for name in self.names if name not in self.known()]
        if unknown:
            raise ValueError(f"order names {unknown[0]!r}, which is no guard; there are {', '.join(self.known())}")
        if any(len(set(order)) != len(order) for order in self._orders()):
            raise ValueError("order names a guard twice")
        return self
