"""The `[detect]` part of inferwatch.toml: time rules, lifecycle, limits, and one sub-table a detector.

`digest` is the fingerprint that every finding carries: the settings and the detectors' versions that decided it.
"""

import base64
import hashlib
import re
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from detectors.budget import BUDGET, compiled

OPERATOR_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TimeConfig(_Table):
    """The rules T4-T8. Change them only on all readers of a topic at once: they decide which second an event is in."""

    gap_max_ms: int = Field(5_000, ge=100, le=60_000, description="Most that one record adds to a partition's clock.")
    silence_max_ms: int = Field(
        60_000, ge=1_000, description="A lane that is silent for longer is dead until it speaks."
    )
    ahead_max_ms: int = Field(
        60_000, ge=1_000, description="A timestamp further ahead of its append time is quarantined."
    )
    tick_lag_ms: int = Field(5_000, ge=0, description="With no live lane the watermark is the last tick less this.")
    collectors: tuple[str, ...] = Field((), description="Collectors that count. Empty: every collector with a hello.")
    lanes_max: int = Field(
        4_096, ge=1, description="Lanes remembered a partition. Dead ones go first; then new ones are quarantined."
    )
    pending_events_max: int = Field(
        500_000,
        ge=100,
        description="Events waiting for their second a partition; then the oldest second is closed early, and counted.",
    )


class LifecycleConfig(_Table):
    """How episodes open, are updated and close."""

    quiet_s: int = Field(300, ge=1, description="An episode closes after this long without new evidence.")
    update_s: int = Field(
        60, ge=1, description="Least time between two revisions of one episode, unless its severity rises."
    )
    episodes_max: int = Field(
        10_000,
        ge=1,
        description="Open episodes an engine; then the longest quiet one of the tenant with most closes early.",
    )
    offset_ranges_max: int = Field(64, ge=1, le=1_024, description="Offset ranges in one finding.")
    incident_s: int = Field(
        1_800, ge=1, description="Findings that belong together are one incident while it is not quiet for longer."
    )
    incidents_max: int = Field(2_000, ge=1, description="Incidents an engine; then the longest quiet one is forgotten.")
    incident_links_max: int = Field(64, ge=1, le=1_024, description="Entities that one incident is recognised by.")
    flap_openings: int = Field(4, ge=2, le=64, description="An entity that opens so often is flapping.")
    flap_window_s: int = Field(6 * 3_600, ge=1, description="Within this long.")
    flap_quiet_s: int = Field(3_600, ge=1, description="`quiet_s` of a flapping entity.")
    flap_entities_max: int = Field(
        10_000, ge=1, description="Closed entities whose openings are remembered; then the longest closed is forgotten."
    )
    closed_max: int = Field(
        500, ge=1, description="Closed findings an engine that can still be acknowledged; older ones can't."
    )


class CommandsConfig(_Table):
    """Whose commands count, and how far they reach."""

    operators: dict[str, str] = Field(
        {}, description='Who may command: NAME = "public key", as `inferwatch keys operator NAME` prints it.'
    )
    age_max_s: int = Field(600, ge=1, description="A command signed longer before it reached Kafka is refused.")
    ahead_max_s: int = Field(60, ge=0, description="A command signed so far after it reached Kafka is refused.")
    delay_s: int = Field(
        2, ge=0, le=60, description="A command takes effect this long after it reached Kafka, in event time."
    )
    acknowledge_s: int = Field(
        86_400, ge=60, description="A finding that still goes on this long after it was acknowledged is told again."
    )
    suppress_max_s: int = Field(90 * 86_400, ge=60, description="A longer suppression is refused.")
    maintenance_max_s: int = Field(7 * 86_400, ge=60, description="A longer maintenance window is refused.")
    ahead_plan_max_s: int = Field(90 * 86_400, ge=0, description="A window that begins later than this is refused.")
    change_s: int = Field(3_600, ge=1, description="A finding that opens this long after a change names it.")
    active_max: int = Field(
        1_000, ge=1, description="Suppressions, windows and changes in force an engine; then new commands are refused."
    )

    @field_validator("operators")
    @classmethod
    def _keys_are_keys(cls, operators: dict[str, str]) -> dict[str, str]:
        for name, key in operators.items():
            if not re.fullmatch(OPERATOR_NAME, name):
                raise ValueError("the name of an operator has 1 to 64 letters, digits, dots, dashes and underscores")
            try:
                raw = base64.b64decode(key, validate=True)
            except ValueError:
                raw = b""
            if len(raw) != 32:
                raise ValueError(f"the key of operator {name} is not base64 of 32 bytes")
        return operators


