"""Runs the stack over cases, plain and disguised, and keeps what it said on disk, so that a killed run goes on.

The state is a file of one JSON line a judged text: numbers of case, disguise and guard, score, whether it would block,
milliseconds, bytes, and the class of an error. It holds no text. Its first line names what was judged by what; a state
of other data or other versions of guards is begun anew. A killed process loses at most what its buffer held (8 KB of
verdicts), a crash of the machine the last 256 texts; a torn last line is dropped.
"""

import fcntl
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec
from pydantic import BaseModel

from collector.guards.cases import Case, Cases
from collector.guards.config import GuardsConfig
from collector.guards.disguises import DISGUISES
from collector.guards.stack import GuardStack

PLAIN: Final = "plain"
STACK: Final = "stack"
"""The name under which the stack as a whole is judged: it blocks where any of its guards does, as the policy says."""
FORMAT: Final = 2
SYNC_EVERY: Final = 256
"""Judged texts between two syncs of the state."""


class StateInUse(RuntimeError):
    """Another run is at work on the same state."""


class Plan(msgspec.Struct, frozen=True):
    """What is judged by what: equal plans can share a state."""

    format: int
    digests: dict[str, str]
    """File name to SHA-256."""
    versions: dict[str, str]
    """Guard name to version, in the stack's order."""
    policy: str
    """Digest of the guards' configuration: thresholds and modes decide what the stack blocks."""
    disguised_max: int
    seed: int

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name the state."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]


class Said(msgspec.Struct, frozen=True, array_like=True):
    """What one guard, or the stack, said of one text."""

    case: int
    disguise: str
    guard: str
    score: float
    bad: bool
    """It would block, were it to enforce; of the stack: it blocks."""
    latency_ms: float
    size_bytes: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """One text to judge: a case under a disguise."""

    case: int
    disguise: str

    def text(self, cases: Sequence[Case]) -> str:
        plain = cases[self.case].text
        return plain if self.disguise == PLAIN else DISGUISES[self.disguise](plain)


def tasks(cases: Sequence[Case], disguised_max: int, seed: int) -> list[Task]:
    """Every case as it is, then up to `disguised_max` attacks and as many harmless inputs under each disguise."""
    chance = random.Random(seed)  # noqa: S311 - a reproducible sample, no secret
    sample: list[int] = []
    for attack in (True, False):
        numbers = [number for number, case in enumerate(cases) if case.stage == "input" and case.attack is attack]
        sample += sorted(chance.sample(numbers, min(disguised_max, len(numbers))))
    plain = [Task(number, PLAIN) for number in range(len(cases))]
    return plain + [Task(number, name) for name in DISGUISES for number in sample]


class State:
    """What was said so far. `with State.open(...)`: one process at a time. Raises StateInUse, OSError."""

    def __init__(self, file: Path, plan: Plan) -> None:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = file
        self._out = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b")
        try:
            fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._out.close()
            raise StateInUse(f"another check is at work on {file}") from None
        self.said = self._load(plan)
        self._pending = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self._out.close()

    def add(self, said: Sequence[Said]) -> None:
        """Keep what was said of one text."""
        self.said += said
        self._out.write(msgspec.json.encode(said) + b"\n")
        self._pending += 1
        if self._pending >= SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Everything added is on disk."""
        self._out.flush()
        os.fsync(self._out.fileno())
        self._pending = 0

    def remove(self) -> None:
        """The run is over."""
        self._file.unlink(missing_ok=True)

    def _load(self, plan: Plan) -> list[Said]:
        """What a run of the same plan left; the file is cut behind the last whole line."""
        head = msgspec.json.encode(plan) + b"\n"
        content = self._out.read()
        said: list[Said] = []
        good = 0
        if content.startswith(head):
            good = len(head)
            for line in content[len(head) :].splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    said += msgspec.json.decode(line, type=list[Said])
                except msgspec.DecodeError:
                    break
                good += len(line)
        self._out.truncate(good)
        if not good:
            self._out.write(head)
        return said


def unsparing(config: GuardsConfig) -> GuardsConfig:
    """The same guards, but each judges every text anew: nothing is sampled, for no tenant or route, nothing is kept."""
    policies = {name: _unsampled(config.policy(name)) for name in config.known()}
    return config.model_copy(update={"cache_entries": 0, **policies})


def _unsampled(policy: BaseModel) -> BaseModel:
    """A guard's table, or a tenant's or route's part of it."""
    narrower = {
        field: {name: _unsampled(part) for name, part in parts.items()}
        for field in ("tenants", "routes")
        if (parts := getattr(policy, field, None))
    }
    return policy.model_copy(update={"sample": 1.0, **narrower})


def judge_all(stack: GuardStack, found: Cases, plan: Plan, state: State, tick: Callable[[int, int], None]) -> None:
    """Judges what the state doesn't hold yet, telling `tick` (done, all)."""
    done = {(one.case, one.disguise) for one in state.said}
    wanted = tasks(found.cases, plan.disguised_max, plan.seed)
    for number, task in enumerate(wanted, 1):
        if (task.case, task.disguise) not in done:
            state.add(list(_said(stack, found.cases, task)))
        tick(number, len(wanted))


def _said(stack: GuardStack, cases: Sequence[Case], task: Task) -> Iterator[Said]:
    case, text = cases[task.case], task.text(cases)
    size = len(text.encode("utf-8", "surrogatepass"))
    results = stack.judge([(case.stage, text)], case.context)
    for one in results:
        bad = one.decision in {"block", "shadow"}
        yield Said(
            task.case, task.disguise, one.guard, round(one.score, 6), bad, round(one.latency_ms, 4), size, one.error
        )
    yield Said(
        task.case,
        task.disguise,
        STACK,
        round(max((one.score for one in results), default=0.0), 6),
        stack.blocks(results, case.context),
        round(sum(one.latency_ms for one in results), 4),
        size,
        next((one.error for one in results if one.error), ""),
    )
