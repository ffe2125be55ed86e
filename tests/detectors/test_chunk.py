"""What is done at once with many events says what is done slowly with each."""

from itertools import product

import msgspec
import numpy as np

from collector.event import GuardResult, encode
from detectors.campaign_families import equal_slots
from detectors.chunk import in_order_of, tallied
from detectors.columns import columns_of
from detectors.detector import actor
from detectors.prompts import Known, Prompt
from detectors.text import actor_of, event_id_of, text_of
from tests.sim.traffic import Traffic


def test_order_and_counts_are_those_of_numpy_for_small_and_for_huge_numbers() -> None:
    """Sixteen bits at a time or in order already, counted or sorted."""
    seed = 3
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for bound, size in product((1, 7, 300, 2**16, 2**16 + 1, 2**20, 2**33, 2**61), (0, 1, 2, 500)):
        some = rng.integers(0, bound, size)
        for code in (some, np.sort(some), np.full(size, bound - 1)):
            order, ordered = in_order_of(code, bound)
            assert order.tolist() == np.argsort(code, kind="stable").tolist()
            assert ordered.tolist() == sorted(code.tolist())
            found, counts = np.unique(code, return_counts=True)
            assert [each.tolist() for each in tallied(code, bound)] == [found.tolist(), counts.tolist()]


def test_equal_slots_are_counted_as_one_by_one() -> None:
    """None to all of them equal, of one family and of many."""
    seed = 4
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for families in (1, 2, 500):
        rows = rng.integers(0, 3, (families, 64)).astype(np.uint32)
        for slots in (rows[0], rows[0] + np.uint32(3), rng.integers(0, 3, 64).astype(np.uint32)):
            assert equal_slots(rows, slots).tolist() == np.count_nonzero(rows == slots, axis=1).tolist()


def test_the_words_of_an_event_are_those_of_the_whole_event() -> None:
    """Every field that a detector may ask for, where it is given and where it was left out."""
    traffic = Traffic(5, block_rate=0.5)
    traffic.calm(0, 5)
    named = [
        msgspec.structs.replace(each, user_id="", api_key="k_1", finish_reason="length") for each in traffic.events
    ]
    bare = [msgspec.structs.replace(each, minhash="", turn_hash="", guardrail_results=[]) for each in traffic.events]
    for event in [*traffic.events, *named, *bare]:
        raw = encode(event)
        text = text_of(raw)
        told = msgspec.structs.asdict(text)
        results = [(each.decision, each.score) for each in told.pop("guardrail_results")]
        assert results == [(each.decision, each.score) for each in event.guardrail_results]
        assert told == {name: getattr(event, name) for name in told}
        assert (event_id_of(raw), actor_of(raw), actor(text)) == (event.event_id, actor(event), actor(event))


def test_guards_in_any_order_give_the_same_verdicts() -> None:
    """The same guards with every event, in turn, at two stages, with an error, and one event without any."""
    traffic = Traffic(6)
    traffic.calm(0, 3)

    def result(guard: str, decision: str) -> GuardResult:
        return msgspec.convert({"guard": guard, "version": "1", "stage": "input", "decision": decision}, GuardResult)

    cases = [
        [result("a", "allow"), result("b", "block")],
        [result("b", "allow"), result("a", "block")],
        [result("a", "allow"), result("a", "block")],
        [result("a", "error"), result("b", "block")],
        [],
    ]
    for mix in ([0], [0, 1], [2], [0, 2], [3], [0, 3], [4], [0, 4], [0, 1, 2, 3, 4]):
        events = [
            msgspec.structs.replace(event, guardrail_results=cases[mix[number % len(mix)]])
            for number, event in enumerate(traffic.events)
        ]
        numbers = np.arange(len(events))
        columns = columns_of(events, [encode(event) for event in events], numbers, numbers)
        told = zip(columns.verdict_event.tolist(), columns.verdict_guard.tolist(), columns.verdict_blocked, strict=True)
        wanted = {}
        for number, event in enumerate(events):
            for each in event.guardrail_results:
                if each.decision != "error":
                    wanted[number, each.guard] = wanted.get((number, each.guard), False) or each.decision == "block"
        assert {(event, columns.guards[guard]): bool(blocked) for event, guard, blocked in told} == wanted, mix


def test_known_prompts_from_a_snapshot_of_an_earlier_version_are_known() -> None:
    """State stored when sketches lay one after the other, without the beginnings of bands: nothing is forgotten."""
    sketches = [np.random.default_rng(seed).bytes(256) for seed in range(5)]
    known = Known(digests=["d"] * 5, sketches=bytearray(b"".join(sketches)), slots=64)
    known.fit(0.95)
    assert [known.admit(Prompt("new", sketch), 16, 0.95) for sketch in sketches] == [False] * 5
    assert known.admit(Prompt("new", bytes(256)), 16, 0.95)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(known), type=Known) == known