class BlockRateConfig(_Table):
    """Block-rate spikes, tenant x model x guard."""

    enabled: bool = True
    ratios: tuple[float, ...] = Field(
        (2.0, 3.0, 6.0),
        min_length=1,
        max_length=8,
        description="Shifts of the block rate that are looked for, as factors.",
    )
    prior_rate: float = Field(0.02, gt=0, lt=0.5, description="Block rate assumed before a key has a history.")
    prior_blocks: float = Field(20.0, gt=0, description="Weight of that assumption, in blocks.")
    budget_per_week: float = Field(0.5, gt=0, description="False alarms a week and tenant that the thresholds aim at.")
    fresh_s: int = Field(
        3_600, ge=1, description="A user is left out of the many-users stream this long after a block."
    )
    distinct_s: int = Field(
        86_400, ge=1, description="How long a blocked prompt is remembered for the few-users stream."
    )
    distinct_max: int = Field(8, ge=1, le=32, description="Blocked prompts counted a user within that time.")
    same_prompt: float = Field(
        0.95, gt=0, le=1, description="Estimated Jaccard similarity from which two prompts are one."
    )
    settle_s: int = Field(
        600, ge=1, description="Age from which counts enter the baseline, so that an attack does not teach it."
    )
    settle_cold_s: int = Field(60, ge=1, description="The same while the assumed rate outweighs what was learned.")
    adopt_s: int = Field(86_400, ge=60, description="A level that lasted this long becomes the new normal.")
    half_life_s: int = Field(7 * 86_400, ge=60, description="Half-life of the baseline's memory.")
    again_s: int = Field(300, ge=1, description="A spike is told on while evidence comes within this long.")
    calm_s: int = Field(
        3_600, ge=60, description="It is over when its charts were under half their thresholds for so long."
    )
    change_s: int = Field(3_600, ge=1, description="A spike that begins this long after a change event names it.")
    top_user_share_max: float = Field(
        0.67, gt=0, le=1, description="A spike with a larger share from one user is left to the probing detector."
    )
    users_max: int = Field(100_000, ge=1, description="Blocked users remembered a partition.")
    keys_max: int = Field(4_096, ge=1, description="Tenant x model x guard keys an engine.")


class LatencyConfig(_Table):
    """Latency anomalies, tenant x model, standardised by prompt size and answer length."""

    enabled: bool = True
    window_s: int = Field(60, ge=2, le=3_600, description="Shortest window compared with the baseline.")
    min_calls: int = Field(60, ge=10, description="A window with fewer calls grows, up to sixty times.")
    ratio_min: float = Field(2.0, gt=1, description="Growth of the median (or of the 95th percentile) that matters.")
    increase_min_ms: float = Field(20.0, ge=0, description="Growth of the median in ms that matters.")
    spread_factor: float = Field(
        4.0, ge=0, description="Growth must also exceed this many robust standard deviations of past windows."
    )
    tail_calls: int = Field(120, ge=20, description="Calls a window needs before its 95th percentile is judged.")
    budget_per_week: float = Field(
        0.5, gt=0, description="False alarms a week and key that the significance level aims at."
    )
    design_effect: float = Field(
        2.0, ge=1, description="How many calls weigh as one, since calls in one window share the load."
    )
    adopt_s: int = Field(86_400, ge=60, description="A level that lasted this long becomes the new normal.")
    keys_max: int = Field(1_024, ge=1, description="Tenant x model keys an engine.")


