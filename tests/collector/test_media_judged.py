"""An image on its way in is judged by Llama Guard's endpoint, beside what was asked, before the server sees it."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from collector.guards.config import GuardsConfig
from collector.routes import GateConfig
from tests.collector.gating import CHAT, Site
from tests.collector.guards.judge_server import JudgeServer, serving

PNG = b"\x89PNG\r\n\x1a\n"
GUN, FLOWER = PNG + b"a gun", PNG + b"a flower"


def rule(messages: Sequence[Mapping[str, Any]]) -> str:
    """Llama Guard's answer: an image of a gun is S9, one of a flower is where somebody asks for sarin."""
    (*parts, question) = messages[-1]["content"]
    images = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts]
    return "unsafe\nS9" if GUN in images or "sarin" in question["text"] else "\n\nsafe"


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    """The endpoint."""
    with serving(rule, model="guard") as server:
        yield server


def site_with(judge: JudgeServer, **settings: Any) -> Site:
    """A gate whose media policy is `guard`, with the guard that the config names."""
    policy = {"endpoint": {"url": judge.url, "model": "guard"}, "images": True, **settings}
    site = Site(GateConfig(media="guard"))
    config = GuardsConfig.model_validate({"order": ["llamaguard"], "llamaguard": policy})
    site.auditor._media_guard = config.media_guard()
    return site


def asking(image: bytes, words: str) -> dict[str, Any]:
    """A chat message with an image."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "text", "text": words}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "m", "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(("image", "words"), [(GUN, "what is this?"), (FLOWER, "is there sarin in it?")])
async def test_a_bad_image_is_refused_and_the_event_says_why(judge: JudgeServer, image: bytes, words: str) -> None:
    """403, nothing reaches the server, and the rejection has category, score, decision and digest; no picture."""
    site = site_with(judge)
    answer = await site.send("POST", CHAT, json=asking(image, words))
    assert (answer.status_code, site.app.bodies, site.reasons) == (403, [], [("media", 403)])
    (event,) = site.publisher.rejections
    (verdict,) = event["guardrail_results"]
    assert (verdict.guard, verdict.label, verdict.decision, verdict.error) == ("llamaguard", "S9", "block", "")
    assert verdict.score > 0.9
    assert [(told.kind, told.size_bytes) for told in event["media"]] == [("image", len(image))]
    assert [piece for piece in ("gun", "sarin", "iVBOR") if piece in repr(event)] == []


async def test_a_harmless_image_reaches_the_server_with_its_verdict(judge: JudgeServer) -> None:
    """It was asked once beside the question, and the verdict goes into the request's event."""
    site = site_with(judge)
    before = len(judge.bodies)
    assert (await site.send("POST", CHAT, json=asking(FLOWER, "what is this?"))).status_code == 200
    assert len(judge.bodies) - before == 1
    (exchange,) = site.app.exchanges
    assert [(one.guard, one.decision, one.error) for one in exchange.media_verdicts] == [("llamaguard", "allow", "")]
    assert site.publisher.rejections == []


async def test_an_endpoint_that_fails_lets_no_image_in(judge: JudgeServer) -> None:
    """Its failure is the verdict."""
    site = site_with(judge)
    judge.fault = "500"
    assert (await site.send("POST", CHAT, json=asking(FLOWER, "what is this?"))).status_code == 403
    (verdict,) = site.publisher.rejections[0]["guardrail_results"]
    assert (verdict.decision, verdict.error) == ("error", "EndpointFailed")
