"""HTML and SVG that escapes by construction: text becomes markup only through `element`, so nothing can be forgotten.

A tenant, a model or a summary may hold anything a client or a detector put there. `shown` also takes the sting out of
what escaping leaves: control characters, marks that turn the reading direction, and length.
"""

import html
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Final

TEXT_CHARACTERS_MAX: Final = 300
VOID: Final = frozenset({"meta", "link", "input", "br"})
_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that draw nothing or change how others are drawn; U+202E turns the line round."""


class Markup(str):
    """Text that is markup already. Only this file and constants make it."""

    __slots__ = ()


Child = "Markup | str | int | None | Iterable[Child]"
Attribute = str | int | float | bool | None


def shown(value: object, limit: int = TEXT_CHARACTERS_MAX) -> str:
    """`value` as one line of plain text: at most `limit` characters, each unseen character replaced by U+FFFD."""
    text = str(value)[: limit + 1]
    clean = "".join("�" if unicodedata.category(character) in _UNSEEN else character for character in text)
    return clean[: limit - 1] + "…" if len(clean) > limit else clean


def element(name: str, attributes: Mapping[str, Attribute] | None = None, *children: object) -> Markup:
    """`<name …>children</name>`: strings are escaped, `Markup` is taken as it is, None is left out, iterables unfold.

    An attribute that is None or False is left out; True gives the bare name. Names come from the code, never from data.
    """
    written = "".join(_attribute(key, value) for key, value in (attributes or {}).items())
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(children: object) -> Markup:
    """The children one after another, escaped where they are no markup."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, Iterable) and not isinstance(children, str | bytes):
        return Markup("".join(joined(child) for child in children))
    return Markup(html.escape(shown(children, 20_000)))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f" {key}"
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {key}="{html.escape(shown(value, 20_000))}"'
