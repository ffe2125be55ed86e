"""volume: a session, user, API key or address sends many more requests or tokens than it ever did.

Method. Requests, and tokens in and out, are added up in windows of ten minutes (`volume_book.py`) and compared with
the client's own past: the largest window that it had, fading over two weeks. A stranger is compared with the largest
hundredth of windows of his tenant's clients too, less and less so until he has twenty windows of his own. How far
clients exceed their past falls off as an exponential in the logarithm; the threshold is where the budget puts it
(`exceedances.py`). A window is judged while it grows, at each step of a factor of 1.19, so a flood is told as soon as
it passes the threshold. What exceeds the past is past itself after 20 hours: a job that runs every day is told once,
on its first day, if at all.

A user's requests are all in one partition, which keeps his windows. API keys and addresses are spread over partitions:
the heaviest of each second are added up in stage 2, exactly up to `contributors_max` a second and partition, and are
told only where no user of theirs told in this window has two thirds of it. A session is told instead of its user where
it has two thirds of what came since he passed his past. High only where the client has more than half of the tenant's
volume.

Evenness of pace is not used: honest jobs send as evenly as floods (docs/detection.md has the share).

Cold start. Nothing of strangers before 20 windows of the tenant's clients. First day: every new heavy client may be
told. First week: the threshold is mostly assumed. Who grows by less than the threshold each day is never told.

Memory: 54 bytes a user, API key and address; 300 bytes a client above its past; 4 KB a tenant, 100 bytes a peak.
"""

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from typing import Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from detectors.chunk import Chunk, Groups, Place
from detectors.columns import Ints
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageOne, StageTwo, actor
from detectors.entities import Dump, EntityTable, Room
from detectors.registry import Registry, Rows
from detectors.rollup import Cell, Extreme, Partial, Signal, earliest, largest, merge_offsets
from detectors.text import Text
from detectors.time import SECOND_US
from detectors.volume_book import ADOPT_S, MEASURES, Book, Crossing
from detectors.volume_told import Episode, Judged, TenantVolume, alarm_of

NAME: Final = "volume"
POPULATION: Final = "population"
SPREAD: Final = ("address", "api_key")
"""Kinds of client whose requests may be in many partitions."""
SESSIONS_MAX: Final = 32
"""Sessions of a user told apart; the others count together."""
MOSTLY: Final = 2 / 3
TOKENS_A_REQUEST: Final = 100
"""What a request weighs beside its tokens, where the heaviest are chosen."""


class Watch(Struct):
    """Sessions of a user whose window is above his past."""

    window: int
    sessions: dict[str, int] = {}
    told: str = ""
    """Who was told, the user or a session of his: stays for a day, so that one flood is one finding, unless the rest of
    it comes by other sessions."""
    told_s: int = 0


