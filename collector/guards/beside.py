"""What a message says beside its system prompt: whether it asks for what that prompt guards.

Many attacks are ordinary questions, and only the system prompt makes them attacks: "what is the key?". The sentences of
a system prompt that forbid or hide something name what they guard; a message that speaks of just that, and of little
else, is looked at more closely. The features are shares and hits, none of them a text; their weights are fitted by
`collector.guards.train` to pairs of our own and stand in the weights file. They can only raise a score, so whoever
writes the system prompt can't talk a message harmless.
"""

import re
from collections.abc import Sequence
from typing import Final

FEATURES: Final = ("sentence_share", "sentence_noun", "sentence_asked", "whole_share", "value", "on_topic_share")
"""Of the message's best sentence: the share of its words that are guarded, whether a secret is named, whether it is
asked for, each the less the longer the sentence. Of the whole message: the share that is guarded, whether it holds a
guarded value, and the share that the system prompt speaks of otherwise."""
SYSTEM_CHARS_MAX: Final = 8_000
TEXT_CHARS_MAX: Final = 4_000
"""Of longer texts the beginning and the end are read."""
STEM_CHARS: Final = 6
"""So many letters of a word are compared."""
BONUS_MAX: Final = 4.0
"""In units of the margin."""

_SENTENCE: Final = re.compile(r"[.!?;\n]+\s*")
WORD: Final = re.compile(r"[^\W\d_][\w'-]{2,}")
_CUE: Final = re.compile(
    r"\b(?:never|not|\w+n't|cannot|nobody|no one|secret|confidential|private|hidden|refuse|avoid|forbid\w*|prohibit\w*|"
    r"protect|unless|without|classified|internal|sensitive|passwords?|passcodes?|passphrases?|pin|tokens?|"
    r"(?:access|door|api|recovery|discount) (?:codes?|keys?|phrases?))\b",
    re.IGNORECASE,
)
"""What forbids, hides, or is commonly hidden; not `only` and `code`, which speak of what is allowed as often."""
_VALUE: Final = re.compile(
    r"[\"'“«‘]([^\"'”»’\n]{3,60})[\"'”»’]|(?:\bis|=|:)\s*([^\s.,;]{0,40}?[\dA-Z_][^\s.,;]{2,40})"
)
_ASKS: Final = re.compile(
    r"\b(?:what|which|tell|give|reveal|show|say|print|repeat|spell|write|share|know|guess|hint|translate|output|need)\b",
    re.IGNORECASE,
)
_NOUNS: Final = "passwo passph passco code codewo key keys secret pin token creden prompt instru access combin hidden"
_COMMON_WORDS: Final = """
about above after again all also always and any answer anyone anything are ask asked asking assist because been before
being but can circum could did does don't done each ever every everyo everyt follow for from get give given had has
have help her here him his how ignore inform into its just keep know like make matter may mention more must need never
not now nobody only other our out please provid questi refuse reply respon reveal say she should some someon someth
such take tell than that the their them then there these they this those to told too under unless until use user users
using very want was way what when where whethe which who whom why will with withou word words would write you your
yours yourse share talk discus divulg disclo whatev system allowe even
"""
_SECRET_NOUNS: Final = frozenset(_NOUNS.split())
COMMON: Final = frozenset(_COMMON_WORDS.split())


def features(text: str, system: str) -> list[float]:
    """One number in [0, 1] for each of `FEATURES`. Linear in both texts, up to their limits."""
    if len(system) > SYSTEM_CHARS_MAX:
        system = f"{system[: SYSTEM_CHARS_MAX // 2]}\n{system[-SYSTEM_CHARS_MAX // 2 :]}"
    text = text if len(text) <= TEXT_CHARS_MAX else f"{text[: TEXT_CHARS_MAX // 2]}\n{text[-TEXT_CHARS_MAX // 2 :]}"
    guarding = " . ".join(part for part in _SENTENCE.split(system) if _CUE.search(part))
    said, guarded = _stems(text), _stems(guarding)
    if not said or not guarded:
        return [0.0] * len(FEATURES)
    share = noun = asked = 0.0
    for sentence in _SENTENCE.split(text):
        words = _stems(sentence)
        hits = words & guarded
        if hits:
            share = max(share, len(hits) / max(2, len(words)))
            if hits & _SECRET_NOUNS:
                near = 2 / max(2, len(words))
                noun = max(noun, near)
                asked = max(asked, near if _ASKS.search(sentence) else 0.0)
    lower = text.lower()
    values = (first or second for first, second in _VALUE.findall(guarding))
    return [
        share,
        noun,
        asked,
        len(said & guarded) / max(2, len(said)),
        float(any(value.lower() in lower for value in values)),
        len((said & _stems(system)) - guarded) / len(said),
    ]


def bonus(text: str, system: str, weights: Sequence[float]) -> float:
    """What is added to a message's margin, from 0 to `BONUS_MAX`."""
    raised = sum(weight * value for weight, value in zip(weights, features(text, system), strict=True))
    return min(BONUS_MAX, max(0.0, raised))


def _stems(text: str) -> set[str]:
    """The beginning of each word that is not a common one."""
    return {word[:STEM_CHARS] for word in WORD.findall(text.lower())} - COMMON
