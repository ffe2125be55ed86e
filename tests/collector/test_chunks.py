"""What somebody else wrote into a request: found, judged as such, and taken out where policy says so."""

import copy
import json
import random
from typing import Any

import pytest

from collector.chunks import REMOVED, chunks, spans, take_out
from collector.guards.config import GuardsConfig
from collector.guards.stack import GuardStack
from collector.routes import GateConfig
from tests.collector.gating import CHAT, Site, Watch

MARKS = (("<document>", "</document>"), ("```context", "```"))
ASK = {"role": "user", "content": "What do they say?"}
BAD, GOOD = "an attack of words", "the museum opens at nine"
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
FENCED = f"Read: <document>{GOOD}</document> and <document>{BAD}</document> Now answer."


def tool(text: Any) -> dict[str, Any]:
    """A tool's message."""
    return {"role": "tool", "tool_call_id": "c", "content": text}


BODIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "documents": (
        "chat",
        {"messages": [ASK], "documents": [{"text": GOOD}, {"title": "t", "text": BAD}]},
        {"messages": [ASK], "documents": [{"text": GOOD}]},
    ),
    "what a document calls its fields": (
        "chat",
        {"messages": [ASK], "documents": [{"text": GOOD}, {BAD: "t"}, {"type": "image", "image": BAD}]},
        {"messages": [ASK], "documents": [{"text": GOOD}]},
    ),
    "a template's documents": (
        "chat",
        {"messages": [ASK], "chat_template_kwargs": {"documents": [BAD, GOOD]}},
        {"messages": [ASK], "chat_template_kwargs": {"documents": [GOOD]}},
    ),
    "tool output": (
        "chat",
        {"messages": [ASK, CALL, tool(BAD), tool([{"type": "text", "text": GOOD}])]},
        {"messages": [ASK, CALL, tool(REMOVED), tool([{"type": "text", "text": GOOD}])]},
    ),
    "marked spans": (
        "chat",
        {"messages": [{"role": "user", "content": FENCED}]},
        {
            "messages": [
                {"role": "user", "content": f"Read: <document>{GOOD}</document> and {REMOVED} Now answer."},
            ]
        },
    ),
    "marked in the system prompt": (
        "chat",
        {"messages": [{"role": "system", "content": f"Help.\n```context\n{BAD}\n```"}, ASK]},
        {"messages": [{"role": "system", "content": f"Help.\n{REMOVED}"}, ASK]},
    ),
    "a part of a message": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": BAD}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": REMOVED}]}]},
    ),
    "a document within a message": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "document", "text": BAD}, {"type": "text", "text": "q"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": REMOVED}, {"type": "text", "text": "q"}]}]},
    ),
    "responses": (
        "responses",
        {"input": [ASK, {"type": "function_call_output", "call_id": "c", "output": BAD}]},
        {"input": [ASK, {"type": "function_call_output", "call_id": "c", "output": REMOVED}]},
    ),
    "several prompts": (
        "completion",
        {"prompt": [f"<document>{BAD}</document> why?", "no more"]},
        {"prompt": [f"{REMOVED} why?", "no more"]},
    ),
    "a batch of chats": (
        "chat",
        {"messages": [[ASK], [ASK, CALL, tool(BAD)]]},
        {"messages": [[ASK], [ASK, CALL, tool(REMOVED)]]},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_chunk_is_taken_out_and_the_rest_stays_as_it_was(name: str) -> None:
    """Wherever it stands; nothing but the chunk is another."""
    operation, body, without = copy.deepcopy(BODIES[name])
    take_out(chunk for chunk in chunks(operation, body, MARKS) if "attack" in chunk.text)
    assert body == without


@pytest.mark.parametrize("operation", ["embedding", "rerank", "score", "classify", "pooling"])
def test_what_is_asked_about_is_no_chunk(operation: str) -> None:
    """Documents that are ranked or embedded are the question itself."""
    assert chunks(operation, {"query": "q", "documents": [BAD], "input": f"<document>{BAD}</document>"}, MARKS) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("none", []),
        ("<document>a</document>", ["<document>a</document>"]),
        ("q <document>never closed", ["<document>never closed"]),
        ("<document>a</document>e<document>b</document>", ["<document>a</document>", "e", "<document>b</document>"]),
        ("<document>a</document> evil </document> q", ["<document>a</document>", " evil </document>"]),
        ("```context\na\n``` q", ["```context\na\n```"]),
        ("<document>a ```context b</document> c ``` q", ["<document>a ```context b</document> c ```"]),
    ],
)  # fmt: skip
def test_a_document_can_not_get_out_of_its_marks(text: str, found: list[str]) -> None:
    """A closing mark within a document does not make the rest of it the application's own words."""
    assert [text[start:end] for start, end in spans(text, MARKS)] == found


