"""The PromptView: what bodies of each API say, by turns, and what guards and hashes get of it."""

import random
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.prompt import PromptView, Turn, _find, rendered_view, views
from collector.prompt_words import TooDeep

SYSTEM = {"role": "system", "content": "be brief"}


def only(operation: str, body: dict[str, object]) -> PromptView:
    """The one view of a body."""
    (view,) = views(operation, body)
    return view


def test_a_chat_is_taken_apart_by_turns() -> None:
    """System text, user turns, tool messages and documents go to their own places."""
    view = only(
        "chat",
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "yes", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "user", "content": [{"type": "text", "text": "second"}, {"type": "text", "text": "part"}]},
                {"role": "tool", "content": "found", "tool_call_id": "x"},
            ],
            "documents": [{"title": "t", "text": "retrieved words"}],
        },
    )
    assert view.texts() == [
        ("retrieved", "t\nretrieved words"),
        ("input", "first"),
        ("input", "second\npart"),
        ("tool", "found\nx"),
    ]
    assert (view.system, view.new) == ("be brief", "t\nretrieved words\nsecond\npart\nfound")
    assert view.view == "messages"


def test_with_all_roles_nothing_of_the_prompt_is_left_unjudged() -> None:
    """System and assistant text is judged as input where keys are in the hands of end users."""
    body: dict[str, object] = {
        "messages": [SYSTEM, {"role": "assistant", "content": "sure"}, {"role": "user", "content": "go"}],
        "tools": [{"type": "function", "function": {"name": "look", "description": "looks things up"}}],
    }
    judged = [text for _, text in only("chat", body).texts(all_roles=True)]
    assert judged == ["look\nlooks things up", "be brief", "sure", "go"]


def test_an_unknown_role_counts_as_the_users() -> None:
    """What is not known to be harmless is judged."""
    body: dict[str, object] = {"messages": [{"role": "oracle", "content": "words"}]}
    assert only("chat", body).texts() == [("input", "words\noracle")]


@pytest.mark.parametrize(
    ("operation", "body", "texts"),
    [
        ("completion", {"prompt": "one"}, ["one"]),
        ("completion", {"prompt": ["one", "two"]}, ["one", "two"]),
        ("completion", {"prompt": [1, 2]}, []),
        ("completion", {"prompt": [[1], [2]]}, []),
        ("completion", {}, []),
        ("embedding", {"input": ["a", "b"]}, ["a", "b"]),
        ("invocation", {"prompt": "one"}, ["one"]),
        ("invocation", {"messages": [{"role": "user", "content": "hi"}]}, ["hi"]),
        ("invocation", {}, []),
        ("tokens", {"token_ids": [1]}, []),
        ("chat", {"messages": "odd"}, []),
        ("chat", {"messages": []}, []),
        ("chat", {"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}, ["a", "b"]),
    ],
)
def test_each_prompt_of_a_body_is_one_view(operation: str, body: dict[str, object], texts: list[str]) -> None:
    """Lists and batches have a view for each prompt; token ids and odd shapes none."""
    assert [text for view in views(operation, body) for _, text in view.texts()] == texts


def test_responses_and_anthropic_messages_are_read() -> None:
    """Instructions are system text, function outputs and tool results are the tools' words."""
    responses = only(
        "responses",
        {
            "instructions": "be brief",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "ask"}]},
                {"type": "function_call_output", "call_id": "c", "output": "42"},
            ],
        },
    )
    messages = only(
        "messages",
        {
            "system": [{"type": "text", "text": "be brief"}],
            "messages": [
                {"role": "user", "content": "ask"},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "42"}]},
            ],
        },
    )
    for view in (responses, messages):
        assert (view.system, view.new) == ("be brief", "ask\n42")
        assert [pair for pair in view.texts() if pair[1]] == [("input", "ask"), ("tool", "42\nc")]


def test_only_the_last_turn_is_new() -> None:
    """The same question has the same new text under any system prompt and after any history."""
    question = {"role": "user", "content": "the question"}
    history = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "an answer"}]
    bodies: list[dict[str, object]] = [
        {"messages": [question]},
        {"messages": [SYSTEM, question]},
        {"messages": [SYSTEM, *history, question]},
    ]
    assert {only("chat", body).new for body in bodies} == {"the question"}


def test_new_text_is_in_nfc() -> None:
    """Composed and decomposed spellings are one text for the hashes; guards get the text as it came."""
    text = "cafe\u0301"
    view = rendered_view(text)
    assert view.new == unicodedata.normalize("NFC", text) != text
    assert view.texts() == [("input", text)]


