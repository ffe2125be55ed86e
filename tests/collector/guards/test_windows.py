"""A guard that judges in windows finds in them what it finds in the whole answer, before any of it leaves."""

import random
from itertools import pairwise

import pytest

from collector.guards.config import GuardsConfig
from collector.guards.protocol import Guard
from collector.holdback import RUN_CHARS_MAX, HoldBack, Mark

NAMES = [name for name in GuardsConfig.known() if name in ("secrets", "pii")]
FILLER = "The museum opens at nine and closes at five, and entry is free on Sundays for all visitors. "
LONG = {
    "an assignment": "access_key_of_bucket_ = '" + "a1B2c3D4e5F6g7H8i9J0k" * 9 + "'",
    "a token": ".".join(("eyJ" + "h1J2k3" * 20, "eyJ" + "x4Y5z6" * 200, "s7" * 40)),
    "a card": "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
    "a key": "AKIA" + "Q7" * 8,
    "an account": "DE89 3704 0044 0532 0130 00",
}
"""Made up, as long as each kind gets."""


def found_before_it_left(guard: Guard, chars: int, text: str, at: int, draw: random.Random) -> bool:
    """Whether some window is blocked while nothing from `at` on is out."""
    hold, marks, out = HoldBack(chars), list[Mark](), 0
    cuts = [0, *sorted(draw.sample(range(1, len(text)), len(text) // 6)), len(text)]
    for start, end in pairwise(cuts):
        marks.append(hold.grow(0, text[start:end]))
        if hold.due:
            if any(guard.judge(window, "output").block for window in hold.windows()):
                return out <= at
            hold.pass_()
        while marks and hold.free([marks[0]]):
            out = marks.pop(0).chars
    return any(guard.judge(rest, "output").block for rest in hold.rest()) and out <= at


@pytest.mark.parametrize("kind", LONG)
def test_the_longest_of_each_kind_is_found_in_windows(kind: str) -> None:
    """Wherever it lies in the answer, however the stream parts it."""
    guard = GuardsConfig().secrets.build()
    for seed in range(30):
        draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
        at = draw.randint(0, 900)
        text = f"{(FILLER * 10)[:at]} {LONG[kind]} {FILLER * 8}"
        assert guard.judge(text, "output").block, kind
        assert found_before_it_left(guard, 256, text, at + 1, draw), f"seed {seed}"


def escaped(text: str) -> str:
    """Each character but the blank as an escape of six."""
    return "".join(char if char == " " else f"\\u{ord(char):04x}" for char in text)


ESCAPED: dict[str, tuple[str, str]] = {
    "an assignment": ("secrets", 'access_key_of_bucket" : "' + "a1B2c3D4e5F6g7H8i9J0k" * 9),
    "a card": ("secrets", LONG["a card"]),
    "an account": ("secrets", "MT84 MALT 0110 0001 2345 MTLC AST0 01S"),
    "a key's beginning": ("secrets", "-----BEGIN " + "ENCRYPTED PRIVATE KEY-----"),
    "a word far before": ("pii", "aadhaar é é é é é é é é é é é é é é 2341 2341 2346"),
}


@pytest.mark.parametrize("kind", ESCAPED)
def test_what_is_escaped_is_found_in_windows(kind: str) -> None:
    """Wherever a window ends, in windows of the guard's own size."""
    name, secret = ESCAPED[kind]
    guard = GuardsConfig().policy(name).build()
    chars: int = guard.window_chars  # type: ignore[attr-defined]  # both have it
    assert guard.judge(escaped(secret), "output").block
    for seed in range(30):
        draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
        at = draw.randint(0, 900)
        text = f"{(FILLER * 10)[:at]} {escaped(secret)} {FILLER * 8}"
        assert found_before_it_left(guard, chars, text, at + 1, draw), f"seed {seed}"


def test_a_key_after_an_escape_is_found_in_a_run_that_is_cut() -> None:
    """An answer without blanks is let go in part, wherever that falls in an escape."""
    guard = GuardsConfig().secrets.build()
    for seed in range(12):
        draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
        at = RUN_CHARS_MAX + draw.randint(100, 1200)
        text = ("a\\n" * at)[-at:] + LONG["a key"] + "\\n" + "b\\n" * 800
        assert found_before_it_left(guard, 256, text, at, draw), f"seed {seed}"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_guard_blocks_it_blocks_in_windows_of_its_own_size(name: str) -> None:
    """Its own probes, and nothing where the whole answer is harmless."""
    guard = GuardsConfig().policy(name).build()
    chars: int = guard.window_chars  # type: ignore[attr-defined]  # that is why it is among the names
    attacks = [probe.text for probe in guard.probes if probe.block and probe.stage == "output"]
    assert attacks
    for seed, attack in enumerate(attacks * 8):
        draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
        at = draw.randint(0, 900)
        assert found_before_it_left(guard, chars, f"{(FILLER * 10)[:at]} {attack} {FILLER * 8}", at + 1, draw)
        assert not found_before_it_left(guard, chars, FILLER * 20, 10_000, draw)