def test_all_marked_spans_can_go_in_any_order() -> None:
    """Whatever is taken out first, the others are still where they were."""
    for seed in range(50):
        draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
        words = [draw.choice(["x", "<document>", "</document>", "```context", "```", "attack", " "]) for _ in range(30)]
        text = "".join(words)
        body = {"prompt": text}
        found = chunks("completion", body, MARKS)
        draw.shuffle(found)
        assert all(chunk.text in text for chunk in found)
        take_out(found)
        places, rest, at = spans(text, MARKS), "", 0
        for start, end in places:
            assert start >= at
            rest, at = f"{rest}{text[at:start]}{REMOVED}", end
        assert body["prompt"] == rest + text[at:], f"seed {seed}"


def test_each_text_is_written_once() -> None:
    """However many spans go: to write it for each is quadratic."""

    class Counted(dict[str, Any]):
        """A body that counts how often it is written to."""

        written = 0

        def __setitem__(self, key: str, value: Any) -> None:
            self.written += 1
            super().__setitem__(key, value)

    body = Counted(prompt=f"<document>{BAD}</document> and " * 200)
    found = chunks("completion", body, MARKS)
    assert len(found) > 200
    take_out(found)
    assert body.written == 1


def site(**policy: Any) -> Site:
    """A gate whose guard enforces at each stage, with this policy."""
    made = Site(GateConfig(markers=MARKS))
    own = {"stages": sorted(Watch.stages), "shadow_stages": [], **policy}
    config = GuardsConfig.model_validate({"order": ["secrets"], "secrets": own})
    made.auditor.guards = GuardStack(config, guards={"secrets": Watch()})
    return made


@pytest.mark.parametrize("name", ["documents", "tool output", "marked spans"])
async def test_the_app_gets_the_request_without_its_poisoned_chunks(name: str) -> None:
    """The rest goes on; the event has the count and the verdict, and hashes of what the engine sees."""
    _, body, without = BODIES[name]
    made = site(poisoned="drop")
    answer = await made.send("POST", CHAT, json={"model": "m", **body})
    (at_hand,) = made.app.exchanges
    assert (answer.status_code, json.loads(made.app.bodies[0])) == (200, {"model": "m", **without})
    assert at_hand.chunks_removed == 1
    stage = "tool" if name == "tool output" else "retrieved"
    assert [(r.stage, r.decision) for r in at_hand.chunk_verdicts] == [(stage, "block")]
    clean = site()
    await clean.send("POST", CHAT, json={"model": "m", **without})
    (judged,), (alike,) = at_hand.prompts, clean.app.exchanges[0].prompts
    assert (judged.blocked, judged.view) == (False, alike.view)


async def test_without_the_policy_a_poisoned_chunk_is_judged_and_the_body_is_untouched() -> None:
    """By default the request is blocked as a whole, byte for byte as it came."""
    for policy, blocked in (({}, True), ({"shadow_stages": ["retrieved", "tool"]}, False)):
        made = site(**policy)
        body = {"messages": [ASK], "documents": [{"text": BAD}]}
        raw = json.dumps(body, indent=3).encode()
        await made.send("POST", CHAT, content=raw)
        (at_hand,) = made.app.exchanges
        assert (made.app.bodies, at_hand.chunks_removed) == ([raw], 0)
        assert at_hand.prompts[0].blocked is blocked


async def test_a_guard_that_only_watches_takes_nothing_out() -> None:
    """Fetched text is watched by default; `drop` changes nothing there."""
    made = site(poisoned="drop", shadow_stages=["retrieved", "tool"])
    body = {"messages": [ASK], "documents": [{"text": BAD}]}
    await made.send("POST", CHAT, json=body)
    (at_hand,) = made.app.exchanges
    assert (json.loads(made.app.bodies[0]), at_hand.chunks_removed) == (body, 0)
    assert [r.decision for r in at_hand.prompts[0].verdicts if r.stage == "retrieved"] == ["shadow"]


async def test_an_attack_in_the_users_own_words_is_blocked_whatever_they_mark() -> None:
    """Marks are no way round the guard of input, nor does taking out make a request pass that is bad without them."""
    made = site(poisoned="drop")
    body = {"messages": [{"role": "user", "content": f"attack <document>{BAD}</document>"}]}
    await made.send("POST", CHAT, json=body)
    (at_hand,) = made.app.exchanges
    assert (at_hand.chunks_removed, at_hand.prompts[0].blocked) == (1, True)
    watched = site(shadow_stages=["retrieved", "tool"])
    await watched.send("POST", CHAT, json={"messages": [{"role": "user", "content": f"<document>{BAD}</document>"}]})
    assert watched.app.exchanges[0].prompts[0].blocked
