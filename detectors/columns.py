"""Audit events as columns: one array a field, which is how stage 1 judges some thousand events at a time.

`columns_of` takes decoded events apart while they are in the processor's cache; what is kept of each event is its raw
bytes and about 150 bytes of numbers. Text that only a few events need (an event id, a session) is read from the raw
bytes again when it is asked for.
"""

import binascii
import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from collector.event import Adapter, AuditEvent
from detectors.detector import clean

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Keys = NDArray[np.uint64]

SECOND_US: Final = 1_000_000
SIZES: Final = {"q": 8, "d": 8, "?": 1}
"""Bytes of a number."""
TOKENS_MAX: Final = 2**40
"""Larger counts are taken for this, so that sums stay exact."""
PSEUDONYM_CHARACTERS: Final = 34
DIGEST_SHOWN: Final = 8
"""Last digits of an adapter's digest in its name."""


@dataclass(slots=True)
class Columns:
    """Some events: in every array an entry for each, but in `verdict_*` one for each event and guard."""

    raws: list[bytes]
    offset: Ints
    moment_us: Ints
    kind: Ints
    """Index into `kinds`."""
    kinds: list[tuple[str, str]]
    """(tenant, model)."""
    high: Keys
    low: Keys
    """128 bits that stand for (tenant, actor)."""
    named: Flags
    """Whether there is an actor."""
    delivered: Flags
    """Answered, or broken off by the client: then what he had of it and how long it took counts, else whoever hangs up
    before the last token would be seen by nobody, and a model so slow that clients give up by nobody either."""
    blocked: Flags
    """But for what was blocked only because a guard failed: that says nothing of who sent it."""
    judged: Flags
    """Whether any guard said anything; likewise."""
    response_tokens: Ints
    prompt_tokens: Ints
    max_tokens: Ints
    choices: Ints
    """`n` of the request, at least 1."""
    latency_ms: Floats
    ttft_ms: Floats
    """Not a number where there is none, as in the next two."""
    queue_ms: Floats
    ms_per_output_token: Floats
    verdict_event: Ints
    verdict_guard: Ints
    verdict_blocked: Flags
    guards: list[str]
    adapter: Ints
    """Index into `adapters`, of NAME@DIGEST; empty for none."""
    adapters: list[str]
    api_key: Ints
    """Index into `api_keys`; empty where the key is itself the actor, or where there is none."""
    api_keys: list[str]
    address: Ints
    """Index into `addresses`, likewise."""
    addresses: list[str]

    def __len__(self) -> int:
        return len(self.raws)


ARRAYS: Final = (
    "offset",
    "moment_us",
    "high",
    "low",
    "named",
    "delivered",
    "blocked",
    "judged",
    "response_tokens",
    "prompt_tokens",
    "max_tokens",
    "choices",
    "latency_ms",
    "ttft_ms",
    "queue_ms",
    "ms_per_output_token",
)


DELIVERED: Final = ("ok", "aborted")
NAMED: Final = {"adapter": "adapters", "api_key": "api_keys", "address": "addresses", "kind": "kinds"}
"""Arrays of numbers that stand for names, and where the names are."""


EVERYTHING: Final = frozenset(
    (
        "adapter",
        "address",
        "api_key",
        "blocked",
        "choices",
        "delivered",
        "judged",
        "latency_ms",
        "max_tokens",
        "ms_per_output_token",
        "prompt_tokens",
        "queue_ms",
        "response_tokens",
        "ttft_ms",
        "verdicts",
    )
)
"""What a detector may ask for; the rest is always there."""


