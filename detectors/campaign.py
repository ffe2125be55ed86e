"""campaign: many users of a tenant are blocked with one family of prompts.

Method. Stage 1 passes on blocked requests only: the keyed MinHash sketch of what is new in the request, and the user's
pseudonym. Stage 2 puts each into the family with the most similar sketch, from a Jaccard similarity of .25 on (A. Z.
Broder, "On the resemblance and containment of documents", SEQUENCES 1997), else it leads a new one: leader clustering,
since joining whatever touches (single linkage) chains unlike prompts together. A family's sketch is, slot by slot, the
commonest value among its last sixteen members: variants of one prompt differ in different places, so it tends to the
sketch of the prompt that they were made from, and families whose sketches meet are joined. A sketch is compared to all
families at once, 64 numbers each: with two thousand of them that is quicker than bands, and misses none.

Told from eight users within a day on, and only from six standard deviations (Poisson) over what the family is used to.

Order: requests are taken in order of (timestamp, event_id), whatever the partitions. At most `user_prompts_max`
different prompts a user and hour are passed on, which no layout changes; above `passed_max` a second, partition and
tenant the rest is counted and left out, and only then could another layout say something else.

Cold start. First three days: asks for twice as many users, since a form letter that the guard has always blocked looks
like a campaign. First week: a family's usual number of users is little known, so such a letter may be told. Then: all.

Memory: stage 1, about 200 bytes a user blocked within an hour; stage 2, about 0.6 KB a lone prompt, at most 4 KB and
100 bytes a user of a family. What a crash loses: nothing.
"""

import math
from typing import Final

import msgspec

from detectors.campaign_families import Families, Family, sketch_of, taken, together
from detectors.campaign_passed import NAME, CampaignOne
from detectors.config import CampaignConfig, DetectConfig
from detectors.detector import Alarm, Card, Detector, StageTwo, contributors
from detectors.entities import Room
from detectors.finding import CONTRIBUTORS_MAX, Entity, Statistic
from detectors.rollup import Signal
from detectors.time import SECOND_US

JOINED: Final = 0.42
"""Similarity of two families' sketches from which they are one."""
DAY_US: Final = 86_400 * SECOND_US
NEW_US: Final = 3 * DAY_US
"""A tenant is new for so long: twice as many users are asked for."""
WEEK_US: Final = 7 * DAY_US
PAST_HALF_LIFE_US: Final = WEEK_US
COLD_TENANT: Final = "The tenant's first three days: twice as many users are asked for."
COLD_PAST: Final = "The tenant's first week: how many users a day a family of prompts usually has is hardly known."
SPREAD: Final = 6.0
"""Standard deviations (Poisson) above a family's usual number of users a day."""


