"""A simulated tenant's guard verdicts, clustered as they are in the field, as arrays and as the log of a partition.

Blocks are *sticky* (a guard scans the re-sent conversation: after a block the next turn is blocked with a chance of
one half), one in fifty blocked requests of every other tenant is *retried* five to twenty-five times within ten
minutes, and a user's propensity varies by user and by day (gamma). The arrival rate is the tenant's own week of
ServeGen where given, else a daily swing; the block rate drifts and swings with the day.
"""

import csv
import gzip
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from collector.event import Goodbye, Hello, encode, from_timestamp_us

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

DAY_S: Final = 86_400.0
START_S: Final = 1_800_000_000 - 1_800_000_000 % 86_400
BINS: Final = 1_008
"""Ten-minute bins of a week."""
EVENT: Final = (
    '{"kind":"inference","schema_version":"1.0","event_id":"%012x","timestamp":"%sZ","collector_id":"c","boot":"b",'
    '"seq":%d,"tenant":"acme","session_id":"","user_id":"%s","prompt_hash":"","model_version":"m@1",'
    '"guardrail_results":[{"guard":"injection","version":"1","stage":"input","decision":"%s"}],"response_tokens":%d,'
    '"latency_ms":900.0,"blocked":%s,"status":"%s","turn_hash":"hmac:%032x"}'
)


@dataclass(frozen=True)
class Requests:
    """Requests in order of time."""

    at_s: Floats
    user: Ints
    blocked: Flags
    again: Flags
    """Whether a blocked prompt is the user's last blocked one again."""

    def __len__(self) -> int:
        return len(self.at_s)

    def cut(self, begin: int, end: int) -> "Requests":
        return Requests(*(part[begin:end] for part in (self.at_s, self.user, self.blocked, self.again)))


