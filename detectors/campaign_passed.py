"""The first half of campaign: which blocked prompts leave the partition. Method and memory: `detectors/campaign.py`."""

from typing import Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from detectors.campaign_families import sketch_of
from detectors.chunk import Chunk
from detectors.config import DetectConfig
from detectors.detector import StageOne, actor, actor_entity
from detectors.entities import Dump, EntityTable
from detectors.registry import Registry
from detectors.rollup import Partial, Signal
from detectors.text import Text
from detectors.time import SECOND_US

NAME: Final = "campaign"
HOUR_US: Final = 3_600 * SECOND_US


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

    def _new(self, name: str, event: Text, moment_us: int) -> bool:
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


_encoder: Final = msgspec.msgpack.Encoder()
_Users: TypeAlias = Dump[str, Passed]
_one_decoder: Final = msgspec.msgpack.Decoder(tuple[_Users, int])