class ProbingConfig(_Table):
    """Sessions and users that try variations until one passes."""

    enabled: bool = True
    threshold: float = Field(
        5.5, gt=0, description="Evidence in nats; docs/detection.md has the share of honest sessions flagged."
    )
    half_life_s: int = Field(86_400, ge=60, description="Half-life of the evidence.")
    prior_rate: float = Field(0.02, gt=0, lt=0.5, description="Block rate assumed of an unknown client.")
    prior_prompts: float = Field(100.0, gt=0, description="Weight of that assumption, in prompts.")
    prior_shape: float = Field(
        0.3,
        gt=0,
        le=100,
        description="How alike clients are: the smaller, the more of them are never or often blocked.",
    )
    attack_rate: float = Field(0.2, gt=0, lt=1, description="Block rate of a client that probes, at least.")
    retry_rate: float = Field(
        0.3, ge=0, lt=1, description="Block rate of what an honest client rewords right after a block."
    )
    retry_s: int = Field(300, ge=0, description="How long after a block that is.")
    retries_max: int = Field(3, ge=0, description="How many rewordings in a row; further ones are as any prompt.")
    swing: float = Field(
        1.5, ge=1, le=4, description="How many times its usual block rate a client has on a day of honest work."
    )
    learn_prompts: int = Field(
        64, ge=8, description="After so many different prompts at once the client's usual rate is learned anew."
    )
    record_share: float = Field(
        0.35,
        ge=0,
        le=1,
        description="How much of a client's highest evidence of earlier days is added to his threshold.",
    )
    slow_half_life_s: int = Field(
        14 * 86_400, ge=60, description="Half-life of the evidence against a user who tries for weeks."
    )
    slow_extra: float = Field(5.5, ge=0, description="Evidence of that kind is told from so many nats more.")
    cold_s: int = Field(3 * 86_400, ge=0, description="How long after its first event a tenant is new.")
    cold_extra: float = Field(
        4.0, ge=0, description="Evidence that is asked for on top while a tenant is new, in nats."
    )
    cold_clients_max: int = Field(
        5, ge=0, description="Clients that are told while a tenant is new; others are counted."
    )
    tenants_max: int = Field(10_000, ge=1, description="Tenants remembered an engine; more are never new.")
    same_prompt: float = Field(
        0.95, gt=0, le=1, description="Estimated Jaccard similarity from which two prompts are one."
    )
    like_prompt: float = Field(0.3, gt=0, le=1, description="The same from which one is a rewording of the other.")
    prompts_max: int = Field(16, ge=1, le=64, description="Recent prompts remembered an entity with evidence.")
    suspects_max: int = Field(50_000, ge=2, description="Users with evidence against them, a partition.")
    idle_s: int = Field(30 * 86_400, ge=60, description="A user or session unseen for longer is forgotten.")


class TokenLengthConfig(_Table):
    """Completions longer than their kind has been so far."""

    enabled: bool = True
    baseline_calls_min: int = Field(100, ge=20, description="Completions of a model before any is judged.")
    settle_s: int = Field(30, ge=1, description="Age from which completions enter the baseline.")
    shrink_calls: int = Field(
        50, ge=1, description="Weight of the model's whole distribution in that of one prompt x limit bucket."
    )
    tail_share: float = Field(
        0.1, gt=0, lt=0.5, description="Upper share of the distribution to which the tail is fitted."
    )
    half_life_s: int = Field(3_600, ge=60, description="Half-life of a user's evidence.")
    signal_score: float = Field(
        0.5, ge=0, le=1, description="Guard score above which a rare completion counts as suspected: then it is High."
    )
    budget_per_week: float = Field(0.5, gt=0, description="False alarms a week and tenant that the threshold aims at.")
    users_max: int = Field(50_000, ge=1, description="Users with evidence an engine.")
    keys_max: int = Field(4_096, ge=1, description="Buckets (tenant x model x prompt size x limit) an engine.")