def test_a_view_knows_its_own_rendered_prompt() -> None:
    """The gate's verdict counts only for the prompt that it was given on."""
    view = only("chat", {"messages": [SYSTEM, {"role": "user", "content": " first\n second "}]})
    assert view.within("<s>be brief</s><u>first\n second</u>")
    assert not view.within("<s>be brief</s><u>something else</u>")
    assert not view.within("<u>second first</u>")
    assert rendered_view("plain").within("plain")
    assert not rendered_view("plain").within("plain and more")


def test_text_in_odd_places_is_found() -> None:
    """A name, reasoning or an unknown field of a message, and any depth of a document, is judged."""
    deep: object = "hidden"
    for _ in range(10):
        deep = {"k": [deep]}
    body: dict[str, object] = {
        "messages": [{"role": "user", "content": "hi", "name": "sly", "extra": {"id": "odd"}}],
        "documents": [{"text": deep, "id": "n"}],
    }
    texts = " ".join(text for _, text in only("chat", body).texts())
    assert all(word in texts for word in ("hi", "sly", "odd", "hidden"))


ASK = {"role": "user", "content": "hi"}
ATTACK = "ATTACK"
TURNED_AWAY: dict[str, tuple[str, dict[str, object]]] = {
    "the id of a tool's answer": (
        "chat",
        {"messages": [ASK, {"role": "tool", "content": "4", "tool_call_id": ATTACK}]},
    ),
    "the id of an output": (
        "responses",
        {"input": [ASK, {"type": "function_call_output", "call_id": ATTACK, "output": "4"}]},
    ),
    "another field of an output": (
        "responses",
        {"input": [ASK, {"type": "custom_output", "output": "4", "content": ATTACK}]},
    ),
    "the id of a result": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": ATTACK, "content": "4"}]}]},
    ),
    "the id of a message of results": (
        "messages",
        {"messages": [{"role": "user", "id": ATTACK, "content": [{"type": "tool_result", "content": "4"}]}]},
    ),
    "a status of a text": ("chat", {"messages": [{"role": "user", "content": [{"text": "hi", "status": ATTACK}]}]}),
    "an image of a text": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "image": ATTACK}]}]},
    ),
    "an unknown type of a part": ("chat", {"messages": [{"role": "user", "content": [{"type": ATTACK}]}]}),
    "an unknown role": ("chat", {"messages": [{"role": ATTACK, "content": "hi"}]}),
    **{
        f"a document's {name}": ("chat", {"messages": [ASK], "documents": [{"text": "d", name: ATTACK}]})
        for name in ("id", "status", "type", "image", "image_url")
    },
    "a document's caching": (
        "chat",
        {"messages": [ASK], "documents": [{"text": "d", "cache_control": {"type": "ephemeral", "ttl": ATTACK}}]},
    ),
    "an image for a document": ("chat", {"messages": [ASK], "documents": [{"type": "image", "text": ATTACK}]}),
    "a document's key": ("chat", {"messages": [ASK], "documents": [{ATTACK: "ok"}]}),
    "a key deep in a document": ("chat", {"messages": [ASK], "documents": [{"text": [{"k": {ATTACK: 1}}]}]}),
    "documents that are no list": ("chat", {"messages": [ASK], "chat_template_kwargs": {"documents": ATTACK}}),
    "an earlier message": (
        "responses",
        {"previous_input_messages": [{"role": "user", "content": ATTACK}], "input": "hi"},
    ),
    "an earlier message of Harmony's": (
        "responses",
        {
            "previous_input_messages": [
                {"author": {"role": "tool", "name": "f"}, "content": [{"type": "text", "text": ATTACK}]}
            ],
            "input": "hi",
        },
    ),
}


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_what_a_template_may_print_is_judged(name: str) -> None:
    """Ids, names of fields and types, media that are words: vLLM hands them to the template."""
    operation, body = TURNED_AWAY[name]
    assert any(ATTACK in text for _, text in only(operation, body).texts())


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function", "function": {"parameters": {"properties": {ATTACK: {"type": "string"}}}}}]},
        {"tools": [{"type": "function", "function": {"parameters": {"properties": {"a": {"type": ATTACK}}}}}]},
        {"tools": [{"type": "function", "function": {"parameters": {"properties": {"a": {"type": [ATTACK]}}}}}]},
        {"tool_choice": {"type": "function", "function": {"name": ATTACK}}},
        {"tool_choice": ATTACK},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {ATTACK: {}}}}}},
        {"chat_template_kwargs": {"custom": {ATTACK: True}}},
    ],
)
def test_with_all_roles_what_tools_and_forms_are_called_is_judged(body: dict[str, object]) -> None:
    """Templates print tools as JSON; one renderer of vLLM's hands on form and choice. None of it is the system prompt's
    words."""
    view = only("chat", {"messages": [SYSTEM, ASK], **body})
    assert any(ATTACK in text for _, text in view.texts(all_roles=True))
    assert view.system == "be brief"


