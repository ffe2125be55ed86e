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

import base64
import binascii
import math
from typing import Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from collector.event import AuditEvent
from detectors.chunk import Chunk
from detectors.config import CampaignConfig, DetectConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo, actor, actor_entity, contributors
from detectors.entities import Dump, EntityTable
from detectors.finding import CONTRIBUTORS_MAX, Entity, Statistic
from detectors.registry import Registry
from detectors.rollup import Partial, Sample, Signal, earliest, merge_offsets
from detectors.time import SECOND_US

NAME: Final = "campaign"
SKETCH_BYTES: Final = 256
SLOTS: Final = SKETCH_BYTES // 4
MEMBERS_MAX: Final = 16
JOINED: Final = 0.42
"""Similarity of two families' sketches from which they are one."""
HOUR_US: Final = 3_600 * SECOND_US
DAY_US: Final = 24 * HOUR_US
NEW_US: Final = 3 * DAY_US
"""A tenant is new for so long: twice as many users are asked for."""
PAST_HALF_LIFE_US: Final = 7 * DAY_US
SPREAD: Final = 6.0
"""Standard deviations (Poisson) above a family's usual number of users a day."""
Sketches = NDArray[np.uint32]


class Passed(Struct):
    """What was passed on of a user since `since_us`."""

    since_us: int
    prompts: list[str]


class CampaignOne(StageOne):
    """Passes on blocked prompts, each once a user and hour."""

    def __init__(self, config: DetectConfig, registry: Registry) -> None:  # noqa: ARG002 the same for all
        self._config = config.campaign
        self._users: EntityTable[str, Passed] = EntityTable(self._config.users_max, HOUR_US)
        self._left_out = 0

    @property
    def counters(self) -> dict[str, int]:
        return self._users.counters | {"users": len(self._users), "left_out": self._left_out}

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        told: list[Partial | Signal] = []
        room: dict[tuple[int, str], int] = {}
        for row in np.flatnonzero(chunk.columns.blocked).tolist():
            event, moment_us = chunk.event(row), int(chunk.columns.moment_us[row])
            who, second = actor(event), int(chunk.second[row])
            if not who or sketch_of(event.minhash) is None or not self._new(f"{event.tenant}\n{who}", event, moment_us):
                continue
            place = second, event.tenant
            room[place] = room.get(place, 0) + 1
            if room[place] > self._config.passed_max:
                self._left_out += 1
                continue
            offset = int(chunk.columns.offset[row])
            told.append(
                Signal(
                    partition=chunk.partition,
                    second=second,
                    tenant=event.tenant,
                    kind=NAME,
                    # In order of time, so that stage 2 is given them so.
                    key=f"{moment_us:017d}\n{event.event_id}\n{event.minhash}",
                    entity=actor_entity(who),
                    model=event.model_version,
                    first_seen_us=moment_us,
                    last_seen_us=moment_us,
                    observed_milli=0,
                    baseline_milli=0,
                    counts={},
                    samples=[(moment_us, event.event_id)],
                    first_offset=offset,
                    last_offset=offset,
                )
            )
        return told

    def _new(self, name: str, event: AuditEvent, moment_us: int) -> bool:
        past = self._users.get(name)
        if past is None or moment_us - past.since_us > HOUR_US:
            past = Passed(moment_us, [])
        prompt = event.turn_hash or event.prompt_hash or event.minhash
        new = prompt not in past.prompts and len(past.prompts) < self._config.user_prompts_max
        if new:
            past.prompts.append(prompt)
            self._users.put(name, moment_us, past)
        return new

    def snapshot(self) -> bytes:
        return _encoder.encode((self._users.dump(), self._left_out))

    def restore(self, raw: bytes) -> None:
        users, self._left_out = _one_decoder.decode(raw)
        self._users.load(users)


class Family(Struct):
    """Blocked prompts that are alike."""

    sketch: bytes
    members: list[bytes]
    """The last sixteen sketches."""
    users: dict[str, int]
    """User to when he was last blocked with one, in µs: those of the last day."""
    first_us: int
    last_us: int
    model: str
    prompts: int = 0
    samples: list[Sample] = []
    offsets: dict[int, tuple[int, int]] = {}
    raised_s: int = 0
    told: int = 0
    """Users when it was last told anew."""
    past: float = 0.0
    """Users before the last day, faded."""
    past_us: int = 0


class Families:
    """One tenant's, with their sketches as the rows of a matrix."""

    def __init__(self, families: list[Family], since_us: int) -> None:
        self.families, self.since_us = families, since_us
        self._matrix: Sketches = np.zeros((64, SLOTS), np.uint32)
        self._fit()
        for row, family in enumerate(families):
            self._matrix[row] = slots_of(family.sketch)

    def _fit(self) -> None:
        while len(self._matrix) < len(self.families):
            self._matrix = np.concatenate([self._matrix, np.zeros_like(self._matrix)])

    def nearest(self, sketch: bytes, similarity: float, apart: int = -1) -> int | None:
        """The most similar family, the first of equals; `apart` is left out."""
        if not self.families:
            return None
        equal = (self._matrix[: len(self.families)] == slots_of(sketch)).sum(1)
        if apart >= 0:
            equal[apart] = 0
        best = int(equal.argmax())
        return best if equal[best] >= similarity * SLOTS else None

    def alike(self, row: int, other: int) -> float:
        """Estimated similarity of two families."""
        return float((self._matrix[row] == self._matrix[other]).mean())

    def put(self, row: int, family: Family) -> None:
        """At a row, or after the last."""
        if row == len(self.families):
            self.families.append(family)
            self._fit()
        self.families[row] = family
        self._matrix[row] = slots_of(family.sketch)

    def remove(self, row: int) -> None:
        """The last one takes its place."""
        last = self.families.pop()
        if row < len(self.families):
            self.put(row, last)

    def oldest(self) -> int:
        """The family longest unseen."""
        return min(range(len(self.families)), key=lambda row: (self.families[row].last_us, row))