class VolumeOne(StageOne):
    """Keeps users' windows; passes on who exceeds his past, and the heaviest API keys and addresses."""

    def __init__(self, config: DetectConfig, registry: Registry) -> None:
        self._config = config
        self._book = Book(registry, NAME, config.volume)
        self._watched: EntityTable[bytes, Watch] = EntityTable(config.volume.sessions_max, ADOPT_S * SECOND_US)

    @property
    def counters(self) -> dict[str, int]:
        return self._watched.counters | {"watched": len(self._watched)}

    def events(self, chunk: Chunk) -> list[Partial | Signal]:
        columns = chunk.columns
        rows = np.flatnonzero(chunk.entity >= 0)
        if not len(rows):
            return []
        tokens = columns.prompt_tokens + columns.response_tokens
        names = {tenant: number for number, tenant in enumerate(dict.fromkeys(tenant for tenant, _ in columns.kinds))}
        tenant = np.array([names[name] for name, _ in columns.kinds], np.int64)[columns.kind]
        added = self._book.add(chunk.second[rows], chunk.entity[rows], np.ones(len(rows), np.int64), tokens[rows])
        seconds = Groups(rows, chunk.step[rows], tenant[rows])
        places = seconds.places(chunk, NAME)
        group = np.zeros(len(chunk), np.int64)
        group[seconds.rows] = seconds.group
        sizes = [_counted(group[rows[event]], size, len(places)) for event, size in added.reached]
        told: list[Partial | Signal] = []
        for number, (place, spent) in enumerate(zip(places, seconds.sums(tokens), strict=True)):
            histograms = {name: sizes[measure][number] for measure, name in enumerate(MEASURES)}
            told.append(
                place.partial(POPULATION, counts={"requests": place.size, "tokens": spent}, histograms=histograms)
            )
        whose = self._watch(chunk, rows[added.above], {int(rows[each.event]) for each in added.crossings})
        told += self._crossed(chunk, rows, added.crossings, (group, places), whose)
        for kind, codes, shown in (
            ("address", columns.address, columns.addresses),
            ("api_key", columns.api_key, columns.api_keys),
        ):
            if shown != [""]:
                named = rows[np.array([bool(name) for name in shown])[codes[rows]]]
                told += self._heaviest(kind, named, (codes, shown), tokens, (group, places))
        return told

    def _watch(self, chunk: Chunk, above: Rows, crossing: set[int]) -> dict[int, str]:
        """Adds events above their clients' past to the sessions, in order. Of those that cross: who is to be told."""
        columns, whose = chunk.columns, {}
        for row in above.tolist():
            event = chunk.event(row)
            key = columns.high[row].tobytes() + columns.low[row].tobytes()
            second = int(chunk.second[row])
            window = second // self._config.volume.window_s
            watch = self._watched.get(key) or Watch(window)
            if watch.window != window:
                watch.window, watch.sessions = window, {}
            session = event.session_id
            if session not in watch.sessions and len(watch.sessions) >= SESSIONS_MAX:
                session = ""
            watch.sessions[session] = watch.sessions.get(session, 0) + 1
            if row in crossing:
                most = MOSTLY * sum(watch.sessions.values())
                told = watch.told.partition("/")[2]
                if not watch.told or second - watch.told_s > ADOPT_S:
                    watch.told = actor(event)
                    if session and watch.sessions[session] >= most:
                        watch.told = f"{watch.told}/{session}"
                elif told and watch.sessions.get(told, 0) < most:
                    watch.told = actor(event)  # another flood of his, of which that session is not to blame
                watch.told_s = second
                whose[row] = watch.told
            self._watched.put(key, int(columns.moment_us[row]), watch)
        return whose

    def _crossed(
        self,
        chunk: Chunk,
        rows: Rows,
        crossings: list[Crossing],
        where: tuple[Ints, list[Place]],
        whose: dict[int, str],
    ) -> Iterable[Partial]:
        found: dict[tuple[int, int], list[tuple[Extreme, int]]] = {}
        for each in crossings:
            row = int(rows[each.event])
            moment_us = int(chunk.columns.moment_us[row])
            extreme = (each.ratio_milli, moment_us, whose[row], chunk.event(row).event_id, each.volume, each.windows)
            found.setdefault((int(where[0][row]), each.measure), []).append((extreme, row))
        for (group, measure), extremes in sorted(found.items(), key=lambda item: item[0]):
            offsets = [int(chunk.columns.offset[row]) for _, row in extremes]
            place = where[1][group]._replace(first_offset=min(offsets), last_offset=max(offsets))
            by = {pair: volume for extreme, row in extremes for pair, volume in _carried(chunk.event(row), extreme)}
            weights = {"by": dict(sorted(by.items()))} if by else None
            yield place.partial(
                MEASURES[measure], weights=weights, extremes=largest(extreme for extreme, _ in extremes)
            )

    def _heaviest(
        self, kind: str, rows: Rows, coded: tuple[Ints, list[str]], tokens: Ints, where: tuple[Ints, list[Place]]
    ) -> Iterable[Partial]:
        """The heaviest of each second and tenant, with their requests and tokens; ties by name."""
        codes, shown = coded
        group, places = where
        clients = Groups(rows, group[rows], codes[rows])
        requests, spent = clients.sizes, np.array(clients.sums(tokens), np.int64)
        whose, second = clients.firsts(codes), np.array(clients.firsts(group), np.int64)
        order = np.lexsort((-(spent + TOKENS_A_REQUEST * requests), second))
        limit = self._config.contributors_max
        for begin, end in pairwise([*np.flatnonzero(np.diff(second, prepend=-1)).tolist(), len(second)]):
            mine = sorted(
                order[begin:end].tolist(),
                key=lambda each: (-(spent[each] + TOKENS_A_REQUEST * requests[each]), shown[whose[each]]),
            )[:limit]
            weights = {
                "requests": {shown[whose[each]]: int(requests[each]) for each in mine},
                "tokens": {shown[whose[each]]: int(spent[each]) for each in mine},
            }
            yield places[int(second[begin])].partial(kind, weights=weights)

    def snapshot(self) -> bytes:
        return _encoder.encode(self._watched.dump())

    def restore(self, raw: bytes) -> None:
        self._watched.load(_watch_decoder.decode(raw))


