"""Undoes what hides words from a reader of text: one pure function before the text guards.

It handles invisible and tag characters, confusable letters, width variants, letter spacing, leetspeak, base64 and hex
in place, rot13 and reversal. What it undid is a signal of its own and stands in the verdict's label.

Decoding happens in place: a decoded copy beside the text makes harmless encoded text look like an attack. Every step is
linear in the text: patterns start at boundaries, and their parts are possessive or bounded. Plain ASCII costs about
15 µs per KB.
"""

import base64
import binascii
import codecs
import contextlib
import re
import unicodedata
from typing import Final, NamedTuple

UNDONE: Final = (
    "tags", "invisible", "width", "confusables", "encoded", "spaced", "leet", "rot13", "reversed",
)  # fmt: skip
"""Every word that `Normalised.undone` may hold, in the order of the steps."""
_LAYERS_MAX: Final = 3
"""Layers of base64 or hex that are opened; deeper ones stay as they are."""


class Normalised(NamedTuple):
    """A text with its disguise taken off."""

    text: str
    undone: tuple[str, ...]
    """What was found and undone, words of `UNDONE` in its order."""


_TAGS: Final = re.compile("[\U000e0020-\U000e007e]+")
_FLAG: Final = re.compile("\U0001f3f4[\U000e0020-\U000e007f]+")
_INVISIBLE: Final = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e01ef]+"
)
_HIDING: Final = re.compile(
    "[A-Za-z](?:[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]+[A-Za-z]|[\u202a-\u202e\u2066-\u2069])"
)
"""Invisible characters where none belong: inside a Latin word, or a change of direction right after one."""
_WIDE: Final = re.compile("[\uff21-\uff5a\u2460-\u24ff\U0001d400-\U0001d7ff\U0001f130-\U0001f189]")
_SWELLING: Final = re.compile("[\ufdfa\ufdfb]")
"""Ligatures that compatibility folding would turn into up to 18 characters; no other makes more than 6."""
_CONFUSABLE: Final = str.maketrans(
    "асеорхуіјѕһԁոԛԝɡɑıⅼӏАЕОРСКМТНВХІЈЅαοερτικνΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aceopxyijshdnqwgaillAEOPCKMTHBXIJSaoeptikvABEZHIKMNOPTYX",
)
_MIXED: Final = re.compile("[A-Za-z][\u0250-\u02af\u0370-\u058f]|[\u0250-\u02af\u0370-\u058f][A-Za-z]")
_FOREIGN_WORD: Final = re.compile(r"(?<!\w)\w*?[\u0250-\u02af\u0370-\u058f]\w*+")
_WORD: Final = re.compile(r"\w++")
_ENCODED: Final = re.compile(r"[A-Za-z0-9+/_-]{16,}+={0,2}")
_SPACED: Final = re.compile(r"(?<!\w)[^\W_](?:[ _.*-]{1,3}[^\W_](?![^\W_])){4,}")
_GAP: Final = re.compile(r"[ _.*-]+")
_LEET_SIGN: Final = re.compile(r"[A-Za-z][013457@$!]+[A-Za-z]")
_LEET_WORD: Final = re.compile(r"(?<![\w@$!])[A-Za-z013457@$!]{2,24}+(?![\w@$])")
_LEET: Final = str.maketrans("431057@$!", "aeiostasi")
_ROT13_WORDS: Final = frozenset(
    (
        "gur", "naq", "lbh", "lbhe", "vtaber", "cerivbhf", "vafgehpgvba", "vafgehpgvbaf", "flfgrz", "cebzcg", "gung",
        "guvf", "jvgu", "sbe", "abg", "ner", "jung", "ubj", "cyrnfr", "zr", "vf", "va", "gb", "bs",
    )
)  # fmt: skip
_REVERSED_WORDS: Final = frozenset(
    (
        "eht", "dna", "uoy", "ruoy", "erongi", "suoiverp", "noitcurtsni", "snoitcurtsni", "metsys", "tpmorp", "taht",
        "siht", "htiw", "rof", "ton", "era", "tahw", "woh", "esaelp", "em", "si", "ot", "fo",
    )
)  # fmt: skip
_SIGN_WORDS_MIN: Final = 3


