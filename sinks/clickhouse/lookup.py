"""Looks in the store for events of one text, by its digests and MinHash under one epoch's key. No text comes here."""

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from sinks.clickhouse.asking import Ask, NotAnswered

T = TypeVar("T", bound="Sightings")

_SEEN: Final = """
    uniqExact(event_id) AS events, uniqExact(user_id) AS users, uniqExactIf(event_id, blocked) AS blocked,
    min(timestamp) AS first, max(timestamp) AS last, arraySort(groupUniqArray(5)(event_id)) AS event_ids
"""
_EXACT: Final = f"""
SELECT {_SEEN} FROM events
WHERE tenant = {{tenant:String}} AND key_epoch = {{epoch:String}} AND NOT duplicate
  AND (turn_hash IN {{digests:Array(String)}} OR prompt_hash IN {{digests:Array(String)}})
"""  # noqa: S608 - a constant of ours
_PLAIN: Final = """
SELECT 1 AS found FROM events
WHERE tenant = {tenant:String} AND key_epoch = {epoch:String}
  AND (startsWith(turn_hash, 'sha256:') OR startsWith(prompt_hash, 'sha256:'))
LIMIT 1
"""
_SIMILAR: Final = f"""
SELECT *, arrayCount(i -> substring(tryBase64Decode(minhash), 4 * i + 1, 4)
                        = substring(base64Decode({{minhash:String}}), 4 * i + 1, 4), range(64)) / 64 AS similarity,
       sum(events) OVER () AS events_in_all
FROM (
    SELECT turn_hash, minhash, {_SEEN} FROM events
    WHERE tenant = {{tenant:String}} AND key_epoch = {{epoch:String}} AND NOT duplicate AND minhash != ''
      AND turn_hash NOT IN {{digests:Array(String)}} AND prompt_hash NOT IN {{digests:Array(String)}}
    GROUP BY turn_hash, minhash
)
WHERE similarity >= {{similar:Float64}}
ORDER BY similarity DESC, last DESC, turn_hash
LIMIT {{limit:UInt32}}
"""  # noqa: S608 - a constant of ours


class Sightings(Struct, frozen=True, kw_only=True):
    """Events of one text."""

    events: int
    users: int
    blocked: int
    first: str
    """Store's time, UTC."""
    last: str
    event_ids: list[str]
    """At most five."""


class Similar(Sightings, frozen=True, kw_only=True):
    """Events of a text like the one asked for."""

    turn_hash: str
    similarity: float
    """Estimated Jaccard similarity of the texts' 5-grams; standard error at most 1/16."""
    events_in_all: int
    """Events of all similar texts of the epoch, those beyond the limit too."""


def hashed_plainly(ask: Ask, tenant: str, epoch: str) -> bool:
    """Whether events have digests without a key (`prompt_hash = "sha256"`). Raises NotAnswered."""
    return bool(ask(_PLAIN, {"tenant": tenant, "epoch": epoch}))


def exact(ask: Ask, tenant: str, epoch: str, digests: Sequence[str]) -> Sightings | None:
    """Events whose new text, or whose whole input, has one of the digests. Raises NotAnswered."""
    rows = ask(_EXACT, {"tenant": tenant, "epoch": epoch, "digests": _array(digests)})
    found = _rows(rows, Sightings)
    return found[0] if found and found[0].events else None


def similar(
    ask: Ask, tenant: str, epoch: str, digests: Sequence[str], minhash: str, *, at_least: float, limit: int
) -> list[Similar]:
    """Other texts whose MinHash is alike, most alike first: each text once. Reads every event of the epoch."""
    asked = {"tenant": tenant, "epoch": epoch, "digests": _array(digests), "minhash": minhash}
    return _rows(ask(_SIMILAR, asked | {"similar": f"{at_least:.4f}", "limit": str(limit)}), Similar)


def _array(digests: Sequence[str]) -> str:
    """A ClickHouse array: digests hold no quote."""
    return "[" + ",".join(f"'{digest}'" for digest in digests) + "]"


def _rows(rows: Sequence[object], kind: type[T]) -> list[T]:
    try:
        return [msgspec.convert(row, kind, strict=False) for row in rows]  # large numbers come as text
    except msgspec.ValidationError as error:
        raise NotAnswered(f"the store's answer is not as expected: {error}") from None
