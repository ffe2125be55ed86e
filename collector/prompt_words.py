"""What a message, a part of one or a document says: its text, and what templates may print beside it.

Pure. Templates of vLLM's models print tools and documents as JSON, and are handed ids and unknown fields of parts; so
what is no text is told apart, and nothing is left out but media and the names that every API has.
"""

from collections.abc import Iterator
from typing import Final

DEPTH_MAX: Final = 32
_OPAQUE: Final = frozenset(
    {"image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "image_embeds", "audio_embeds"}
    | {"video_embeds", "prompt_embeds", "image_pil"}
)
"""Kinds of content that are no text; the bytes of it are not for text guards."""
_PAYLOADS: Final = _OPAQUE | {"source", "url", "data"}
_NO_TEXT: Final = frozenset({"type", "id", "call_id", "tool_use_id", "tool_call_id", "cache_control", "status"})
"""Fields of a message, a part or a document that name things. Templates may print them, so they are judged too."""
_BESIDE_MEDIA: Final = _NO_TEXT | _PAYLOADS
_BESIDE_UNTYPED: Final = _NO_TEXT | _OPAQUE - {"image"}
"""Where a part tells no type, servers take these for it."""
_IDS: Final = _NO_TEXT - {"type"}
_COMMON_NAMES: Final = """
role content text title name function functions arguments tool_calls description parameters properties required items
enum strict additionalProperties input input_schema output documents detail media_type thinking signature schema
json_schema json_object string object array number integer boolean null message custom refusal reasoning input_text
output_text tool_use tool_result function_call function_call_output document search_result ephemeral auto none any tool
completed in_progress base64
"""
COMMON: Final = _PAYLOADS | _NO_TEXT | frozenset(_COMMON_NAMES.split())
"""Names of fields and types that every API has: they say nothing of who wrote the body."""


class TooDeep(ValueError):
    """A body is nested deeper than 32 levels where text may stand."""


def lines(*texts: str) -> str:
    """Those that say something, one below the other."""
    return "\n".join(text for text in texts if text)


def text(value: object, *, document: bool = False) -> str:
    """The text of a message, a part or a document. Media are parts of messages; documents are told to the model whole.

    What a part of text holds beside it is handed to templates, too.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        kind = value.get("type")
        skipped = _NO_TEXT
        if not document and (kind is None or str(kind) in _OPAQUE):
            skipped = _BESIDE_UNTYPED if kind is None else _BESIDE_MEDIA
        value = [entry for key, entry in value.items() if key not in skipped]
    return "\n".join(_values(value, 0))


def ids(value: object) -> list[str]:
    """What names a message, a part or a document, but for common words."""
    if not isinstance(value, dict) or _IDS.isdisjoint(value):
        return []
    named = [entry for key, entry in value.items() if key in _IDS]
    return [each for each in _values(named, 0) if each not in COMMON]


def values(value: object) -> Iterator[str]:
    """Every string in a parsed value, but for names of fields and what stands below `type`. Raises `TooDeep`."""
    return _values(value, 0)


def _values(value: object, depth: int) -> Iterator[str]:
    if depth > DEPTH_MAX:
        raise TooDeep
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key != "type":
                yield from _values(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            yield from _values(entry, depth + 1)


def names(value: object) -> list[str]:
    """Every name of a field or a type within that is none of the common ones. Raises `TooDeep`."""
    found: list[str] = []
    if isinstance(value, dict | list):
        _name(value, 0, found, of_type=False)
    return found


def _name(value: dict[str, object] | list[object], depth: int, found: list[str], *, of_type: bool) -> None:
    if depth > DEPTH_MAX:
        raise TooDeep
    entries = value.items() if isinstance(value, dict) else [("", entry) for entry in value]
    for key, entry in entries:
        if key and key not in COMMON:
            found.append(key)
        kind = of_type or key == "type"
        if isinstance(entry, dict | list):
            _name(entry, depth + 1, found, of_type=kind)
        elif kind and isinstance(entry, str) and entry not in COMMON:
            found.append(entry)


def beside(value: object) -> str:
    """What a part or a document says beside its text."""
    return lines(*ids(value), *names(value))


def text_of(value: object, *, document: bool = False) -> str:
    """All that a message's content, a part or a document says, as guards are given it. Raises `TooDeep`."""
    return lines(text(value, document=document), beside(value))


def strings(value: object) -> Iterator[str]:
    """Every string in a parsed value, and the names that are not common. Raises `TooDeep`."""
    yield from values(value)
    yield from names(value)