def columns_of(
    events: Sequence[AuditEvent], raws: list[bytes], offset: Ints, moment_us: Ints, reads: AbstractSet[str] = EVERYTHING
) -> Columns:
    """The columns of these events, whose raw bytes, offsets and moments are given. What nobody reads is zero."""

    def numbers(name: str, make: Callable[[], list[Any]], code: str = "q") -> NDArray[Any]:
        """Written out field by field, packed by `struct`: half of the time of an `attrgetter` and `np.fromiter`."""
        packed = struct.pack(f"={len(events)}{code}", *make()) if name in reads else bytes(SIZES[code] * len(events))
        return np.frombuffer(packed, code)

    def times(name: str, make: Callable[[], list[float | None]]) -> Floats:
        """None is not a number; `struct` takes it for a mistake."""
        return np.array(make(), np.float64) if name in reads else np.zeros(len(events))

    def names(name: str, make: Callable[[], list[str]]) -> tuple[Ints, list[str]]:
        return coded(make()) if name in reads else (np.zeros(len(events), np.int64), [""])

    kind, kinds = paired([event.tenant for event in events], [event.model_version for event in events])
    high, low, named = _keys([event.user_id or event.api_key or event.client_address for event in events])
    salts = np.array([_salt(tenant) for tenant, _ in kinds], np.uint64)
    results = [event.guardrail_results for event in events] if reads & {"verdicts", "judged"} else []
    sizes = np.fromiter(map(len, results), np.int64, len(events)) if results else np.zeros(len(events), np.int64)
    verdict_event, verdict_guard, verdict_blocked, guards = _verdicts(results if "verdicts" in reads else [], sizes)
    blocked, judged = numbers("blocked", lambda: [event.blocked for event in events], "?").copy(), sizes > 0
    unsure = [row for row in np.flatnonzero(blocked).tolist() if _failed(events[row])]
    blocked[unsure] = judged[unsure] = False
    adapter, adapters = names("adapter", lambda: _adapters([event.adapter for event in events]))
    api_key, api_keys = names("api_key", lambda: [event.api_key if event.user_id else "" for event in events])
    address, addresses = names(
        "address", lambda: [event.client_address if event.user_id or event.api_key else "" for event in events]
    )
    return Columns(
        raws=raws,
        offset=offset,
        moment_us=moment_us,
        kind=kind,
        kinds=kinds,
        high=high ^ salts[kind],
        low=low,
        named=named,
        delivered=numbers("delivered", lambda: [event.status in DELIVERED for event in events], "?"),
        blocked=blocked,
        judged=judged,
        response_tokens=_tokens(numbers("response_tokens", lambda: [event.response_tokens for event in events])),
        prompt_tokens=_tokens(numbers("prompt_tokens", lambda: [event.prompt_tokens for event in events])),
        max_tokens=_tokens(numbers("max_tokens", lambda: [event.max_tokens for event in events])),
        choices=np.maximum(numbers("choices", lambda: [event.n for event in events]), 1),
        latency_ms=numbers("latency_ms", lambda: [event.latency_ms for event in events], "d"),
        ttft_ms=times("ttft_ms", lambda: [event.ttft_ms for event in events]),
        queue_ms=times("queue_ms", lambda: [event.queue_ms for event in events]),
        ms_per_output_token=times("ms_per_output_token", lambda: [event.ms_per_output_token for event in events]),
        verdict_event=verdict_event,
        verdict_guard=verdict_guard,
        verdict_blocked=verdict_blocked,
        guards=guards,
        adapter=adapter,
        adapters=adapters,
        api_key=api_key,
        api_keys=api_keys,
        address=address,
        addresses=addresses,
    )


def _failed(event: AuditEvent) -> bool:
    """Whether a guard failed and none blocked."""
    decisions = {result.decision for result in event.guardrail_results}
    return "error" in decisions and "block" not in decisions


def _adapters(adapters: list[Adapter | None]) -> list[str]:
    if adapters.count(None) == len(adapters):
        return [""] * len(adapters)
    names = ["" if each is None else f"{each.name}@{each.digest[-DIGEST_SHOWN:]}" for each in adapters]
    return list(map(clean, names))


def coded(values: list[Any]) -> tuple[Ints, list[Any]]:
    """Small numbers for values, and the values that they stand for, in order of appearance."""
    if _all_one(values):
        return np.zeros(len(values), np.int64), values[:1]
    names = dict.fromkeys(values)
    for number, name in enumerate(names):
        names[name] = number
    return np.array([names[value] for value in values], np.int64), list(names)


def _all_one(values: list[Any]) -> bool:
    """Whether they are all equal. Counting compares, which is quicker than hashing strings that were just made."""
    return bool(values) and values.count(values[0]) == len(values)


def paired(ones: list[str], others: list[str]) -> tuple[Ints, list[tuple[str, str]]]:
    """`coded` of pairs. Mostly there is one pair only, which is seen soonest without making pairs."""
    if _all_one(ones) and _all_one(others):
        return np.zeros(len(ones), np.int64), [(ones[0], others[0])]
    return coded(list(zip(ones, others, strict=True)))


def _tokens(counts: Ints) -> Ints:
    return np.minimum(counts, TOKENS_MAX)


def _salt(tenant: str) -> int:
    return int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8, person=b"iw-tenant").digest(), "big")


def _keys(actors: list[str]) -> tuple[Keys, Keys, Flags]:
    """128 bits an actor: the digits of a pseudonym of ours, else a digest. Never the same for two but by chance."""
    joined = "".join(actors)
    if len(joined) == PSEUDONYM_CHARACTERS * len(actors) and joined.isascii() and joined == joined.lower():
        marks = np.frombuffer(joined.encode(), np.uint8).reshape(-1, PSEUDONYM_CHARACTERS)
        if (marks[:, 1] == ord("_")).all() and min(map(len, actors)) == PSEUDONYM_CHARACTERS:
            try:
                digits = binascii.unhexlify(marks[:, 2:].tobytes())
            except binascii.Error:
                pass
            else:
                words = np.frombuffer(digits, ">u8").astype(np.uint64).reshape(-1, 2)
                low = words[:, 1] ^ (marks[:, 0].astype(np.uint64) << np.uint64(56))
                return words[:, 0], low, np.ones(len(actors), bool)
    named = np.array(list(map(bool, actors)))
    digests = b"".join([_digest(name) for name in actors])
    words = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)
    return words[:, 0], words[:, 1], named