def served_rates(folder: Path) -> list[Floats]:
    """Requests a second in ten-minute bins of a week, of each ServeGen client that is busy in half of them."""
    rates: dict[tuple[str, str], Floats] = defaultdict(lambda: np.zeros(BINS))
    for path in sorted(folder.glob("traces/servegen_*_week1.csv.gz")):
        with gzip.open(path, "rt") as lines:
            for row in csv.DictReader(lines):
                place = int(float(row["t_s"]) // 600)
                if place < BINS:
                    rates[path.name, row["client"]][place] = float(row["rate_rps"])
    busy = [rate for rate in rates.values() if (rate > 0).sum() > BINS // 2]
    return sorted(busy, key=lambda rate: -float(rate.sum()))[:60]


def background(
    rng: np.random.Generator, rate: Floats, *, week: int, days: int, block_rate: float, retried: bool
) -> Requests:
    """`week` requests a week for so many days, `block_rate` of them blocked in the long run."""
    bins = days * 144
    mean = np.tile(rate / rate.sum() * week, days // 7 + 2)[:bins] * np.repeat(np.exp(rng.normal(0, 0.15, days)), 144)
    sessions = rng.poisson(mean / 4)
    count = int(sessions.sum())
    begin = np.repeat(np.arange(bins) * 600.0, sessions) + rng.random(count) * 600
    users = max(50, week // 100)
    weight = 1 / np.arange(1, users + 1) ** 0.8
    owner = rng.choice(users, count, p=weight / weight.sum())
    turns = rng.geometric(0.25, count)
    session = np.repeat(np.arange(count), turns)
    elapsed = np.cumsum(np.exp(rng.normal(np.log(40), 1, len(session))))
    at_s = begin[session] + elapsed - elapsed[np.repeat(np.cumsum(turns) - turns, turns)]
    user = owner[session]
    propensity = (
        rng.gamma(0.5, 2, users)[user] * _of_day(rng, users, days)[user, np.minimum(at_s // DAY_S, days).astype(int)]
    )
    swing = (1 + 0.4 * np.sin(2 * np.pi * at_s / DAY_S)) * np.exp(
        _drift(rng, days)[(at_s // 3600).astype(int).clip(0, days * 24)]
    )
    blocked = _sticky(rng, propensity * swing, session, block_rate * (0.8 if retried else 1.0))
    if retried:
        which = np.flatnonzero(blocked)
        which = which[rng.random(len(which)) < 0.02]
        times = rng.integers(5, 25, len(which))
        at_s = np.concatenate([at_s, np.repeat(at_s[which], times) + rng.random(int(times.sum())) * 600])
        user = np.concatenate([user, np.repeat(user[which], times)])
        blocked = np.concatenate([blocked, np.ones(int(times.sum()), bool)])
    order = np.argsort(at_s, kind="stable")
    order = order[at_s[order] < days * DAY_S]
    return Requests(at_s[order], user[order], blocked[order], rng.random(len(order)) < 0.9)


def _of_day(rng: np.random.Generator, users: int, days: int) -> Floats:
    """A user's bad and good days."""
    return rng.gamma(0.3, 1 / 0.3, (users, days + 1))


def _drift(rng: np.random.Generator, days: int) -> Floats:
    """Of the logarithm of the rate: standard deviation .2, correlation of a day."""
    drift = np.zeros(days * 24 + 1)
    for hour in range(1, len(drift)):
        drift[hour] = drift[hour - 1] * np.exp(-1 / 24) + rng.normal(0, 0.2 * np.sqrt(1 - np.exp(-2 / 24)))
    return drift


def _sticky(rng: np.random.Generator, shape: Floats, session: Ints, block_rate: float) -> Flags:
    """Blocks with half a chance to be followed by another in the session; the first ones' rate is solved for."""
    scale = block_rate
    blocked = np.zeros(len(shape), bool)
    same = np.concatenate([[False], session[1:] == session[:-1]])
    for _ in range(5):
        chance = rng.random(len(shape))
        fresh = chance < np.minimum(scale * shape, 0.9)
        followed = same & (chance < 0.5)
        blocked = fresh.copy()
        for index in np.flatnonzero(followed | fresh).tolist():
            if index and same[index] and blocked[index - 1]:
                blocked[index] = followed[index]
        scale *= block_rate / max(float(blocked.mean()), 1e-6)
    return blocked


def shifted(requests: Requests, rng: np.random.Generator, *, block_rate: float, ratio: float, few: bool) -> Requests:
    """The same requests with `ratio` times the blocks: further ones of anybody, or of three new users who attack."""
    blocked, user, again = requests.blocked.copy(), requests.user.copy(), requests.again.copy()
    extra = (ratio - 1) * block_rate
    if few:
        which = np.flatnonzero(rng.random(len(requests)) < extra / (0.66 - block_rate))
        user[which] = 10**6 + rng.integers(0, 3, len(which))
        blocked[which] = rng.random(len(which)) < 0.66
        again[which] = rng.random(len(which)) < 0.4
    else:
        which = np.flatnonzero((rng.random(len(requests)) < extra / (1 - block_rate)) & ~blocked)
        blocked[which] = True
        again[which] = rng.random(len(which)) < 0.3
    return replace(requests, user=user, blocked=blocked, again=again)


class Writer:
    """Requests as records of one lane. Keeps which prompt each user was last blocked with."""

    def __init__(self, first: int = 0, last: dict[int, int] | None = None) -> None:
        self.number = first
        self.last = dict(last or {})

    def records(self, requests: Requests) -> tuple[list[bytes], Ints, Ints]:
        """(records, append times in ms, offsets)."""
        moment_us = np.rint(requests.at_s * 1e6).astype(np.int64) + START_S * 1_000_000
        stamps = np.datetime_as_string(moment_us.astype("datetime64[us]")).tolist()
        first = self.number + 1
        raws = []
        rows = zip(stamps, requests.user.tolist(), requests.blocked.tolist(), requests.again.tolist(), strict=True)
        for stamp, user, blocked, again in rows:
            self.number += 1
            prompt = self.number
            if blocked:
                prompt = self.last.get(user, prompt) if again else prompt
                self.last[user] = prompt
            told = ("block", 0, "true", "blocked_input") if blocked else ("allow", 90, "false", "ok")
            raws.append((EVENT % (self.number, stamp, self.number, _name(user), *told, prompt)).encode())
        return raws, moment_us // 1_000, np.arange(first, self.number + 1)

    def end(self, kind: type[Hello] | type[Goodbye], at_s: float) -> tuple[list[bytes], Ints, Ints]:
        """A hello as the first record, a goodbye as the last."""
        self.number += kind is Goodbye
        at_us = round(at_s * 1e6) + START_S * 1_000_000
        common: dict[str, Any] = {"schema_version": "1.0", "collector_id": "c", "boot": "b", "seq": self.number}
        raw = encode(kind(event_id=kind.__name__, timestamp=from_timestamp_us(at_us), **common))
        return [raw], np.array([at_us // 1_000]), np.array([self.number])


_names: dict[int, str] = {}


def _name(user: int) -> str:
    if user not in _names:
        _names[user] = f"u_{hashlib.blake2b(str(user).encode(), digest_size=16).hexdigest()}"
    return _names[user]


def pieces(requests: Requests, cuts: list[int]) -> Iterator[tuple[int, Requests]]:
    """The requests in stretches that end at the cuts, and never longer than 20,000; each with where it ends."""
    ends = sorted({*cuts, *range(20_000, len(requests), 20_000), len(requests)})
    begin = 0
    for end in ends:
        if end > begin:
            yield end, requests.cut(begin, end)
        begin = end


def sketched(writer: Writer, at_s: Floats, users: Ints, sketches: Sequence[str]) -> tuple[list[bytes], Ints, Ints]:
    """Blocked requests in order of time, with the MinHash of each."""
    flags = np.ones(len(at_s), bool)
    raws, append_ms, offsets = writer.records(Requests(at_s, users, flags, ~flags))
    told = [raw[:-1] + f',"minhash":"{sketch}"}}'.encode() for raw, sketch in zip(raws, sketches, strict=True)]
    return told, append_ms, offsets
