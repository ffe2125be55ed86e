"""The bounded table: who is evicted, in which order, and that it is counted."""

from detectors.entities import EntityTable
from detectors.prompts import Prompt, seen_before


def test_a_full_table_forgets_the_longest_unseen_and_counts_it() -> None:
    """Seen means put, not looked at."""
    table: EntityTable[str, int] = EntityTable(2, 10**9)
    for number, key in enumerate(("a", "b", "a", "c")):
        table.put(key, number, number)
        table.get("b")
    assert (table.get("a"), table.get("b"), table.get("c"), len(table)) == (2, None, 3, 2)
    assert table.counters == {"expired": 0, "evicted_with_evidence": 1}


def test_the_idle_are_forgotten_before_anybody_is_evicted() -> None:
    """Idle beyond the limit counts as expired."""
    table: EntityTable[str, int] = EntityTable(2, 100)
    table.put("a", 0, 1)
    table.put("b", 50, 2)
    table.put("c", 120, 3)
    assert (table.get("a"), table.get("b"), table.get("c")) == (None, 2, 3)
    assert table.counters == {"expired": 1, "evicted_with_evidence": 0}


def test_a_dump_loads_in_the_same_order() -> None:
    """So that eviction after a restart is the same."""
    table: EntityTable[str, int] = EntityTable(2, 10**9)
    for number, key in enumerate(("a", "b", "a")):
        table.put(key, number, number)
    other: EntityTable[str, int] = EntityTable(2, 10**9)
    other.load(table.dump())
    other.put("c", 4, 3)
    assert (other.get("a"), other.get("b")) == (2, None)


def test_prompts_are_one_by_digest_or_by_sketch() -> None:
    """61 of 64 equal slots are the same prompt at .95, 60 are not; sketches of other sizes are never compared."""
    base = bytes(range(256))
    near, far = b"\xff" * 12 + base[12:], b"\xff" * 16 + base[16:]
    known = [Prompt("hmac:a", base)]
    assert seen_before(Prompt("hmac:a", b""), known, 0.95)
    assert seen_before(Prompt("hmac:b", near), known, 0.95)
    assert not seen_before(Prompt("hmac:b", far), known, 0.95)
    assert not seen_before(Prompt("hmac:b", base[:128]), known, 0.95)
    assert not seen_before(Prompt("", b""), [Prompt("", b"")], 0.95)
