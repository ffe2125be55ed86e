"""Training texts of our own: a small grammar of attacks by technique, and of harmless texts that look like them.

Public collections are rich in a few styles and poor in others. The grammar in the `authored` files fills the gaps: each
technique named in the literature (OWASP LLM01:2025 and the surveys it cites) has a handful of sentence frames, and each
has its harmless twin: fiction without a secret, a quiz without a hijack, a document without an order in it. Drawn with
a seed, so training stays reproducible. For training only; no guard reads it.
"""

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final, NamedTuple

_SLOT: Final = re.compile(r"\{(\w+)\}")
_BREAK: Final = re.compile(r"[.!?;]\s|\n")
FILES: Final = ("authored.toml", "authored_more.toml")
_SHARED: Final = ("held", "value", "field", "banned", "role")
"""Slots that are the same in a system prompt and in the message under it."""
_DEPTH_MAX: Final = 6
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
    grammar = _grammar()
    chance = random.Random(seed)  # noqa: S311 - a reproducible draw, no secret
    for label, kind, count in ((1, "attack", attacks_per_technique), (0, "benign", benign_per_kind)):
        for family, frames in grammar[kind].items():
            for text in _distinct(frames, grammar["slots"], chance, count):
                yield AuthoredRow(text, label, f"{'own' if label else 'b_own'}_{family}", "en")
    for lang, words in grammar["language"].items():
        for label, kind in ((1, "attack"), (0, "benign")):
            for text in _distinct(words[kind], {**grammar["slots"], **words}, chance, per_language):
                yield AuthoredRow(text, label, f"{'own' if label else 'b_own'}_ml", lang)


def draw_documents(seed: int, per_kind: int) -> Iterator[AuthoredRow]:
    """Fetched texts of each kind: so many as they are, and so many with an order put at the start, within, or last."""
    grammar = _grammar()
    chance = random.Random(seed)  # noqa: S311 - a reproducible draw, no secret
    slots = grammar["slots"]
    for kind, frames in grammar["document"].items():
        for text in _distinct(frames, slots, chance, per_kind, styled=False):
            yield AuthoredRow(text, 0, f"b_own_doc_{kind}", "en")
        for text in _distinct(frames, slots, chance, per_kind, styled=False):
            place = chance.choice(grammar["orders"]["place"]).replace(
                "{order}", chance.choice(grammar["orders"]["order"])
            )
            order = _style(_fill(place, slots, chance), chance)
            cuts = [found.end() for found in _BREAK.finditer(text)]
            cut = chance.choice((0, len(text), chance.choice(cuts or [0]), chance.randrange(len(text))))
            yield AuthoredRow(text[:cut] + order + text[cut:], 1, f"own_doc_{kind}", "en")


class Pair(NamedTuple):
    """A message under a system prompt."""

    system: str
    text: str
    label: int


def draw_pairs(seed: int, per_kind: int) -> Iterator[Pair]:
    """For each kind of system prompt so many messages that ask for what it guards, and so many harmless ones."""
    grammar = _grammar()
    chance = random.Random(seed)  # noqa: S311 - a reproducible draw, no secret
    for words in grammar["setting"].values():
        for label, kind in ((1, "attack"), (0, "benign")):
            for _ in range(per_kind):
                slots = {**grammar["slots"], **{name: [chance.choice(grammar["slots"][name])] for name in _SHARED}}
                system = _fill(chance.choice(words["system"]), slots, chance)
                yield Pair(system, _style(_fill(chance.choice(words[kind]), slots, chance), chance), label)


def _grammar() -> dict[str, dict[str, Any]]:
    """Both files as one; no name stands in both."""
    merged: dict[str, dict[str, Any]] = {}
    for file in FILES:
        for section, entries in tomllib.loads(
            resources.files("collector.guards").joinpath(file).read_text("utf-8")
        ).items():
            merged.setdefault(section, {}).update(entries)
    return merged


def _distinct(
    frames: Sequence[str], slots: Slots, chance: random.Random, count: int, *, styled: bool = True
) -> list[str]:
    """Up to `count` different texts, in the order drawn; fewer where the grammar has fewer."""
    found: dict[str, None] = {}
    for _ in range(count * 4):
        if len(found) == count:
            break
        text = _fill(chance.choice(frames), slots, chance)
        found[_style(text, chance) if styled else text] = None
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
