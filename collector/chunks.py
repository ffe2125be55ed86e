"""The pieces of a request that somebody else wrote: documents, tool output, marked spans; and the request without some.

Pure. Where an application puts fetched text into its messages, it marks it: `<document>…</document>`. All from the
first marker to the last one counts as fetched, what stands between two spans too, for a document can hold a marker of
its own; and what is marked in a user's words is judged as those, too, so nobody hides an attack by marking it. A chunk
that is taken out of a list of documents is gone; elsewhere a fixed word stands in its place, since templates and
servers want each tool call to have its answer. Raises `TooDeep` as `collector.prompt` does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from collector.event import Stage
from collector.prompt import TURNS_MAX, PromptView, TooMany
from collector.prompt_words import text_of

Markers = Sequence[tuple[str, str]]
REMOVED: Final = "[removed by policy]"
OPERATIONS: Final = frozenset({"chat", "completion", "responses", "messages", "generate", "invocation"})
"""What a model answers. Elsewhere documents are what is asked about: scored, ranked, embedded."""
_TOOLS: Final = frozenset({"tool", "function"})
_TOOL_PARTS: Final = frozenset({"tool_result", "function_call_output"})
_DOCUMENT_PARTS: Final = frozenset({"document", "search_result"})


class Chunk(NamedTuple):
    """One of them: the `number`th that `write` can leave out of the text or list where it was found."""

    stage: Stage
    text: str
    write: Callable[[set[int]], None]
    number: int = 0

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


def take_out(found: Iterable[Chunk]) -> None:
    """Take chunks out of their body: each text and list is written once. Once for one call of `chunks`."""
    gone: dict[Callable[[set[int]], None], set[int]] = {}
    for chunk in found:
        gone.setdefault(chunk.write, set()).add(chunk.number)
    for write, numbers in gone.items():
        write(numbers)


def _documents(holder: dict[str, Any]) -> Iterator[Chunk]:
    documents = holder.get("documents")
    if not isinstance(documents, list):
        return

    def write(gone: set[int]) -> None:
        documents[:] = [entry for number, entry in enumerate(documents) if number not in gone]

    for number, document in enumerate(documents):
        yield Chunk("retrieved", text_of(document, document=True), write, number)


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


def _setter(holder: Any, key: Any, value: object = REMOVED) -> Callable[[set[int]], None]:
    def write(_gone: set[int]) -> None:
        holder[key] = value

    return write


def _text(holder: Any, key: Any, markers: Markers) -> Iterator[Chunk]:
    """What is marked in one string, or in each of several."""
    text = holder.get(key) if isinstance(holder, Mapping) else holder[key]
    if isinstance(text, list) and key == "prompt":
        for place in range(len(text)):
            yield from _text(text, place, markers)
    if not isinstance(text, str):
        return
    places = spans(text, markers)

    def write(gone: set[int]) -> None:
        kept, at = [], 0
        for number in sorted(gone):
            start, end = places[number]
            kept += [text[at:start], REMOVED]
            at = end
        holder[key] = "".join([*kept, text[at:]])

    for number, (start, end) in enumerate(places):
        yield Chunk("retrieved", text[start:end], write, number)
