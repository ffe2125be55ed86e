"""Telling prompts apart: the short way says what comparing every slot says."""

import random

import msgspec
import numpy as np
import pytest

from collector.event import encode
from detectors.prompts import Prompt, prompt_of, seen_before, session_and_prompt
from detectors.text import text_of
from tests.sim.traffic import Traffic


def differing(sketch: bytes, slots: int, rng: random.Random) -> bytes:
    """The sketch with so many slots changed, anywhere."""
    changed = np.frombuffer(sketch, "<u4").copy()
    for slot in rng.sample(range(len(changed)), slots):
        changed[slot] ^= 1 + rng.randrange(2**31)
    return changed.tobytes()


@pytest.mark.parametrize("size", [1, 7, 64, 192])
@pytest.mark.parametrize("same", [0.25, 0.5, 0.95, 1.0])
def test_a_prompt_was_seen_when_enough_slots_are_equal(size: int, same: float) -> None:
    """At the limit, one over and one under it, wherever the differing slots lie; 30 draws each."""
    rng = random.Random(1)  # noqa: S311 seeded on purpose
    limit = int(size * (1 - same) + 1e-9)
    for _ in range(30):
        sketch = rng.randbytes(4 * size)
        for slots in {0, max(limit - 1, 0), limit, min(limit + 1, size), size}:
            known = [Prompt("a", rng.randbytes(4 * size)), Prompt("b", differing(sketch, slots, rng))]
            wanted = size - slots >= same * size
            assert seen_before(Prompt("c", sketch), known, same) == wanted, (slots, limit)


def test_equal_digests_are_one_prompt_and_no_sketch_is_like_none() -> None:
    """Digests decide first; empty digests and sketches of other sizes are never alike."""
    known = [Prompt("hmac:1", b""), Prompt("", b"abcd" * 64)]
    assert seen_before(Prompt("hmac:1", b""), known, 0.95)
    assert not seen_before(Prompt("", b""), known, 0.95)
    assert not seen_before(Prompt("", b"abcd" * 32), known, 0.95)
    assert not seen_before(Prompt("hmac:2", b""), [], 0.95)


def test_the_prompt_of_an_event_is_the_same_whether_its_words_or_its_bytes_are_read() -> None:
    """Also where the sketch is no base64, is padded too much, has half a slot, or is left out; two thousand draws."""
    seed = 8
    print("seed", seed)
    rng = random.Random(seed)  # noqa: S311 seeded on purpose
    traffic = Traffic(seed)
    traffic.calm(0, 1)
    event = traffic.events[0]
    drawn = ["".join(rng.choices("AB+/=", k=rng.randrange(14))) for _ in range(2_000)]
    for sketch in [event.minhash, "", "AAAA===", "AAA", "!!!!", "AA-_", "\u00e9", "AA\nAA", *drawn]:
        for turn in (event.turn_hash, ""):
            raw = encode(msgspec.structs.replace(event, minhash=sketch, turn_hash=turn))
            assert session_and_prompt(raw) == (event.session_id, prompt_of(text_of(raw))), sketch
