"""The first half of block_rate: what counts as a trial. Method and memory: `detectors/block_rate.py`."""

import zlib
from collections import Counter
from typing import Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from detectors.block_rate_asked import Asked, Asking
from detectors.chunk import Chunk, Groups
from detectors.columns import Flags, Ints
from detectors.config import DetectConfig
from detectors.detector import StageOne, actor
from detectors.entities import Dump, EntityTable
from detectors.prompts import Prompt, prompt_of, seen_before
from detectors.registry import Registry
from detectors.rollup import Partial, Signal, first
from detectors.time import SECOND_US

NAME: Final = "block_rate"
SLOTS: Final = 4
"""Guards whose last blocks are told apart, a user."""


class Blocked(Struct):
    """A user whom a guard has blocked."""

    last_us: int
    prompts: list[Prompt]


class BlockRateOne(StageOne):
    """Thins out a user's repeated blocks. That needs only the user's own past, which is all in this partition.

    Of each user it keeps when a guard last blocked him, in a few slots that guards share by a digest of their names; of
    a blocked one also his blocked prompts. How much he asks (`detectors.block_rate_asked`) goes with the seconds of
    those whom it is told of: the numbers as weights, `asked` with a block and `later` after it, the seconds of the last
    eight requests as a histogram under the user's name."""

    def __init__(self, config: DetectConfig, registry: Registry) -> None:
        self._config = config.block_rate
        self._contributors_max = config.contributors_max
        self._users: EntityTable[str, Blocked] = EntityTable(
            self._config.users_max, self._config.distinct_s * SECOND_US
        )
        self._registry = registry
        self._last_s = registry.column(f"{NAME}.last_s", np.uint32, SLOTS)
        self._asking = Asking(registry, NAME)

    @property
    def counters(self) -> dict[str, int]:
        return self._users.counters | {"users": len(self._users)}

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        columns = chunk.columns
        if not len(columns.verdict_event):
            return []
        trial, guard, blocked = columns.verdict_event, columns.verdict_guard, columns.verdict_blocked
        fresh = self._fresh(chunk, trial, guard, blocked)
        asked, later = self._asking.see(chunk, trial, blocked)
        blocks = np.flatnonzero(blocked)
        distinct = np.array(
            [
                self._new_prompt(chunk, int(trial[index]), columns.guards[int(guard[index])])
                for index in blocks.tolist()
            ],
            bool,
        )
        cells = Groups(trial, chunk.step[trial], columns.kind[trial], guard)
        of = cells.numbers()
        guards = np.empty(len(cells), np.int64)
        guards[of] = guard
        sums = _sums(cells, of, blocks, distinct, fresh)
        counted = set(blocks[distinct].tolist())
        members = _grouped(of, blocks)
        heard = np.zeros(len(chunk), bool)
        heard[list(later)] = True
        again = _grouped(of, np.flatnonzero(heard[trial])) if later else {}
        told: list[Partial | Signal] = []
        for number, place in enumerate(cells.places(chunk, NAME)):
            counts = {name: values[number] for name, values in sums.items() if values[number]}
            key = f"{place.model}\n{columns.guards[int(guards[number])]}"
            weights: dict[str, dict[str, int]] = {}
            if number in again:
                totals = {chunk.actor(event): later[event] for event in trial[again[number]].tolist()}
                weights["later"] = first(totals, self._contributors_max)
            partial = place.partial(key, counts=counts, weights=weights)
            mine = members.get(number)
            told.append(partial if mine is None else self._with_blocks(chunk, partial, mine, counted, asked))
        return told

    def _with_blocks(
        self, chunk: Chunk, partial: Partial, members: list[int], counted: set[int], asked: dict[int, Asked]
    ) -> Partial:
        """A second with blocks, `members` among the verdicts: whose they are, and how much these ask."""
        events = [int(chunk.columns.verdict_event[index]) for index in members]
        actors = [chunk.actor(event) for event in events]
        blocked = first(Counter(actors), self._contributors_max)
        mine = Counter(who for who, index in zip(actors, members, strict=True) if index in counted)
        last = {who: asked[event] for who, event in zip(actors, events, strict=True) if event in asked}
        known = {who: last[who] for who in blocked if who in last}
        weights = {
            "asked": {who: each.total for who, each in known.items()},
            "blocked": blocked,
            "counted": first(mine, self._contributors_max),
        }
        return msgspec.structs.replace(
            partial,
            weights=partial.weights | {name: users for name, users in weights.items() if users},
            histograms={who: dict(Counter(each.seconds)) for who, each in known.items()},
            samples=chunk.samples(events),
        )

    def _fresh(self, chunk: Chunk, trial: Ints, guard: Ints, blocked: Flags) -> Flags:
        """Whether the guard had not blocked the user for so long, for each verdict; keeps the blocks."""
        slots = np.array([zlib.crc32(name.encode()) % SLOTS for name in chunk.columns.guards], np.int64)[guard]
        entity, second = chunk.entity[trial], chunk.second[trial]
        last_s = self._last_s.values
        last = last_s[entity, slots].astype(np.int64)
        fresh: Flags = (entity < 0) | (last == 0) | (second - last >= self._config.fresh_s)
        again = np.flatnonzero(np.isin(entity, entity[blocked & (entity >= 0)])) if blocked.any() else trial[:0]
        columns = (trial[again], entity[again], slots[again], second[again], blocked[again])
        known: dict[tuple[int, int], int] = {}
        kept: dict[tuple[int, int], int] = {}
        waiting: dict[tuple[int, int], int] = {}
        """The blocks of one event, which count from the next event on, whatever the order of its guards."""
        told, before = [], -1
        for event, row, slot, now, block in zip(*(column.tolist() for column in columns), strict=True):
            place = row, slot
            if event != before:
                before = event
                if waiting:
                    known |= waiting
                    kept |= waiting
                    waiting = {}
            since = known.get(place)
            if since is None:
                since = known[place] = int(last_s[place])
            told.append(since == 0 or now - since >= self._config.fresh_s)
            if block:
                waiting[place] = min(max(now, 1), 2**32 - 1)
        fresh[again] = told
        for place, now in (kept | waiting).items():
            last_s[place] = now
            self._registry.suspect(place[0], now + self._config.distinct_s)
        return fresh

    def _new_prompt(self, chunk: Chunk, row: int, guard: str) -> bool:
        """Whether a blocked prompt counts: one that the user was not blocked for before, within a limit."""
        event, moment_us = chunk.event(row), int(chunk.columns.moment_us[row])
        name = f"{event.tenant}\n{event.model_version}\n{guard}\n{actor(event)}"
        past = self._users.get(name)
        if past is None or moment_us - past.last_us > self._config.distinct_s * SECOND_US:
            past = Blocked(moment_us, [])
        prompt = prompt_of(event)
        new = len(past.prompts) < self._config.distinct_max and not seen_before(
            prompt, past.prompts, self._config.same_prompt
        )
        if new:
            past.prompts.append(prompt)
        past.last_us = moment_us
        self._users.put(name, moment_us, past)
        return new

    def snapshot(self) -> bytes:
        return _encoder.encode(self._users.dump())

    def restore(self, raw: bytes) -> None:
        self._users.load(_users_decoder.decode(raw))


