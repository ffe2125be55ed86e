"""Training texts of our own: a small grammar of attacks by technique, and of harmless texts that look like them.

Public collections are rich in a few styles and poor in others. The grammar in `authored.toml` fills the gaps: each
technique named in the literature (OWASP LLM01:2025 and the surveys it cites) has a handful of sentence frames, and each
has its harmless twin: fiction without a secret, a quiz without a hijack, a document without an order in it. Drawn with
a seed, so training stays reproducible. For training only; no guard reads it.
"""

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Final, NamedTuple

_SLOT: Final = re.compile(r"\{(\w+)\}")
_DEPTH_MAX: Final = 5
"""Slots within slots."""

Slots = Mapping[str, Sequence[str]]


class AuthoredRow(NamedTuple):
    """One drawn text."""

    text: str
    label: int
    family: str
    lang: str


def draw(seed: int, attacks_per_technique: int, benign_per_kind: int, per_language: int) -> Iterator[AuthoredRow]:
    """Distinct texts: so many for each technique and each harmless kind, and for each language so many of both."""
    grammar = tomllib.loads(resources.files("collector.guards").joinpath("authored.toml").read_text("utf-8"))
    chance = random.Random(seed)  # noqa: S311 - a reproducible draw, no secret
    for label, kind, count in ((1, "attack", attacks_per_technique), (0, "benign", benign_per_kind)):
        for family, frames in grammar[kind].items():
            for text in _distinct(frames, grammar["slots"], chance, count):
                yield AuthoredRow(text, label, f"{'own' if label else 'b_own'}_{family}", "en")
    for lang, words in grammar["language"].items():
        for label, kind in ((1, "attack"), (0, "benign")):
            for text in _distinct(words[kind], {**grammar["slots"], **words}, chance, per_language):
                yield AuthoredRow(text, label, f"{'own' if label else 'b_own'}_ml", lang)


def _distinct(frames: Sequence[str], slots: Slots, chance: random.Random, count: int) -> list[str]:
    """Up to `count` different texts, in the order drawn; fewer where the grammar has fewer."""
    found: dict[str, None] = {}
    for _ in range(count * 4):
        if len(found) == count:
            break
        found[_style(_fill(chance.choice(frames), slots, chance), chance)] = None
    return list(found)


def _fill(frame: str, slots: Slots, chance: random.Random) -> str:
    made = _made_up(slots, chance)

    def one(found: re.Match[str]) -> str:
        name = found[1]
        if name in made:
            return made[name]
        word = chance.choice(slots[name] if name in slots else slots[name.rstrip("_23")])
        if name == "make_":
            return word.lower()
        return word.replace(" ", "_") if name == "secret_" else _plain(word)

    frame = _plain(frame)
    for _ in range(_DEPTH_MAX):
        frame = _SLOT.sub(one, frame)
    return frame.replace("\0", "{").replace("\1", "}")


def _plain(frame: str) -> str:
    """Doubled braces as marks that are no slots."""
    return frame.replace("{{", "\0").replace("}}", "\1")


def _made_up(slots: Slots, chance: random.Random) -> dict[str, str]:
    """Slots that hang together: two quiz pairs, a sentence in two parts, a flood of words, a blob."""
    (first, answer), (second, answer_2) = (fact.split("|") for fact in chance.sample(slots["fact"], 2))
    sentence = chance.choice(slots["halves"])
    cut = chance.randrange(3, len(sentence) - 3)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789 "
    return {
        "fq": first,
        "fa": answer,
        "fq2": second,
        "fa2": answer_2,
        "s1": sentence[:cut],
        "s2": sentence[cut:],
        "flood": " ".join([chance.choice(slots["flood"])] * 30),
        "ident": "".join(chance.choices("ABCDEFGHKLMNPRSTXYZabcdefhkmnrstxyz0123456789-", k=chance.randrange(3, 14))),
        "blob": "".join(chance.choices(letters, k=chance.randrange(15, 60))),
    }


def _style(text: str, chance: random.Random) -> str:
    """The same as people type it: capital first letter, at times all small, shouted, or without a full stop."""
    roll = chance.random()
    if roll < 0.12:
        return text.lower()
    if roll < 0.16:
        return text.upper()
    text = text[:1].upper() + text[1:]
    return text.rstrip(".") if roll > 0.85 else text