class CampaignTwo(StageTwo):
    """The families."""

    def __init__(self, config: DetectConfig) -> None:
        self._config: CampaignConfig = config.campaign
        self._tenants: dict[str, Families] = {}
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
            if len(self._tenants) >= self._config.tenants_max:
                self._counters["refused_tenants"] += 1
                return []
            known = self._tenants[signal.tenant] = Families([], signal.first_seen_us)
        row = known.nearest(sketch, self._config.similarity)
        if row is None:
            if len(known.families) >= self._config.families_max:
                known.remove(known.oldest())
                self._counters["evicted_families"] += 1
            row = len(known.families)
            known.put(row, Family(sketch, [], {}, signal.first_seen_us, 0, signal.model))
        family = known.families[row]
        self._take(family, sketch, signal)
        known.put(row, family)
        other = self._like(known, row) if family.prompts > 1 else None
        if other is not None:
            family = _together(family, known.families[other], self._config.family_users_max)
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

    def _take(self, family: Family, sketch: bytes, signal: Signal) -> None:
        """One more prompt of the family."""
        family.members = [*family.members, sketch][-MEMBERS_MAX:]
        family.sketch = commonest(family.members)
        family.users = newest(family.users | {signal.entity.id: signal.last_seen_us}, self._config.family_users_max)
        family.prompts += 1
        family.last_us, family.model = signal.last_seen_us, signal.model
        family.samples = earliest([*family.samples, *signal.samples])
        merge_offsets(family.offsets, {signal.partition: (signal.first_offset, signal.last_offset)})

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
        return [self._alarm(family, signal, wanted, usual, new=new)]

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

    def _alarm(self, family: Family, signal: Signal, wanted: float, usual: float, *, new: bool) -> Alarm:
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
            confidence="medium" if new else "high",
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
            cold_start="The tenant's first three days: twice as many users are asked for." if new else "",
            contributors=contributors(dict.fromkeys(family.users, 1), "users", CONTRIBUTORS_MAX),
        )

    def snapshot(self) -> bytes:
        tenants = {tenant: (known.families, known.since_us) for tenant, known in self._tenants.items()}
        return _encoder.encode((tenants, self._counters))

    def restore(self, raw: bytes) -> None:
        tenants, self._counters = _two_decoder.decode(raw)
        self._tenants = {tenant: Families(*known) for tenant, known in tenants.items()}


def sketch_of(text: str) -> bytes | None:
    """The sketch of an event, if it is one of 64 slots."""
    try:
        sketch = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return sketch if len(sketch) == SKETCH_BYTES else None


def slots_of(sketch: bytes) -> Sketches:
    """Its numbers."""
    return np.frombuffer(sketch, "<u4").astype(np.uint32)


def commonest(sketches: list[bytes]) -> bytes:
    """Slot by slot the value that most of the sketches have; of equally many the earliest sketch's."""
    if len(sketches) < 3:
        return sketches[0]
    rows = np.frombuffer(b"".join(sketches), "<u4").reshape(len(sketches), -1)
    alike = (rows[:, None, :] == rows[None, :, :]).sum(1)
    chosen: Sketches = rows[alike.argmax(0), np.arange(rows.shape[1])]
    return chosen.tobytes()


def newest(users: dict[str, int], limit: int) -> dict[str, int]:
    """The `limit` users seen last, in order of id."""
    if len(users) > limit:
        users = dict(sorted(users.items(), key=lambda item: (-item[1], item[0]))[:limit])
    return users


def _together(one: Family, other: Family, users_max: int) -> Family:
    """Two families as one, under the older one's name."""
    members = [*other.members, *one.members][-MEMBERS_MAX:]
    users = dict(one.users)
    for user, last_us in other.users.items():
        users[user] = max(users.get(user, last_us), last_us)
    offsets = dict(one.offsets)
    merge_offsets(offsets, other.offsets)
    return Family(
        sketch=commonest(members),
        members=members,
        users=newest(users, users_max),
        past=one.past + other.past,
        past_us=max(one.past_us, other.past_us),
        first_us=min(one.first_us, other.first_us),
        last_us=max(one.last_us, other.last_us),
        model=one.model,
        prompts=one.prompts + other.prompts,
        samples=earliest([*one.samples, *other.samples]),
        offsets=offsets,
        raised_s=max(one.raised_s, other.raised_s),
        told=max(one.told, other.told),
    )


_encoder: Final = msgspec.msgpack.Encoder()
_Users: TypeAlias = Dump[str, Passed]
_one_decoder: Final = msgspec.msgpack.Decoder(tuple[_Users, int])
_two_decoder: Final = msgspec.msgpack.Decoder(tuple[dict[str, tuple[list[Family], int]], dict[str, int]])

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="1",
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
