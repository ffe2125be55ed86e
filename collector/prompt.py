"""The PromptView: what a request's body says, apart from how it will be rendered for the model.

Pure: a parsed body in, views out, one for each prompt in the body. A body of a shape not known here gives no view; then
the engine plugin judges and hashes the rendered prompt instead, so that nothing passes unread. Views hold text and live
in memory only, for the time of one request; their repr shows none of it.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from collector.event import Stage

Body = Mapping[str, object]
Role = Literal["system", "user", "assistant", "tool", "document"]

VIEWS_MAX: Final = 4096
"""Prompts in one body beyond this are not viewed; the engine plugin reads them rendered."""
DEPTH_MAX: Final = 32
_BEGINNING: Final = 64
_ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_STAGES: Final[Mapping[Role, Stage]] = {"user": "input", "tool": "tool", "document": "retrieved"}
_OPAQUE: Final = frozenset(
    {"image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "image_embeds", "audio_embeds"}
)
"""Content that is no text; the bytes of it are not for text guards."""
_NO_TEXT: Final = frozenset({"type", "id", "call_id", "tool_use_id", "tool_call_id", "cache_control", "status"})
"""Fields of a message or a part that name things and say nothing."""
_FRAME: Final = frozenset({"tools", "functions", "chat_template", "documents", "chat_template_kwargs"})
"""Fields of a body that say something beside its messages."""
_PLAIN: Final = frozenset({"role", "content"})
"""All that most messages have."""


class TooDeep(ValueError):
    """A body is nested deeper than 32 levels where text may stand."""


class Turn(NamedTuple):
    """One message's text."""

    role: Role
    text: str
    aside: str = ""
    """What else the message says: a name, tool calls, reasoning. Templates may leave it out."""

    @property
    def whole(self) -> str:
        """Text and aside."""
        return f"{self.text}\n{self.aside}" if self.aside else self.text

    def __repr__(self) -> str:
        return f"Turn({self.role}, {len(self.text)} characters)"


@dataclass(frozen=True, slots=True)
class PromptView:
    """One prompt of a request, by turns."""

    turns: tuple[Turn, ...] = field(repr=False)
    view: Literal["messages", "rendered"]
    """`rendered`: the text is the engine's input itself and counts as one user turn."""

    def texts(self, *, all_roles: bool = False) -> list[tuple[Stage, str]]:
        """What guards judge, in the prompt's order: `input` for user turns, `tool`, `retrieved` for documents.

        With `all_roles` also system and assistant text, as `input`.
        """
        return [
            (_STAGES.get(turn.role, "input"), turn.whole)
            for turn in self.turns
            if turn.whole and (all_roles or turn.role in _STAGES)
        ]

    @property
    def system(self) -> str:
        """All system text, NFC."""
        return _joined([turn.text for turn in self.turns if turn.role == "system"])

    @property
    def prompt(self) -> str:
        """The last user turn's text: what is to be done."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def new(self) -> str:
        """What is new in this request, NFC: the last user turn, tool and retrieved text after it, documents.

        Messages of the user with nothing between them are one turn. Without a user turn: all tool and retrieved text.
        """
        last = len(self.turns) - 1
        while last > 0 and self.turns[last].role != "user":
            last -= 1
        while last > 0 and self.turns[last - 1].role == "user":
            last -= 1
        return _joined(
            [
                turn.text
                for place, turn in enumerate(self.turns)
                if turn.role == "document" or (place >= last and turn.role in _STAGES)
            ]
        )

    def within(self, rendered: str) -> bool:
        """Whether `rendered` is this prompt as a template puts it: every line that guards judged, turns in order."""
        if self.view == "rendered":
            return self.turns[0].text == rendered
        place = 0
        for turn in self.turns:
            if turn.role not in _STAGES:
                continue  # templates may rewrite system text, and leave out what assistants thought
            start = 0 if turn.role == "document" else place
            for line in map(str.strip, turn.text.splitlines()):
                found = _find(rendered, line, start)
                if found < 0:
                    return False
                start = found + len(line)
            if turn.role != "document":  # templates put documents where they like
                place = start
        return True


def _find(text: str, line: str, start: int) -> int:
    """`text.find(line, start)`, much faster for a long line where its beginning stands once, as is usual."""
    at = text.find(line[:_BEGINNING], start)
    return at if at < 0 or text.startswith(line, at) else text.find(line, at)


def rendered_view(text: str) -> PromptView:
    """The view where only the engine's input is at hand."""
    return PromptView((Turn("user", text),), "rendered")


def views(operation: str, body: Body) -> tuple[PromptView, ...]:
    """One view for each prompt in the body, in order; none where its shape is not known or it holds token ids.

    Raises `TooDeep`: what is not read can't be judged.
    """
    if operation == "invocation":
        operation = next((name for key, name in _INVOCATIONS.items() if key in body), "")
    reader = _READERS.get(operation)
    found = tuple(reader(body)) if reader is not None else ()
    return found if len(found) <= VIEWS_MAX else ()


def _joined(texts: Sequence[str]) -> str:
    return unicodedata.normalize("NFC", "\n".join(texts))


