"""Images, sound and films in a request's body: how many, how large, which. Their content is not for text guards.

A parsed body in, items out, and the image guard's verdict on them. Knows the shapes of OpenAI's chat and responses,
Anthropic's messages, Cohere's embed and Ollama's `images`; what it does not know the engine plugin still sees as a
prompt with media in it.
"""

import base64
import binascii
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from collector.event import Decision, GuardResult, Media
from collector.guards.protocol import Context, MediaGuard
from collector.prompt_words import DEPTH_MAX, TooDeep

Kind = Literal["image", "audio", "video", "file", "embeds"]
MEDIA_MAX: Final = 64
"""Items listed in one event; all are counted, and all are judged."""
KINDS: Final[Mapping[str, Kind]] = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "images": "image",
    "image_pil": "image",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio": "audio",
    "video_url": "video",
    "video": "video",
    "videos": "video",
    "input_file": "file",
    "file": "file",
    "image_embeds": "embeds",
    "audio_embeds": "embeds",
    "video_embeds": "embeds",
    "prompt_embeds": "embeds",
}
_NAMES: Final = frozenset(KINDS)
_WORDS: Final = frozenset({"image", "audio", "video", "videos", "file"})
"""Keys that other things are called by, too: a text under them is media only where it is an address."""
_WRAPPED_MAX: Final = 4
_PAYLOADS: Final = ("url", "data", "image_url", "file_data", "file_url", "source", "b64_json")


@dataclass(frozen=True, slots=True)
class Item:
    """One image, sound or film as the body has it. Its repr shows nothing of it."""

    kind: Kind
    url: str = field(default="", repr=False)
    """The address where it is not inline."""
    data: bytes = field(default=b"", repr=False)

    def told(self, digest: Callable[[str], str]) -> Media:
        """As the event has it; `digest`: the tenant's keyed digest of a text."""
        if self.data:
            told = digest(hashlib.sha256(self.data).hexdigest())
            return Media(kind=self.kind, digest=told, size_bytes=len(self.data))
        return Media(
            kind=self.kind, source="url" if self.url else "cached", digest=digest(self.url) if self.url else ""
        )


def items(body: object) -> list[Item]:
    """Everything in the body that is no text, wherever it stands. Raises `TooDeep`. About 1 µs an object in it."""
    found: list[Item] = []
    _search(body, 0, found)
    return found


def _search(value: object, depth: int, found: list[Item]) -> None:
    if depth > 2 * DEPTH_MAX:
        raise TooDeep
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict | list):
                _search(entry, depth + 1, found)
        return
    if not isinstance(value, dict):
        return
    carried = {} if _NAMES.isdisjoint(value) else {key: KINDS[key] for key in value if _is_media(key, value[key])}
    before, kind = len(found), KINDS.get(str(value.get("type")))
    if kind is not None:
        carried |= {key: kind for key in _PAYLOADS if value.get(key) and key not in carried}
    for key in sorted(carried):
        found += _items(carried[key], value[key])
    for key, entry in value.items():
        if isinstance(entry, dict | list) and key not in carried:
            _search(entry, depth + 1, found)
    if kind is not None and len(found) == before:
        found.append(Item(kind))


def _is_media(key: str, value: object) -> bool:
    return key in _NAMES and _carries(key, value)


def _carries(key: str, value: object) -> bool:
    """Whether this is media, and not a word or a schema that only has its name."""
    if isinstance(value, str):
        return bool(value) and (key not in _WORDS or _is_address(value))
    if isinstance(value, list):
        return bool(value) and all(_carries(key, entry) for entry in value)
    return isinstance(value, dict) and any(isinstance(value.get(name), str | dict) for name in _PAYLOADS)


def _is_address(text: str) -> bool:
    return text[:6].lower().startswith(("data:", "http:", "https:", "file:", "s3:", "gs:"))


def _items(kind: Kind, value: object) -> list[Item]:
    """One for each payload of a part, whatever it is wrapped in: which of several a server takes is its own affair."""
    return [_item(kind, payload) for payload in _payloads(value, 0)] or [Item(kind)]


def _payloads(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth == _WRAPPED_MAX:
        yield ""  # unread, so it counts as one that no guard can judge
    elif isinstance(value, list):
        for entry in value:
            yield from _payloads(entry, depth + 1)
    elif isinstance(value, dict):
        for name in _PAYLOADS:
            if value.get(name):
                yield from _payloads(value[name], depth + 1)


def _item(kind: Kind, payload: str) -> Item:
    if payload[:5].lower() == "data:":
        head, _, payload = payload.partition(",")
        if not head.endswith(";base64"):
            return Item(kind, data=payload.encode("utf-8", "surrogatepass"))
    elif _is_address(payload):
        return Item(kind, url=payload)
    try:
        return Item(kind, data=base64.b64decode(payload))
    except (binascii.Error, ValueError):
        return Item(kind, data=payload.encode("utf-8", "surrogatepass"))


def listed(found: Sequence[Media]) -> dict[str, object]:
    """As fields of an event."""
    return {"media": list(found[:MEDIA_MAX]), "media_count": len(found)} if found else {}


def verdict_on(found: Sequence[Item], guard: MediaGuard, context: Context) -> GuardResult:
    """A media guard's verdict on all items, the worst; whatever it raises is the verdict `error`, which blocks."""
    began_s = time.perf_counter()
    try:
        judgements = [guard.judge(item, context) for item in found]
        worst = max(judgements, key=lambda each: (each.block, each.score))
        decision: Decision = "block" if worst.block else "allow"
        score, label, error = min(1.0, max(0.0, worst.score)), worst.label, ""
    except Exception as failure:  # noqa: BLE001 - a broken guard must not let anything in
        decision, score, label, error = "error", 0.0, "", type(failure).__name__
    return GuardResult(
        guard=guard.name,
        version=guard.version,
        stage="input",
        decision=decision,
        score=score,
        label=label[:256],
        latency_ms=(time.perf_counter() - began_s) * 1000,
        error=error[:256],
    )