def test_the_ids_of_a_users_message_are_judged_apart() -> None:
    """With a random id beside it a short text would be taken for an attack; both are judged all the same."""
    call = {"type": "function_call", "call_id": "call_ds82s1t6Uzpa2cY7Jk18RFxv", "name": "f", "arguments": "{}"}
    view = only("responses", {"input": [ASK, {**call, "status": "completed"}]})
    assert view.texts() == [
        ("input", "hi"),
        ("input", "\nf\n{}"),
        ("tool", "call_ds82s1t6Uzpa2cY7Jk18RFxv"),
    ]


def test_names_that_every_api_has_are_not_judged() -> None:
    """A request that uses all that is usual shows guards its words alone."""
    body: dict[str, object] = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
            {"role": "tool", "content": [{"type": "text", "text": "found"}]},
        ],
        "documents": [{"title": "t", "text": "words", "type": "document"}],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look",
                    "parameters": {"type": "object", "properties": {"name": {"type": ["string", "null"]}}},
                },
            }
        ],
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
    }
    judged = [text for _, text in only("chat", body).texts(all_roles=True)]
    assert judged == ["look", "t\nwords", "hi", "found"]


def test_what_is_nested_too_deeply_is_not_skipped_but_refused() -> None:
    """Text below 32 levels would be unread, so it is an error."""
    deep: object = "hidden"
    for _ in range(40):
        deep = [deep]
    with pytest.raises(TooDeep):
        views("chat", {"messages": [{"role": "user", "content": "hi"}], "documents": [deep]})


def test_images_are_no_text() -> None:
    """An image's data is not for text guards, the text beside it is."""
    body: dict[str, object] = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                ],
            }
        ]
    }
    assert only("chat", body).texts() == [("input", "look")]


def test_no_text_shows_in_a_repr() -> None:
    """Views and turns can be logged by accident without harm."""
    view = only("chat", {"messages": [{"role": "user", "content": "canary"}]})
    assert "canary" not in repr(view) + repr(Turn("user", "canary")) + str(view.turns)


def test_no_shape_of_body_breaks_the_reader() -> None:
    """Random JSON under the names that the reader knows gives views or none, and never another error than TooDeep."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
    names = ["messages", "prompt", "input", "content", "role", "type", "documents", "text", "tools", "output", "system"]
    names += ["previous_input_messages", "tool_choice", "response_format", "author", "id"]

    def value(depth: int) -> object:
        kind = draw.randrange(7 if depth < 4 else 5)
        if kind == 5:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        if kind == 6:
            return {draw.choice(names): value(depth + 1) for _ in range(draw.randrange(4))}
        return [None, True, 3, "word", draw.choice(["user", "tool", "text", "tool_result"])][kind]

    for _ in range(3000):
        body = {name: value(0) for name in draw.sample(names, 4)}
        for operation in ("chat", "completion", "responses", "messages", "embedding", "invocation"):
            for view in views(operation, body):
                assert isinstance(view.new + view.system, str)
                assert all(isinstance(text, str) for _, text in view.texts(all_roles=True))


@given(st.text("ab", max_size=300), st.text("ab", max_size=100), st.integers(0, 60))
def test_a_long_line_is_found_where_it_stands_first(text: str, line: str, start: int) -> None:
    """Also where its beginning stands earlier, without the rest."""
    inside = text[start : start + 90] or line
    assert [_find(text, each, start) for each in (line, inside)] == [text.find(each, start) for each in (line, inside)]


class Scanned(str):  # noqa: SLOT000 - it counts
    """A text that counts the characters that are looked through in it."""

    count = 0

    def find(self, sub: str, start: Any = 0, end: Any = None, /) -> int:
        """As of any text."""
        found = super().find(sub, start, end)
        self.count += (len(self) if found < 0 else found) - start + len(sub)
        return found


def test_many_documents_are_found_in_one_pass() -> None:
    """Looked for from the beginning each, 4,000 in a megabyte would hold the server's event loop for a second."""
    lines = [[f"z{document * 60 + line}" for line in range(40)] for document in range(500)]
    body = {"documents": ["\n".join(each) for each in lines], "messages": [{"role": "user", "content": "q"}]}
    (view,) = views("chat", body)
    rendered = Scanned("\n".join("\n".join(each) for each in lines) + "\nq")
    assert view.within(rendered)
    assert rendered.count < 3 * len(rendered)
    assert view.within("\n".join("\n".join(each) for each in reversed(lines)) + "\nq")
    assert not view.within("\n".join("\n".join(each) for each in lines[1:]) + "\nq")
