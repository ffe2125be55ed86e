"""The bounded table: who is evicted, in which order, and that it is counted."""

from detectors.entities import EntityTable
from detectors.prompts import Prompt, seen_before


def test_a_flood_of_strangers_never_evicts_a_suspect() -> None:
    """Without evidence first, longest unseen first; then, and only then, those with evidence."""
    table: EntityTable[str] = EntityTable(3, 10**12)
    table.put("suspect", 0, "s", evident=True)
    for number in range(1_000):
        table.put(f"stranger{number}", number, "x", evident=False)
    assert (table.get("suspect"), table.get("stranger997"), table.get("stranger998")) == ("s", None, "x")
    assert table.counters == {"expired": 0, "evicted": 998, "evicted_with_evidence": 0}
    for number in range(3):
        table.put(f"other{number}", 2_000, "o", evident=True)
    assert (table.get("suspect"), len(table)) == (None, 3)
    assert table.counters["evicted_with_evidence"] == 1


def test_the_idle_are_forgotten_before_anybody_is_evicted() -> None:
    """Idle beyond the limit counts as expired, evidence or not."""
    table: EntityTable[int] = EntityTable(10, 100)
    table.put("a", 0, 1, evident=True)
    table.put("b", 50, 2, evident=False)
    table.put("c", 120, 3, evident=False)
    assert (table.get("a"), table.get("b"), table.counters["expired"]) == (None, 2, 1)


def test_gaining_and_losing_evidence_moves_an_entry_without_losing_it() -> None:
    """One entry, whichever part it is in."""
    table: EntityTable[int] = EntityTable(2, 10**9)
    for evident in (False, True, False):
        table.put("a", 1, 5, evident=evident)
        assert (len(table), table.get("a")) == (1, 5)


def test_a_dump_loads_in_the_same_order() -> None:
    """So that eviction after a restart is the same."""
    table: EntityTable[int] = EntityTable(2, 10**9)
    table.put("a", 1, 1, evident=False)
    table.put("b", 2, 2, evident=False)
    table.put("a", 3, 1, evident=False)
    other: EntityTable[int] = EntityTable(2, 10**9)
    other.load(table.dump())
    other.put("c", 4, 3, evident=False)
    assert (other.get("a"), other.get("b")) == (1, None)


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
