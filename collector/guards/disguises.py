"""The known disguises, put on: what `normaliser` takes off again. For judging guards only; no guard reads it.

Each is a pure function of the text, so the same case always wears the same disguise.
"""

import base64
import codecs
from collections.abc import Callable, Mapping
from typing import Final

_LEET: Final = str.maketrans("aeio", "4310")
_LOOK_ALIKES: Final = str.maketrans("aeopc", "аеорс")


def _tagged(text: str) -> str:
    """ASCII as the invisible tag characters of Unicode, the rest as it is."""
    return "".join(chr(0xE0000 + ord(char)) if " " <= char <= "~" else char for char in text)


def _spaced(text: str) -> str:
    return "   ".join(" ".join(word) for word in text.split())


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogatepass")).decode()


DISGUISES: Final[Mapping[str, Callable[[str], str]]] = {
    "leet": lambda text: text.translate(_LEET),
    "base64": _base64,
    "spacing": _spaced,
    "zero_width": "\u200b".join,
    "confusables": lambda text: text.translate(_LOOK_ALIKES),
    "tags": _tagged,
    "hex": lambda text: text.encode("utf-8", "surrogatepass").hex(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "reversed": lambda text: text[::-1],
}
