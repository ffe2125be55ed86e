"""What `probing` says: signals of stage 1, and the second half, which makes alarms of them.

A tenant's first three days are no measure of its clients: all are strangers, red-team jobs and agents too. Until
`cold_s` after a tenant's first event more evidence is asked for, and only so many clients are told at all, those that
come first; the rest is counted. So false alarms are about that many clients at most, whatever the tenant is like; and
whoever raises as many first hides an attacker until then.
"""

import math
from collections.abc import Iterable
from typing import Final

import msgspec
from msgspec import Struct

from detectors.config import DetectConfig, ProbingConfig
from detectors.detector import Alarm, StageTwo, contributors
from detectors.finding import Entity, Statistic
from detectors.probing_evidence import Client, Slow, Suspicion, rate
from detectors.rollup import Cell, Signal
from detectors.text import Text
from detectors.time import SECOND_US

NAME: Final = "probing"
STRANGER_PROMPTS: Final = 50
"""With fewer prompts in his past a client is a stranger."""
COLD_CLIENT: Final = "Few earlier prompts: compared with an assumed block rate."
COLD_TENANT: Final = "The tenant's first days: told only on more evidence, and of few clients."
HIGH_NATS: Final = 4.0
"""Severity is high from so much more than the threshold."""
PSEUDONYM_SHOWN: Final = 14
"""Characters of a pseudonym in a summary: its prefix and twelve."""
REPLAY_MARGIN_S: Final = 86_400
"""How much longer than a tenant is new a replay looks back, since its first event there may come late."""


class Place(Struct, frozen=True):
    """Whose evidence it is, and where it came from."""

    entity: Entity
    event: Text
    partition: int
    known_s: int
    """When the client was first seen."""


def signal_of(  # noqa: PLR0917  # one of each thing that a signal is made of
    seen: Suspicion, client: Client, bar: float, most: float, place: Place, config: ProbingConfig
) -> Signal:
    """What stage 1 sends. `most` is the setting `threshold` that the client would just have passed."""
    past = seen.past if isinstance(seen, Slow) else client.usual
    return Signal(
        partition=place.partition,
        second=seen.last_us // SECOND_US,
        tenant=place.event.tenant,
        kind=NAME,
        key=f"{place.entity.kind}\n{place.entity.id}",
        entity=place.entity,
        model=place.event.model_version,
        first_seen_us=seen.start_us,
        last_seen_us=seen.last_us,
        observed_milli=round(seen.sum * 1_000),
        baseline_milli=0,
        counts={
            "prompts": seen.prompts,
            "distinct": seen.distinct,
            "blocks": seen.blocked,
            "own_rate_ppm": round(max(rate(config, past), config.prior_rate) * 1e6),
            "past_prompts": past[0],
            "bar_milli": round(bar * 1_000),
            "most_milli": round(most * 1_000),
            "slow": int(isinstance(seen, Slow)),
            "known_s": place.known_s,
        },
        samples=list(seen.samples),
        first_offset=seen.first_offset,
        last_offset=seen.last_offset,
    )


class _State(Struct, array_like=True):
    began_s: dict[str, int]
    told: dict[str, list[str]]
    withheld: int


class ProbingTwo(StageTwo):
    """Makes an alarm of each signal, or, while the tenant is new, of some."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config.probing
        self._began_s: dict[str, int] = {}
        """Tenant to its first second, while it is new."""
        self._told: dict[str, list[str]] = {}
        """Tenant to the clients told while it was new."""
        self._withheld = 0

    @property
    def counters(self) -> dict[str, int]:
        return {"withheld": self._withheld}

    def second(self, second: int, cells: list[tuple[str, str, Cell]]) -> Iterable[Alarm]:
        for tenant, _, _ in cells:
            if len(self._began_s) < self._config.tenants_max:
                self._began_s.setdefault(tenant, second)
        return ()

    def signal(self, signal: Signal) -> list[Alarm]:
        bar = signal.counts["bar_milli"] / 1_000
        began_s = self._began_s.get(signal.tenant)
        new = began_s is not None and signal.second < began_s + self._config.cold_s
        if new:
            bar += self._config.cold_extra
            if signal.observed_milli / 1_000 < bar or not self._admitted(signal):
                self._withheld += 1
                return []
        return [self._alarm(signal, bar, new=new)]

    def _admitted(self, signal: Signal) -> bool:
        """Whether the client is among those that are told while the tenant is new."""
        told = self._told.setdefault(signal.tenant, [])
        user = signal.entity.id.partition("/")[0]
        if user not in told and len(told) < self._config.cold_clients_max:
            told.append(user)
        return user in told

    def _alarm(self, signal: Signal, bar: float, *, new: bool) -> Alarm:
        shown = ("prompts", "distinct", "blocks", "own_rate_ppm", "past_prompts")
        counts = {name: signal.counts[name] for name in shown}
        evidence = signal.observed_milli / 1_000
        stranger = counts["past_prompts"] < STRANGER_PROMPTS
        span_s = (signal.last_seen_us - signal.first_seen_us) // SECOND_US + 1
        who = "Session" if signal.entity.kind == "session" else "Client"
        user = signal.entity.id.partition("/")[0]
        usual = "an unknown client is assumed to have" if stranger else "this client had before"
        name = "/".join(part[:PSEUDONYM_SHOWN] for part in signal.entity.id.split("/"))
        slow = signal.counts["slow"]
        return Alarm(
            tenant=signal.tenant,
            entity=signal.entity,
            model=signal.model,
            at_us=(signal.second + 1) * SECOND_US,
            first_seen_us=signal.first_seen_us,
            last_seen_us=signal.last_seen_us,
            severity="high" if evidence >= bar + HIGH_NATS else "medium",
            confidence="medium" if stranger or new else "high",
            statistic=Statistic(
                name="log-likelihood ratio of one prompt an hour"
                if slow
                else "log-likelihood ratio of distinct prompts",
                observed=evidence,
                baseline=0.0,
                threshold=round(bar, 3),
                unit="nats",
                improbability=round(evidence / math.log(10), 2),
            ),
            counts=counts,
            summary=(
                f"{who} {name} sent {counts['distinct']} different prompts in {span_s} s, and guards"
                f" blocked {counts['blocks']} requests; {usual} {counts['own_rate_ppm'] / 1e4:.1f} % blocked"
            ),
            offsets={signal.partition: (signal.first_offset, signal.last_offset)},
            samples=signal.samples,
            contributors=contributors({user: counts["blocks"]}, "blocked requests", 1),
            cold_start=" ".join([COLD_TENANT] * new + [COLD_CLIENT] * stranger),
            replay_from_us=min(
                signal.counts["known_s"] * SECOND_US,
                signal.first_seen_us - (self._config.cold_s + REPLAY_MARGIN_S) * SECOND_US,
            ),
        )

    def snapshot(self) -> bytes:
        return _encoder.encode(_State(self._began_s, self._told, self._withheld))

    def restore(self, raw: bytes) -> None:
        state = _decoder.decode(raw)
        self._began_s, self._told, self._withheld = state.began_s, state.told, state.withheld


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_State)
