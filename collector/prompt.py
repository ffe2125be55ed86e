"""The PromptView: what a request's body says, apart from how it will be rendered for the model.

Pure: a parsed body in, views out, one for each prompt in the body. A body of a shape not known here gives no view; then
the engine plugin judges and hashes the rendered prompt instead, so that nothing passes unread. Views hold text and live
in memory only, for the time of one request; their repr shows none of it.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from collector import prompt_words as words
from collector.event import Stage

Body = Mapping[str, object]
Role = Literal["system", "user", "assistant", "tool", "document"]

TURNS_MAX: Final = 4096
"""Messages, prompts and documents of one request; each is judged by itself, which takes a millisecond and more, and
each prompt has its event.
"""
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
_FRAME: Final = frozenset(
    {"tools", "functions", "chat_template", "documents", "chat_template_kwargs"} | {"tool_choice", "response_format"}
)
"""Fields of a body that say something beside its messages."""
_PLAIN: Final = frozenset({"role", "content"})
"""All that most messages have."""


class TooMany(ValueError):
    """A body has more than `TURNS_MAX` messages, prompts, documents or chunks."""


class Turn(NamedTuple):
    """One message's text."""

    role: Role
    text: str
    aside: str = ""
    """What else the message says: a name, tool calls, reasoning. Templates may leave it out."""
    ids: str = ""
    """Ids in a user's message. Beside a short text a random one looks like an attack, so it is judged apart."""

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

        With `all_roles` also system and assistant text, as `input`. Ids belong to calls of tools.
        """
        judged: list[tuple[Stage, str]] = []
        for turn in self.turns:
            if all_roles or turn.role in _STAGES:
                judged.append((_STAGES.get(turn.role, "input"), turn.whole))
                judged.append(("tool", turn.ids))
        return [(stage, text) for stage, text in judged if text]

    @property
    def system(self) -> str:
        """All system text, NFC."""
        return _joined([turn.text for turn in self.turns if turn.role == "system" and turn.text])

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
        place = documents = 0
        for turn in self.turns:
            if turn.role not in _STAGES:
                continue  # templates may rewrite system text, and leave out what assistants thought
            if turn.role != "document":
                place = end = _end(rendered, turn.text, place)
            else:  # templates put documents where they like; one behind the other is the usual, and quickly found
                end = _end(rendered, turn.text, documents)
                documents = end = end if end >= 0 else _end(rendered, turn.text, 0)
            if end < 0:
                return False
        return True


def _end(rendered: str, text: str, start: int) -> int:
    """Where the last line of `text` ends in `rendered`, its lines in order from `start`; -1 where one is not there."""
    for line in filter(None, map(str.strip, text.splitlines())):
        found = _find(rendered, line, start)
        if found < 0:
            return -1
        start = found + len(line)
    return start


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
    return tuple(reader(body)) if reader is not None else ()


def check_lists(body: Body) -> None:
    """Raises `TooMany` for what may be more prompts than a request has, in a list or by names.

    Token ids are one prompt, however many.
    """
    for value in body.values():
        if isinstance(value, list | dict) and len(value) > TURNS_MAX:
            entries = value.values() if isinstance(value, dict) else value
            if not all(isinstance(each, int | float) for each in entries):
                raise TooMany


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
    turns = [turn for message in _list(body.get("previous_input_messages")) for turn in _message(_authored(message))]
    items = body.get("input")
    if isinstance(items, str):
        turns.append(Turn("user", items))
    for item in _list(items):
        if isinstance(item, dict) and str(item.get("type", "message")).endswith("_output"):
            rest = {key: value for key, value in item.items() if key != "output"}
            aside = words.lines(words.text(rest), words.beside(item))
            turns.append(Turn("tool", words.text(item.get("output")), aside))
        else:
            turns += _message(item)
    instructions = [Turn("system", words.text(body["instructions"]))] if body.get("instructions") else []
    if turns:
        yield PromptView((*_tools(body), *instructions, *turns), "messages")


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _authored(message: object) -> object:
    """A message in Harmony's form tells its role in `author`."""
    author = message.get("author") if isinstance(message, dict) else None
    return {**message, "role": author.get("role")} if isinstance(author, dict) else message  # type: ignore[dict-item]


def _messages(body: Body) -> Iterator[PromptView]:
    system = [Turn("system", words.text(body["system"]))] if body.get("system") else []
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
        yield Turn("user", words.text(message))
        return
    named = str(message.get("role", "user"))
    role = _ROLES.get(named, "user")
    content = message.get("content")
    if isinstance(content, str) and named in _ROLES and message.keys() == _PLAIN:
        yield Turn(role, content)
        return
    parts = content if isinstance(content, list) else [content]
    own = [part for part in parts if _part_role(part, role) == role]
    text = "\n".join(text for part in own if (text := words.text(part)))
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "documents")}
    aside = [
        *([] if named in _ROLES else [named]),
        words.text(rest),
        *words.names(rest),
        *(each for part in own for each in words.names(part)),
    ]
    ids = [each for holder in (rest, *own) for each in words.ids(holder)]
    inner = [(other, part) for part in parts if (other := _part_role(part, role)) != role]
    apart = role == "user"
    turn = Turn(role, text, words.lines(*aside, *([] if apart else ids)), words.lines(*(ids if apart else [])))
    if turn.whole or not inner:  # a message of tool results alone is no turn of the user's
        yield turn
        ids = []
    for other, part in inner:
        yield Turn(other, words.text(part), words.lines(words.beside(part), *ids))
    yield from _documents(message.get("documents"))


def _part_role(part: object, role: Role) -> Role:
    """Whose words a part of a message is: tool results and documents come inside the messages of users."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("tool_result", "function_call_output"):
        return "tool"
    return "document" if kind in ("document", "search_result") else role


def _documents(documents: object) -> Iterator[Turn]:
    for document in documents if isinstance(documents, list) else [documents]:
        if document is not None:
            yield Turn("document", words.text(document, document=True), words.beside(document))


def _tools(body: Body) -> Iterator[Turn]:
    """What tools say of themselves: set by who built the application, as system text is."""
    tools = [body.get("tools"), body.get("functions"), body.get("chat_template")]
    forms = [body.get("tool_choice"), body.get("response_format")]
    choice = [form for form in forms if not isinstance(form, str) or form not in words.COMMON]
    turn = Turn("system", words.lines(*words.values(tools)), words.lines(*words.strings(choice), *words.names(tools)))
    if turn.whole:
        yield turn


def _template_arguments(body: Body) -> Iterator[Turn]:
    """Texts that a template may put into the prompt by itself."""
    arguments = body.get("chat_template_kwargs")
    if isinstance(arguments, dict):
        yield from _documents(arguments.get("documents"))
        rest = {key: value for key, value in arguments.items() if key != "documents"}
        if rest:
            yield Turn("system", words.lines(*words.values(rest)), words.lines(*words.names(rest)))