def normalise(text: str) -> Normalised:
    """The text as a reader would understand it. Any string is taken, lone surrogates included; never raises."""
    undone: set[str] = set()
    if not text.isascii():
        text = _letters(text, undone)
    text = _open_encoded(text, undone)
    text = _close_gaps(text, undone)
    text = _read_leet(text, undone)
    text = _turn(text, undone)
    return Normalised(text, tuple(step for step in UNDONE if step in undone))


def _letters(text: str, undone: set[str]) -> str:
    """Tags to letters, invisible characters out, compatibility forms folded, look-alikes to Latin."""
    if _TAGS.search(text):
        text = _FLAG.sub("", text)
        if _TAGS.search(text):
            undone.add("tags")
            text = _TAGS.sub(lambda found: "".join(chr(ord(char) - 0xE0000) for char in found[0]), text)
    if _HIDING.search(text):
        undone.add("invisible")
    text = _INVISIBLE.sub("", text)
    if _WIDE.search(text):
        undone.add("width")
    text = unicodedata.normalize("NFKC", _SWELLING.sub(" ", text))
    latin = sum(map(text.count, "etaoinsrh"))
    if _MIXED.search(text) or latin * 3 > len(text):
        plain = _FOREIGN_WORD.sub(_plain_word, text)
        if plain != text:
            undone.add("confusables")
        text = plain
    return text


def _plain_word(found: re.Match[str]) -> str:
    """A word with look-alikes, in Latin letters where that makes it wholly Latin."""
    plain = found[0].translate(_CONFUSABLE)
    return plain if plain.isascii() else found[0]


def _open_encoded(text: str, undone: set[str]) -> str:
    for _ in range(_LAYERS_MAX):
        opened = _ENCODED.sub(_decoded, text)
        if opened == text:
            break
        undone.add("encoded")
        text = opened
    return text


def _decoded(found: re.Match[str]) -> str:
    """What base64 or hex says, where it says something readable."""
    run = found[0].rstrip("=")
    raws = []
    if len(run) >= 24 and len(run) % 2 == 0 and not run.strip("0123456789abcdefABCDEF"):
        raws.append(bytes.fromhex(run))
    with contextlib.suppress(binascii.Error):
        raws.append(base64.b64decode(run.replace("-", "+").replace("_", "/") + "=" * (-len(run) % 4), validate=True))
    for raw in raws:
        try:
            said = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if len(said) >= 8 and sum(map(str.isprintable, said)) + said.count("\n") > 0.95 * len(said):
            return said
    return found[0]


def _close_gaps(text: str, undone: set[str]) -> str:
    def closed(found: re.Match[str]) -> str:
        run = found[0]
        if sum(map(str.isalpha, run)) < 5 or sum(map(str.isdigit, run)) > sum(map(str.isalpha, run)):
            return run
        undone.add("spaced")
        gaps = _GAP.findall(run)
        word_gap = 3 if min(map(len, gaps)) == 1 else 4
        return _GAP.sub(lambda gap: " " if len(gap[0]) >= word_gap else "", run)

    return _SPACED.sub(closed, text)


def _read_leet(text: str, undone: set[str]) -> str:
    """Digits back to letters where so many words mix them that it is a way of writing."""
    signs = len(_LEET_SIGN.findall(text))
    if signs == 0 or signs * 6 < text.count(" ") + 1:
        return text

    def read(found: re.Match[str]) -> str:
        word = found[0].rstrip("!")
        if not any(map(str.isalpha, word)) or not word.strip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"):
            return found[0]
        undone.add("leet")
        return word.translate(_LEET) + found[0][len(word) :]

    return _LEET_WORD.sub(read, text)


def _turn(text: str, undone: set[str]) -> str:
    """rot13 and reversal, known by the commonest words."""
    lower = text.lower()
    for step, words, sign in (
        ("rot13", _ROT13_WORDS, ("gur", "lbh", "vtaber", "naq")),
        ("reversed", _REVERSED_WORDS, ("eht", "uoy", "erongi", "dna")),
    ):
        if any(word in lower for word in sign) and len(words & set(_WORD.findall(lower))) >= _SIGN_WORDS_MIN:
            undone.add(step)
            text = codecs.encode(text, "rot13") if step == "rot13" else text[::-1]
            lower = text.lower()
    return text