class CampaignTwo(StageTwo):
    """The families."""

    def __init__(self, config: DetectConfig) -> None:
        self._config: CampaignConfig = config.campaign
        self._tenants: dict[str, Families] = {}
        self._room = Room[str, Families](_seen_s)
        self._counters = {"refused_tenants": 0, "evicted_families": 0}

    @property
    def counters(self) -> dict[str, int]:
        families = sum(len(known.families) for known in self._tenants.values())
        return self._counters | {"tenants": len(self._tenants), "families": families}

    def signal(self, signal: Signal) -> list[Alarm]:
        sketch = sketch_of(signal.key.rpartition("\n")[2])
        if sketch is None:
            return []
        known = self._tenants.get(signal.tenant)
        if known is None:
            if len(self._tenants) >= self._config.tenants_max and not self._room.made(self._tenants, signal.second):
                self._counters["refused_tenants"] += 1
                return []
            known = self._tenants[signal.tenant] = Families([], signal.first_seen_us)
        row = known.nearest(sketch, self._config.similarity)
        if row is None:
            if len(known.families) >= self._config.families_max:
                known.remove(known.oldest())
                self._counters["evicted_families"] += 1
            row, family = len(known.families), Family(sketch, [], {}, signal.first_seen_us, 0, signal.model)
        else:
            family = known.families[row]
        taken(family, sketch, signal, self._config.family_users_max)
        known.put(row, family)
        other = self._like(known, row) if family.prompts > 1 else None
        if other is not None:
            family = together(family, known.families[other], self._config.family_users_max)
            known.put(min(row, other), family)
            known.remove(max(row, other))
        return self._judged(family, signal, known.since_us)

    def _like(self, known: Families, row: int) -> int | None:
        """The family that this one is joined to: one with nearly its sketch, or a similar one, if either was told.

        Variants far from each other begin families of their own, which grow while the campaign lasts."""
        family = known.families[row]
        other = known.nearest(family.sketch, self._config.similarity, apart=row)
        if other is None or known.alike(row, other) >= JOINED:
            return other
        told_s = max(family.raised_s, known.families[other].raised_s)
        return other if family.last_us // SECOND_US - told_s < self._config.window_s else None

    def _judged(self, family: Family, signal: Signal, since_us: int) -> list[Alarm]:
        """Told when it becomes a campaign, while prompts come, and again when it has half as many users more."""
        usual = self._usual(family, signal.last_seen_us, since_us)
        users = len(family.users)
        wanted = max(float(self._config.users_min), usual + SPREAD * math.sqrt(usual + 1))
        new = signal.last_seen_us - since_us < NEW_US
        wanted *= 2 if new else 1
        if users < wanted:
            family.told = min(family.told, users)
            return []
        anew = users >= 1.5 * family.told
        if not anew and signal.second - family.raised_s >= self._config.again_s:
            return []
        family.told = users if anew else family.told
        family.raised_s = signal.second
        young = signal.last_seen_us - since_us < WEEK_US
        return [
            self._alarm(family, signal, wanted, usual, cold_start=COLD_TENANT if new else COLD_PAST if young else "")
        ]

    def _usual(self, family: Family, now_us: int, since_us: int) -> float:
        """Users of before the last day go into the family's past; returns how many a day are usual."""
        gone = [user for user, last_us in family.users.items() if now_us - last_us > self._config.window_s * SECOND_US]
        for user in gone:
            del family.users[user]
        family.past *= 0.5 ** (max(now_us - family.past_us, 0) / PAST_HALF_LIFE_US)
        family.past += len(gone)
        family.past_us = now_us
        learned = now_us - since_us - self._config.window_s * SECOND_US
        faded_days = (1 - 0.5 ** (max(learned, DAY_US) / PAST_HALF_LIFE_US)) * PAST_HALF_LIFE_US / math.log(2) / DAY_US
        return float(family.past / faded_days)

    def _alarm(self, family: Family, signal: Signal, wanted: float, usual: float, *, cold_start: str) -> Alarm:
        users = len(family.users)
        at_us = (signal.second + 1) * SECOND_US
        span_s = (at_us - family.first_us) // SECOND_US
        started_by = family.samples[0][1]
        return Alarm(
            tenant=signal.tenant,
            entity=Entity(kind="tenant", id=f"{signal.tenant}/{started_by}"),
            model=family.model,
            at_us=at_us,
            first_seen_us=family.first_us,
            last_seen_us=at_us,
            severity="high" if users >= 2 * wanted else "medium",
            confidence="medium" if cold_start else "high",
            statistic=Statistic(
                name="users blocked with one family of prompts",
                observed=float(users),
                baseline=round(usual, 2),
                threshold=round(wanted, 2),
                unit="users",
                improbability=0.0,
            ),
            counts={"users": len(family.users), "prompts": family.prompts},
            summary=(
                f"{len(family.users)} users were blocked with variants of one prompt, {family.prompts} in {span_s} s"
            ),
            offsets=dict(family.offsets),
            samples=family.samples,
            cold_start=cold_start,
            contributors=contributors(dict.fromkeys(family.users, 1), "users", CONTRIBUTORS_MAX),
        )

    def snapshot(self) -> bytes:
        tenants = {tenant: (known.families, known.since_us) for tenant, known in self._tenants.items()}
        return _encoder.encode((tenants, self._counters))

    def restore(self, raw: bytes) -> None:
        tenants, self._counters = _two_decoder.decode(raw)
        self._tenants = {tenant: Families(*known) for tenant, known in tenants.items()}


def _seen_s(known: Families) -> int:
    return max((family.last_us for family in known.families), default=known.since_us) // SECOND_US


_encoder: Final = msgspec.msgpack.Encoder()
_two_decoder: Final = msgspec.msgpack.Decoder(tuple[dict[str, tuple[list[Family], int]], dict[str, int]])

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="2",
        atlas=["AML.T0051.000", "AML.T0054"],
        owasp=["LLM01"],
        runbook=[
            "Open the sample events: is it an attack that is passed around, or a form letter that a guard mistakes?",
            "Were any variants let through? Look for answered requests of the named users just after a block.",
            "Do the users share an address range, an API key or a day of sign-up? Then one hand holds many accounts.",
        ],
        key=["tenant"],
        window_s=2 * 86_400,
        lookback_s=86_400,
    ),
    reads=frozenset({"blocked"}),
    enabled=lambda config: config.campaign.enabled,
    stage_one=CampaignOne,
    stage_two=CampaignTwo,
)