def _chat(body: Body) -> Iterator[PromptView]:
    messages = body.get("messages")
    if not isinstance(messages, Sequence) or not messages or isinstance(messages, str):
        return
    several = isinstance(messages[0], list) and all(isinstance(entry, list) for entry in messages)
    framed = not _FRAME.isdisjoint(body)
    for conversation in messages if several else [messages]:
        turns = [turn for message in conversation for turn in _message(message)]
        if framed:
            turns = [*_tools(body), *_documents(body.get("documents")), *turns, *_template_arguments(body)]
        yield PromptView(tuple(turns), "messages")


def _completion(body: Body) -> Iterator[PromptView]:
    yield from _plain(body.get("prompt"))


def _embedding(body: Body) -> Iterator[PromptView]:
    yield from _chat(body) if "messages" in body else _plain(body.get("input"))


def _plain(prompt: object) -> Iterator[PromptView]:
    """A text, or several; token ids are for the engine plugin to read."""
    if isinstance(prompt, str):
        yield rendered_view(prompt)
    elif isinstance(prompt, list) and all(isinstance(entry, str) for entry in prompt):
        yield from (rendered_view(entry) for entry in prompt)


def _responses(body: Body) -> Iterator[PromptView]:
    items = body.get("input")
    turns = [Turn("user", items)] if isinstance(items, str) else []
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict) and str(item.get("type", "message")).endswith("_output"):
            turns.append(Turn("tool", _text(item.get("output"))))
        else:
            turns += _message(item)
    instructions = [Turn("system", _text(body["instructions"]))] if body.get("instructions") else []
    if turns:
        yield PromptView((*_tools(body), *instructions, *turns), "messages")


def _messages(body: Body) -> Iterator[PromptView]:
    system = [Turn("system", _text(body["system"]))] if body.get("system") else []
    entries = body.get("messages")
    turns = [turn for entry in entries for turn in _message(entry)] if isinstance(entries, list) else []
    if turns:
        yield PromptView((*_tools(body), *system, *turns), "messages")


_READERS: Final[Mapping[str, Callable[[Body], Iterator[PromptView]]]] = {
    "chat": _chat,
    "completion": _completion,
    "responses": _responses,
    "messages": _messages,
    "embedding": _embedding,
    "pooling": _embedding,
    "classify": _embedding,
}
_INVOCATIONS: Final[Mapping[str, str]] = {"messages": "chat", "prompt": "completion", "input": "embedding"}


def _message(message: object) -> Iterator[Turn]:
    """A message's turns: its own text, and apart from it what tools and documents said within."""
    if not isinstance(message, dict):
        yield Turn("user", _text(message))
        return
    role = _ROLES.get(str(message.get("role", "user")), "user")
    content = message.get("content")
    if isinstance(content, str) and message.keys() == _PLAIN:
        yield Turn(role, content)
        return
    parts = content if isinstance(content, list) else [content]
    own = [text for part in parts if _part_role(part, role) == role and (text := _text(part))]
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "documents")}
    inner = [(other, part) for part in parts if (other := _part_role(part, role)) != role]
    turn = Turn(role, "\n".join(own), _text(rest))
    if turn.whole or not inner:  # a message of tool results alone is no turn of the user's
        yield turn
    for other, part in inner:
        yield Turn(other, _text(part))
    yield from _documents(message.get("documents"))


def _part_role(part: object, role: Role) -> Role:
    """Whose words a part of a message is: tool results and documents come inside the messages of users."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("tool_result", "function_call_output"):
        return "tool"
    return "document" if kind in ("document", "search_result") else role


def _documents(documents: object) -> Iterator[Turn]:
    for document in documents if isinstance(documents, list) else []:
        yield Turn("document", _text(document))


def _tools(body: Body) -> Iterator[Turn]:
    """What tools say of themselves: set by who built the application, as system text is."""
    text = "\n".join(_strings([body.get("tools"), body.get("functions"), body.get("chat_template")], 0))
    if text:
        yield Turn("system", text)


def _template_arguments(body: Body) -> Iterator[Turn]:
    """Texts that a template may put into the prompt by itself."""
    arguments = body.get("chat_template_kwargs")
    if isinstance(arguments, dict):
        yield from _documents(arguments.get("documents"))
        text = "\n".join(_strings({k: v for k, v in arguments.items() if k != "documents"}, 0))
        if text:
            yield Turn("system", text)


def _text(value: object) -> str:
    """The text of a message, a part or a document."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if str(value.get("type")) in _OPAQUE:
            return ""
        value = [entry for key, entry in value.items() if key not in _NO_TEXT and key not in _OPAQUE]
    return "\n".join(_strings(value, 0))


def _strings(value: object, depth: int) -> Iterator[str]:
    """Every string within, but for names of types."""
    if depth > DEPTH_MAX:
        raise TooDeep
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key != "type":
                yield from _strings(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry, depth + 1)


def text_of(value: object) -> str:
    """The text of a message's content, a part or a document, as guards are given it. Raises `TooDeep`."""
    return _text(value)


def strings(value: object) -> Iterator[str]:
    """Every string in a parsed value, but for names of types and of fields. Raises `TooDeep`."""
    return _strings(value, 0)