def _sums(cells: Groups, of: Ints, blocks: Ints, distinct: Flags, fresh: Flags) -> dict[str, list[int]]:
    """Trials and blocks of each stream, a group. Few verdicts are blocks or not fresh, so only those are added up.

    `of` is the group of each verdict, `blocks` the verdicts that block, `distinct` which of these are new prompts."""

    def count(rows: Ints) -> Ints:
        return np.bincount(of[rows], minlength=len(cells))

    blocked, distinct_blocks = count(blocks), count(blocks[distinct])
    sums = {
        "blocks": blocked,
        "distinct_blocks": distinct_blocks,
        "distinct_trials": cells.sizes - blocked + distinct_blocks,
        "fresh_blocks": count(blocks[fresh[blocks]]),
        "fresh_trials": cells.sizes - count(np.flatnonzero(~fresh)),
        "requests": cells.sizes,
    }
    return {name: values.tolist() for name, values in sums.items()}


def _grouped(of: Ints, rows: Ints) -> dict[int, list[int]]:
    """Group to its rows, of these."""
    found: dict[int, list[int]] = {}
    for group, row in zip(of[rows].tolist(), rows.tolist(), strict=True):
        found.setdefault(group, []).append(row)
    return found


_encoder = msgspec.msgpack.Encoder()
_Users: TypeAlias = Dump[str, Blocked]
_users_decoder = msgspec.msgpack.Decoder(_Users)
