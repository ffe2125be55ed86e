"""The pieces of a request that somebody else wrote: documents, tool output, marked spans; and the request without some.

Pure. Where an application puts fetched text into its messages, it marks it: `<document>…</document>`. All from the
first marker to the last one counts as fetched, what stands between two spans too, for a document can hold a marker of
its own; and what is marked in a user's words is judged as those, too, so nobody hides an attack by marking it. A chunk
that is taken out of a list of documents is gone; elsewhere a fixed word stands in its place, since templates and
servers want each tool call to have its answer. Raises `TooDeep` as `collector.prompt` does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from collector.event import Stage
from collector.prompt import TURNS_MAX, PromptView, TooMany, text_of

Markers = Sequence[tuple[str, str]]
REMOVED: Final = "[removed by policy]"
OPERATIONS: Final = frozenset({"chat", "completion", "responses", "messages", "generate", "invocation"})
"""What a model answers. Elsewhere documents are what is asked about: scored, ranked, embedded."""
_TOOLS: Final = frozenset({"tool", "function"})
_TOOL_PARTS: Final = frozenset({"tool_result", "function_call_output"})
_DOCUMENT_PARTS: Final = frozenset({"document", "search_result"})


class Chunk(NamedTuple):
    """One of them. `take_out` changes the body that it was found in."""

    stage: Stage
    text: str
    take_out: Callable[[], None]

    def __repr__(self) -> str:
        return f"Chunk({self.stage}, {len(self.text)} characters)"


def spans(text: str, markers: Markers) -> list[tuple[int, int]]:
    """(start, end) of what is marked, its markers included, and of what stands between two markers; no overlap."""
    found: list[tuple[int, int]] = []
    for opening, closing in markers:
        start = text.find(opening)
        while start >= 0:
            following = text.find(opening, start + len(opening))
            limit = following if following >= 0 else len(text)
            close = text.find(closing, start + len(opening), limit)
            end = close + len(closing) if close >= 0 else limit
            last = following if following >= 0 else text.rfind(closing, end) + len(closing)
            found += [(start, end), *([(end, last)] if text[end:last].strip() else [])]
            start = following
    return _apart(sorted(found))


def _apart(found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of several kinds of markers that overlap are one."""
    apart: list[tuple[int, int]] = []
    for start, end in found:
        if apart and start < apart[-1][1]:
            apart[-1] = apart[-1][0], max(end, apart[-1][1])
        else:
            apart.append((start, end))
    return apart


def marked(view: PromptView, markers: Markers) -> list[tuple[Stage, str]]:
    """What is marked in a prompt, to be judged as fetched."""
    if not markers:
        return []
    texts = [turn.text for turn in view.turns if turn.role in ("user", "system")]
    return [("retrieved", text[start:end]) for text in texts for start, end in spans(text, markers)]


def chunks(operation: str, body: dict[str, Any], markers: Markers) -> list[Chunk]:
    """All chunks of a parsed body. Raises `TooMany`."""
    if operation not in OPERATIONS:
        return []
    found = list(_documents(body))
    arguments = body.get("chat_template_kwargs")
    if isinstance(arguments, dict):
        found += _documents(arguments)
    for name in ("messages", "input"):
        entries = body.get(name)
        for entry in entries if isinstance(entries, list) else []:
            for message in entry if isinstance(entry, list) else [entry]:
                found += _message(message, markers)
    for name in ("prompt", "input", "system", "instructions"):
        found += _text(body, name, markers)
    if len(found) > TURNS_MAX:
        raise TooMany
    return found


def _documents(holder: dict[str, Any]) -> Iterator[Chunk]:
    documents = holder.get("documents")
    if not isinstance(documents, list):
        return
    for document in list(documents):
        yield Chunk("retrieved", text_of(document, document=True), _remover(documents, document))


def _remover(among: list[Any], one: Any) -> Callable[[], None]:
    def take_out() -> None:
        among[:] = [entry for entry in among if entry is not one]

    return take_out


def _message(message: object, markers: Markers) -> Iterator[Chunk]:
    if not isinstance(message, dict):
        return
    yield from _documents(message)
    if str(message.get("role")) in _TOOLS:
        yield Chunk("tool", text_of(message.get("content")), _setter(message, "content"))
    elif str(message.get("type", "")).endswith("_output"):
        yield Chunk("tool", text_of(message.get("output")), _setter(message, "output"))
    elif str(message.get("role", "user")) != "assistant":
        yield from _text(message, "content", markers)
        parts = message.get("content")
        for place, part in enumerate(parts) if isinstance(parts, list) else []:
            yield from _part(parts, place, part, markers)


def _part(parts: Any, place: int, part: object, markers: Markers) -> Iterator[Chunk]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in _TOOL_PARTS:
        yield Chunk("tool", text_of(part), _setter(part, "output" if "output" in part else "content"))
    elif kind in _DOCUMENT_PARTS:
        yield Chunk("retrieved", text_of(part), _setter(parts, place, {"type": "text", "text": REMOVED}))
    elif isinstance(part, dict):
        yield from _text(part, "text", markers)
    elif isinstance(part, str):
        yield from _text(parts, place, markers)


def _setter(holder: Any, key: Any, value: object = REMOVED) -> Callable[[], None]:
    def take_out() -> None:
        holder[key] = value

    return take_out


def _text(holder: Any, key: Any, markers: Markers) -> Iterator[Chunk]:
    """What is marked in one string, or in each of several."""
    text = holder.get(key) if isinstance(holder, Mapping) else holder[key]
    if isinstance(text, list) and key == "prompt":
        for place in range(len(text)):
            yield from _text(text, place, markers)
    if not isinstance(text, str):
        return
    places = spans(text, markers)
    gone: set[int] = set()

    def remover(number: int) -> Callable[[], None]:
        def take_out() -> None:
            gone.add(number)
            kept, at = [], 0
            for other, (start, end) in enumerate(places):
                if other in gone:
                    kept += [text[at:start], REMOVED]
                    at = end
            holder[key] = "".join([*kept, text[at:]])

        return take_out

    for number, (start, end) in enumerate(places):
        yield Chunk("retrieved", text[start:end], remover(number))