def _digest(name: str) -> bytes:
    """As the fast way above has it for pseudonyms, so that one odd name among them changes nobody's key."""
    if len(name) == PSEUDONYM_CHARACTERS and name.isascii() and name[1] == "_" and name == name.lower():
        try:
            digits = bytearray(binascii.unhexlify(name[2:]))
        except binascii.Error:
            pass
        else:
            digits[8] ^= ord(name[0])
            return bytes(digits)
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"iw-actor").digest()


def _verdicts(results: list[list[Any]], sizes: Ints) -> tuple[Ints, Ints, Flags, list[str]]:
    """One verdict for each event and guard: it blocked if it did so at any stage; errors are no verdict."""
    told = list(chain.from_iterable(results))
    event = np.repeat(np.arange(len(results)), sizes[: len(results)])
    seldom = [(number, result.decision) for number, result in enumerate(told) if result.decision != "allow"]
    blocked = np.zeros(len(told), bool)
    blocked[[number for number, decision in seldom if decision == "block"]] = True
    failed = {number for number, decision in seldom if decision == "error"}
    if failed:
        sound = [number for number in range(len(told)) if number not in failed]
        told, event, blocked = [told[number] for number in sound], event[sound], blocked[sound]
    if not told:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool), []
    guard, guards = _guards([result.guard for result in told], len(told) // len(results))
    code = event * len(guards) + guard
    if len(code) > 1 and not (code[1:] > code[:-1]).all():
        code, which = np.unique(code, return_inverse=True)
        worst = np.zeros(len(code), bool)
        np.logical_or.at(worst, which, blocked)
        event, guard, blocked = code // len(guards), code % len(guards), worst
    return event, guard, blocked, guards


def _guards(names: list[str], period: int) -> tuple[Ints, list[str]]:
    """`coded`. Mostly the same guards judge every event, in the same order, which comparing shows sooner."""
    heads = names[:period]
    if period and all(names[at::period].count(name) * period == len(names) for at, name in enumerate(heads)):
        codes, guards = coded(heads)
        return np.tile(codes, len(names) // period), guards
    return coded(names)


def joined(pieces: Sequence[Columns]) -> Columns:
    """One after the other."""
    if len(pieces) == 1:
        return pieces[0]
    known: dict[str, dict[Any, int]] = {name: {} for name in NAMED}
    codes: dict[str, list[Ints]] = {name: [] for name in NAMED}
    guards: dict[str, int] = {}
    event, guard = [], []
    begin = 0
    for piece in pieces:
        for name, names in NAMED.items():
            codes[name].append(_recoded(getattr(piece, name), getattr(piece, names), known[name]))
        guard.append(_recoded(piece.verdict_guard, piece.guards, guards))
        event.append(piece.verdict_event + begin)
        begin += len(piece)
    whole: dict[str, Any] = {name: np.concatenate(codes[name]) for name in NAMED}
    whole |= {names: list(known[name]) for name, names in NAMED.items()}
    whole |= {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in ARRAYS}
    return Columns(
        raws=list(chain.from_iterable(piece.raws for piece in pieces)),
        verdict_event=np.concatenate(event),
        verdict_guard=np.concatenate(guard),
        verdict_blocked=np.concatenate([piece.verdict_blocked for piece in pieces]),
        guards=list(guards),
        **whole,
    )


def _recoded(codes: Ints, names: Iterable[Any], known: dict[Any, int]) -> Ints:
    table = np.array([known.setdefault(name, len(known)) for name in names], np.int64)
    return table[codes] if len(table) else codes


def picked(columns: Columns, rows: Ints) -> Columns:
    """These events, in this order, each at most once."""
    place = np.full(len(columns), -1, np.int64)
    place[rows] = np.arange(len(rows))
    event = place[columns.verdict_event]
    kept = np.flatnonzero(event >= 0)
    kept = kept[np.argsort(event[kept], kind="stable")]
    mine: dict[str, Any] = {name: getattr(columns, name)[rows] for name in (*ARRAYS, *NAMED)}
    mine |= {names: getattr(columns, names) for names in NAMED.values()}
    return Columns(
        raws=[columns.raws[row] for row in rows.tolist()],
        verdict_event=event[kept],
        verdict_guard=columns.verdict_guard[kept],
        verdict_blocked=columns.verdict_blocked[kept],
        guards=columns.guards,
        **mine,
    )
