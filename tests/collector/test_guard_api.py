"""`POST /v1/guard`: what a pipeline learns of its chunks, who may ask, and what the audit keeps of it."""

from typing import Any

import httpx
import pytest

from collector.event import GuardResult
from collector.guard_api import TEXTS_MAX
from collector.identity import Pseudonyms
from collector.routes import GateConfig
from tests.collector.gating import Site
from tests.collector.proxying import Front, fronting, running

CANARY = "canary-5150 attack at dawn"


def verdict(decision: str, score: float, label: str = "") -> dict[str, Any]:
    """Of the test's guard, as the answer has it."""
    return {"guard": "secrets", "version": "test", "decision": decision, "score": score, "label": label, "error": ""}


async def ask(site: Site, body: object, **options: Any) -> httpx.Response:
    """One call."""
    return await site.send("POST", "/v1/guard", json=body, **options)


async def test_each_chunk_gets_its_own_verdict_and_the_call_one_event(site: Site) -> None:
    """The poisoned one is told apart; the event has the worst verdict of each stage, and a digest to look up."""
    answer = await ask(
        site,
        {
            "texts": ["The museum opens at nine.", {"text": CANARY, "id": "doc-7"}, {"text": "2 + 2", "stage": "tool"}],
            "prompt": "When does it open?",
        },
    )
    assert answer.status_code == 200
    told = answer.json()
    (event,) = site.publisher.rejections
    assert told == {
        "id": event["http_request_id"],
        "blocked": True,
        "texts": [
            {"stage": "retrieved", "decision": "allow", "verdicts": [verdict("allow", 0.1)]},
            {"id": "doc-7", "stage": "retrieved", "decision": "block", "verdicts": [verdict("block", 0.9, "attack")]},
            {"stage": "tool", "decision": "allow", "verdicts": [verdict("allow", 0.1)]},
        ],
    }
    assert answer.headers["inferwatch-request-id"] == event["http_request_id"]
    results: list[GuardResult] = event["guardrail_results"]
    assert [(each.stage, each.decision, each.label) for each in results] == [
        ("retrieved", "block", "attack"),
        ("tool", "allow", ""),
    ]
    joined = f"The museum opens at nine.\n{CANARY}\n2 + 2"
    assert (event["status"], event["reason"], event["http_status"]) == ("ok", "guard_api", 200)
    assert event["blocked"] is True
    assert (event["route"], event["operation"]) == ("POST /v1/guard", "guard")
    assert event["prompt_hash"] == Pseudonyms(bytes(range(32))).digest(joined)
    assert event["user_id"].startswith("u_")
    assert "canary" not in answer.text + repr(event)
    assert site.app.bodies == []


async def test_what_no_guard_is_for_is_said_to_be_unjudged(site: Site) -> None:
    """Silence is not taken for consent."""
    told = (await ask(site, {"texts": [{"text": "hello", "stage": "output"}]})).json()
    assert told["texts"] == [{"stage": "output", "decision": "unjudged", "verdicts": []}]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"texts": []},
        {"texts": "attack"},
        {"texts": ["x"] * (TEXTS_MAX + 1)},
        {"texts": [{"text": 7}]},
        {"texts": [{"text": CANARY, "stage": CANARY}]},
        {"texts": [{"text": CANARY, CANARY: 1}]},
        {"texts": [CANARY], CANARY: 1},
        {"texts": [CANARY], "prompt": [CANARY]},
        {"texts": [{"text": "x", "id": "i" * 129}]},
        [CANARY],
    ],
)
async def test_a_call_of_another_shape_is_refused_without_a_quote(site: Site, body: object) -> None:
    """400 and one sentence; the refusal has its event."""
    answer = await ask(site, body)
    assert answer.status_code == 400
    assert "canary" not in answer.text
    ((_, status),) = site.reasons
    assert status == 400


async def test_nobody_asks_without_a_key(site: Site) -> None:
    """401, by any method, and the rejection is written."""
    assert (await ask(site, {"texts": ["x"]}, key=None)).status_code == 401
    assert (await site.send("GET", "/v1/guard")).status_code == 404
    assert [status for _, status in site.reasons] == [401, 404]


async def test_where_no_event_can_be_written_nothing_is_told(site: Site) -> None:
    """503, and no verdict."""
    site.publisher.full = True
    answer = await ask(site, {"texts": [CANARY]})
    assert (answer.status_code, "verdicts" in answer.text) == (503, False)


async def test_lone_surrogates_and_a_large_body_are_judged() -> None:
    """A chunk is what a page holds, not what is proper."""
    site = Site(GateConfig())
    raw = b'{"texts": ["\\ud800 attack", {"text": "' + b"a" * 500_000 + b'", "id": "\\udfff"}]}'
    answer = await site.send("POST", "/v1/guard", content=raw)
    assert [text["decision"] for text in answer.json()["texts"]] == ["block", "allow"]
    too_large = await site.send("POST", "/v1/guard", content=b"{" + b" " * 2_000_000)
    assert too_large.status_code == 413


def callback(front: Front, chunks: list[str]) -> list[str]:
    """What docs/guards.md has a pipeline do: only chunks that nobody objects to go on."""
    answer = httpx.post(
        f"{front.url}/v1/guard", headers=front.headers, json={"texts": chunks, "prompt": "What does the mail say?"}
    )
    told = answer.raise_for_status().json()["texts"]
    return [chunk for chunk, text in zip(chunks, told, strict=True) if text["decision"] == "allow"]


def test_a_pipeline_behind_the_proxy_drops_the_poisoned_chunk() -> None:
    """The real proxy answers itself: the server behind hears nothing of it."""
    seen = []

    async def upstream(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"data":[]}'})

    with running(upstream) as url, fronting(url) as front:
        assert callback(front, ["Lunch is at one.", "blockme now", "See you."]) == ["Lunch is at one.", "See you."]
        (event,) = front.events
    assert (event.status, event.reason, event.blocked) == ("ok", "guard_api", True)
    assert [(each.stage, each.decision) for each in event.guardrail_results] == [("retrieved", "block")]
    assert "/v1/guard" not in seen