class VolumeConfig(_Table):
    """More requests or tokens than a client's own past and its tenant's clients explain."""

    enabled: bool = True
    window_s: int = Field(600, ge=60, le=3_600, description="Requests and tokens are added up over so long.")
    requests_min: int = Field(50, ge=1, description="Fewer requests in a window are never high volume.")
    tokens_min: int = Field(50_000, ge=1, description="Fewer tokens in a window are never high volume.")
    memory_s: int = Field(
        14 * 86_400, ge=3_600, description="How long a client's largest window is remembered, fading all the while."
    )
    known_windows: int = Field(
        20, ge=1, description="Active windows after which a client is compared with its own past alone."
    )
    stranger_share: float = Field(
        0.01, gt=0, lt=0.5, description="A stranger is compared with the largest windows of his tenant: this share."
    )
    budget_per_week: float = Field(0.5, gt=0, description="False alarms a week and tenant that the threshold aims at.")
    sessions_max: int = Field(10_000, ge=2, description="Users above their past whose sessions are told apart.")
    keys_max: int = Field(50_000, ge=100, description="API keys and addresses remembered an engine.")
    users_max: int = Field(10_000, ge=1, description="Clients above their past an engine.")
    tenants_max: int = Field(256, ge=1, description="Tenants an engine.")


class CampaignConfig(_Table):
    """Many users, one prompt family."""

    enabled: bool = True
    users_min: int = Field(8, ge=3, le=64, description="Blocked users with one family of prompts that are a campaign.")
    similarity: float = Field(0.25, gt=0, le=1, description="Estimated Jaccard similarity to a family's first prompt.")
    window_s: int = Field(86_400, ge=60, description="Users of a family are counted over so long.")
    again_s: int = Field(1_800, ge=1, description="A campaign is told on while prompts of it come within this long.")
    user_prompts_max: int = Field(
        8, ge=1, le=64, description="Blocked prompts of a user that one partition passes on within an hour."
    )
    passed_max: int = Field(32, ge=1, le=1_024, description="Blocked prompts passed on a second, partition and tenant.")
    families_max: int = Field(2_000, ge=1, description="Families remembered a tenant; then the longest unseen goes.")
    tenants_max: int = Field(256, ge=1, description="Tenants an engine.")
    users_max: int = Field(100_000, ge=1, description="Blocked users counted a partition.")
    family_users_max: int = Field(512, ge=8, description="Users remembered a family.")


class DetectConfig(_Table):
    """`[detect]`."""

    enabled: bool = True
    alert_budget: str = Field(
        BUDGET, description="False alarms that all detectors aim at together: `1 per week per tenant`."
    )
    platform_tenant: str = Field(
        "platform", min_length=1, max_length=64, description="Tenant of findings about the pipeline itself."
    )
    entities_max: int = Field(
        1_000_000,
        ge=100,
        description="Users remembered a partition; then the longest unseen is forgotten, last those with evidence.",
    )
    contributors_max: int = Field(32, ge=4, le=1_024, description="Users told apart a second, key and measure.")
    pending_rollups_max: int = Field(
        500_000,
        ge=100,
        description="Rollups waiting for their second in stage 2; then the oldest second is closed early, and counted.",
    )
    time: TimeConfig = TimeConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    commands: CommandsConfig = CommandsConfig()
    block_rate: BlockRateConfig = BlockRateConfig()
    latency: LatencyConfig = LatencyConfig()
    probing: ProbingConfig = ProbingConfig()
    token_length: TokenLengthConfig = TokenLengthConfig()
    campaign: CampaignConfig = CampaignConfig()
    volume: VolumeConfig = VolumeConfig()

    @model_validator(mode="before")
    @classmethod
    def _budget_compiled(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "alert_budget" not in data:
            return data
        return compiled(data, {name: field.default for name, field in cls.model_fields.items()})


def config_digest(config: DetectConfig, versions: dict[str, str]) -> str:
    """16 hex digits over every setting and every detector's version; equal settings give equal digests."""
    digest = hashlib.blake2b(digest_size=8, person=b"iw-detect")
    digest.update(config.model_dump_json().encode())
    for name in sorted(versions):
        digest.update(f"\n{name}={versions[name]}".encode())
    return digest.hexdigest()
