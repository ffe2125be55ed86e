"""Simulated clients of a guarded model: honest ones of six kinds, and ones that probe. Arrays of events, seeded.

Nothing here is measured traffic: who repeats himself, whose prompts a guard stops by mistake, and how attacks are
paced are assumptions, written down in the functions below. An honest client is blocked at 2 % on average, spread over
clients by a gamma distribution of shape .3, so most are never blocked and a few often are.
"""

import random
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAY_S: Final = 86_400.0
SESSION_GAP_S: Final = 1_800.0
MIX: Final = {"chat": 0.8, "agent": 0.1, "batch": 0.04, "cron": 0.055, "cron_blocked": 0.003, "red_team": 0.002}
"""Share of all honest clients. Rare kinds are drawn more often than that, and weighted down."""
DRAWN: Final = {"chat": 0.84, "agent": 0.04, "batch": 0.03, "cron": 0.06, "cron_blocked": 0.015, "red_team": 0.015}
NOVEL: Final = 0
RESENT: Final = 1
REWORDED: Final = 2
SAME: Final = 3
STYLES: Final = {"burst": (8.0, 30), "10 min": (600.0, 72), "1 h": (3_600.0, 72), "1 d": (DAY_S, 30)}
"""Mean gap in seconds and number of attempts."""

Row = tuple[float, int, bool]
"""(seconds from the start, kind of prompt, blocked)."""


@dataclass(frozen=True)
class Client:
    """One client's events, in order of time."""

    kind: str
    weight: float
    """Of each of its sessions among the honest ones; 0 for who probes."""
    at_s: Floats
    prompt: Ints
    blocked: NDArray[np.bool_]
    attack: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """Which of the events are attempts."""

    def sessions(self) -> Ints:
        """The number of each event's session: a new one after half an hour without a request."""
        return np.cumsum(np.diff(self.at_s, prepend=self.at_s[:1]) > SESSION_GAP_S)


def honest(kind: str, days: float, rng: random.Random, weight: float) -> Client | None:
    """An honest client; None where he never came."""
    often = rng.gammavariate(0.3, 1 / 0.3)
    rate = 0.02 * often
    if kind in ("chat", "agent"):
        rows = _talk(min(rate * (1 if kind == "chat" else 1.5), 0.6), days, rng, agent=kind == "agent")
    elif kind == "batch":
        rows = _batches(rate, days, rng)
    elif kind == "red_team":
        rows = _runs([(day * DAY_S + 7_200, 300, 0.5, NOVEL) for day in range(int(days))], rng)
    else:
        rows = _cron(days, rng, blocked=kind == "cron_blocked")
    return _client(kind, weight, rows) if rows else None


def _talk(rate: float, days: float, rng: random.Random, *, agent: bool) -> list[Row]:
    """Conversations. After a block an honest user rewords (half of the time; an agent, a fifth) or sends it again,
    and what is sent again is blocked again in half of the cases."""
    rows: list[Row] = []
    now_s = rng.expovariate(2 / DAY_S)
    ends, gap, spread = (0.06, np.log(5.0), 0.6) if agent else (0.25, np.log(45.0), 1.0)
    pause_s = DAY_S / 8 if agent else DAY_S / 3
    while now_s < days * DAY_S:
        blocked, reworded, first = False, 0, True
        while first or rng.random() > ends:
            if first:
                prompt = REWORDED if rng.random() < 0.05 else NOVEL
            elif blocked and rng.random() < (0.2 if agent else 0.5):
                prompt, reworded = REWORDED, reworded + 1
            else:
                prompt = RESENT
            chance = rate if not blocked else 0.5 if prompt == RESENT else 0.3
            blocked = rng.random() < chance
            rows.append((now_s, prompt, blocked))
            now_s += rng.lognormvariate(gap, spread)
            first = False
            if blocked and reworded > 2 and rng.random() < 0.6:
                break
        now_s += rng.expovariate(1 / pause_s)
    return [row for row in rows if row[0] < days * DAY_S]


def _batches(rate: float, days: float, rng: random.Random) -> list[Row]:
    """Runs of 50 to 800 templated prompts on half of the days, two seconds apart."""
    runs = []
    for day in range(int(days)):
        if rng.random() < 0.5:
            chance = min(rate * rng.lognormvariate(0, 0.5), 0.5)
            runs.append((day * DAY_S + rng.random() * DAY_S * 0.8, rng.randrange(50, 800), chance, REWORDED))
    return _runs(runs, rng)


def _runs(runs: list[tuple[float, int, float, int]], rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    for begin_s, prompts, chance, kind in runs:
        now_s = begin_s
        for _ in range(prompts):
            now_s += rng.gammavariate(4, 0.5)
            prompt = NOVEL if kind == NOVEL or rng.random() < 0.3 else kind
            rows.append((now_s, prompt, rng.random() < chance))
    return rows


def _cron(days: float, rng: random.Random, *, blocked: bool) -> list[Row]:
    """One prompt again and again, every ten minutes or every hour; a few of them always blocked."""
    period_s = rng.choice((600.0, 3_600.0))
    again = SAME if blocked else rng.choice((RESENT, SAME))
    moments = np.arange(rng.random() * period_s, days * DAY_S, period_s).tolist()
    chance = 0.97 if blocked else 0.002
    return [(at_s, NOVEL if not number else again, rng.random() < chance) for number, at_s in enumerate(moments)]


def probing(
    style: str, begin_s: float, rng: random.Random, *, guard: float, cover: int = 0, past_days: float = 0.0
) -> Client:
    """Attempts, mostly rewordings of a few seeds, of which the guard blocks the share `guard`; with `cover` honest
    requests for each; after `past_days` of honest chat by the same client."""
    gap_s, attempts = STYLES[style]
    now_s, tries = begin_s, list[Row]()
    for _ in range(attempts):
        now_s += gap_s * rng.uniform(0.5, 1.5)
        prompt = rng.choices((NOVEL, REWORDED, RESENT), (0.3, 0.6, 0.1))[0]
        tries.append((now_s, prompt, rng.random() < guard))
    covers = [
        (rng.uniform(tries[0][0], now_s), rng.choices((NOVEL, RESENT), (0.4, 0.6))[0], rng.random() < 0.02)
        for _ in range(attempts * cover)
    ]
    past = _talk(0.02 * rng.gammavariate(0.3, 1 / 0.3), past_days, rng, agent=False) if past_days else []
    past = [(at_s + begin_s - past_days * DAY_S, prompt, blocked) for at_s, prompt, blocked in past]
    return _client(style, 0.0, past + covers + tries, len(past) + len(covers))


def _client(kind: str, weight: float, rows: list[Row], attacks_from: int | None = None) -> Client:
    table = np.array([(at_s, prompt, blocked) for at_s, prompt, blocked in rows], np.float64)
    attack = np.arange(len(rows)) >= (len(rows) if attacks_from is None else attacks_from)
    order = np.argsort(table[:, 0], kind="stable")
    table, attack = table[order], attack[order]
    return Client(kind, weight, table[:, 0], table[:, 1].astype(np.int64), table[:, 2] > 0, attack)


def population(clients: int, days: float, seed: int) -> list[Client]:
    """Honest clients of all kinds, each with the weight that makes the mix right."""
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    found = []
    for kind, share in DRAWN.items():
        number = max(1, round(clients * share))
        drawn = (honest(kind, days, rng, MIX[kind] / number) for _ in range(number))
        found += [client for client in drawn if client is not None]
    return found