def _carried(event: Text, extreme: Extreme) -> Iterable[tuple[str, int]]:
    """Who crossed by which API key and address, and with how much: so a key is not told for what a user of it did."""
    _, _, who, _, volume, _ = extreme
    for carrier in (event.api_key, event.client_address):
        if carrier and carrier != actor(event):
            yield f"{who}\n{carrier}", volume


def _counted(group: Ints, size: Ints, groups: int) -> list[dict[int, int]]:
    """A histogram of sizes a group."""
    found: list[dict[int, int]] = [{} for _ in range(groups)]
    code, counts = np.unique(group * 64 + size, return_counts=True)
    for each, count in zip(code.tolist(), counts.tolist(), strict=True):
        found[each // 64][each % 64] = count
    return found


class VolumeTwo(StageTwo):
    """Judges who exceeds his past by what the tenant's clients do, and adds up API keys and addresses."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config.volume
        self._tenants: dict[str, TenantVolume] = {}
        self._room = Room[str, TenantVolume](
            lambda tenant: max(tenant.peaks.first_s, tenant.window * config.volume.window_s)
        )
        self._registry = Registry(self._config.keys_max)
        self._book = Book(self._registry, NAME, self._config)
        self._episodes: EntityTable[str, Episode] = EntityTable(self._config.users_max, ADOPT_S * SECOND_US)
        self._refused_tenants = 0

    @property
    def counters(self) -> dict[str, int]:
        return (
            self._episodes.counters
            | self._registry.counters
            | {
                "tenants": len(self._tenants),
                "refused_tenants": self._refused_tenants,
                "keys_and_addresses": self._registry.live,
                "above_their_past": len(self._episodes),
                "peaks_dropped": sum(tenant.peaks.dropped for tenant in self._tenants.values()),
            }
        )

    def second(self, second: int, cells: list[tuple[str, str, Cell]]) -> list[Alarm]:
        alarms: dict[str, Alarm] = {}
        # What the population did comes first, then users, then what is spread over partitions.
        for name, key, cell in sorted(cells, key=lambda each: (each[0], each[1] != POPULATION, each[1] in SPREAD)):
            tenant = self._tenant(name, second)
            if tenant is None:
                continue
            if key == POPULATION:
                tenant.peaks.settle(second, ADOPT_S, self._config.budget_per_week)
                tenant.add(second // self._config.window_s, cell)
                continue
            for judged in self._spread(name, tenant, key, second, cell) if key in SPREAD else _users(key, cell):
                alarm = self._judge(name, tenant, second, judged, cell)
                if alarm is not None:
                    alarms[f"{name}\n{alarm.entity.id}"] = alarm
        return list(alarms.values())

    def _tenant(self, name: str, second: int) -> TenantVolume | None:
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._config.tenants_max and not self._room.made(self._tenants, second):
                self._refused_tenants += 1
                return None
            tenant = self._tenants[name] = TenantVolume.new(second)
        return tenant

    def _spread(self, name: str, tenant: TenantVolume, kind: str, second: int, cell: Cell) -> list[Judged]:
        """API keys or addresses of the merged second."""
        whose = sorted(cell.weights["requests"])
        digests = b"".join(
            hashlib.blake2b(f"{name}\n{kind}\n{each}".encode(), digest_size=16).digest() for each in whose
        )
        words = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)
        moments = np.full(len(whose), second * SECOND_US)
        rows = self._registry.rows(words[:, 0], words[:, 1], moments, np.ones(len(whose), bool))
        kept = np.flatnonzero(rows >= 0)
        amounts = [np.array([cell.weights[measure][each] for each in whose], np.int64)[kept] for measure in MEASURES]
        added = self._book.add(np.full(len(kept), second), rows[kept], amounts[0], amounts[1])
        tenant.reach(kind, added.reached)
        return [
            Judged(kind, each.measure, whose[int(kept[each.event])], each.volume, each.ratio_milli, each.windows, None)
            for each in added.crossings
        ]

    def _judge(self, name: str, tenant: TenantVolume, second: int, judged: Judged, cell: Cell) -> Alarm | None:
        excess = tenant.excess_milli(judged, self._config)
        if excess is None or excess <= 0:
            return None
        tenant.peaks.peak(judged.who.partition("/")[0], second, excess)
        moment_us = second * SECOND_US
        key = f"{name}\n{judged.who}"
        began_us = second // self._config.window_s * self._config.window_s * SECOND_US
        episode = self._episodes.get(key) or Episode(began_us)
        if judged.sample is not None:
            episode.samples = earliest([*episode.samples, judged.sample])
        episode.offsets = dict(episode.offsets)  # alarms hold the old one
        merge_offsets(episode.offsets, cell.offsets)
        self._episodes.put(key, moment_us, episode)
        if excess < tenant.bar_milli(second, self._config) or (judged.kind in SPREAD and tenant.explained(judged)):
            return None
        if judged.kind not in SPREAD:
            tenant.note(judged, cell.weights.get("by", {}))
        return alarm_of(name, tenant, second, judged, episode, self._config)

    def snapshot(self) -> bytes:
        return _encoder.encode((self._tenants, self._registry.dump(), self._episodes.dump(), self._refused_tenants))

    def restore(self, raw: bytes) -> None:
        self._tenants, registry, episodes, self._refused_tenants = _decoder.decode(raw)
        self._registry.load(registry)
        self._episodes.load(episodes)


def _users(measure: str, cell: Cell) -> list[Judged]:
    return [
        Judged("user", MEASURES.index(measure), who, volume, ratio_milli, windows, (moment_us, event_id))
        for ratio_milli, moment_us, who, event_id, volume, windows in cell.extremes
    ]


_encoder = msgspec.msgpack.Encoder()
_Watched: TypeAlias = Dump[bytes, Watch]
_watch_decoder = msgspec.msgpack.Decoder(_Watched)
_decoder = msgspec.msgpack.Decoder(tuple[dict[str, TenantVolume], bytes, Dump[str, Episode], int])

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="3",
        atlas=["AML.T0029", "AML.T0034"],
        owasp=["LLM10"],
        runbook=[
            "Is it a new job, a migration or a load test of your own? Ask its owner, then acknowledge it.",
            "Are the prompts alike or taken from a list? Then somebody may be copying the model or its data.",
            "Does it slow others down or cost too much? Set a rate limit on the API key before you block it.",
        ],
        key=["tenant", "measure"],
        window_s=3_600,
        lookback_s=14 * 86_400,
    ),
    reads=frozenset({"prompt_tokens", "response_tokens", "api_key", "address"}),
    enabled=lambda config: config.volume.enabled,
    stage_one=VolumeOne,
    stage_two=VolumeTwo,
)
