"""Where the engine is given another prompt than the gate has read: what the gate said holds all the same."""

from typing import Any

import pytest

from collector.audit import Blocked, EngineRequest
from collector.auditor import Auditor
from collector.context import Claim, Exchange, exchange
from collector.guards.policy import RoutePolicy
from collector.guards.secrets import SecretsConfig
from collector.routes import GateConfig
from tests.collector.gating import CHAT, Site, Watch

OTHER = "what a template made of it"


async def asked(site: Site, path: str, body: dict[str, Any]) -> Exchange:
    """What the gate tells the engine plugin of one request that makes no engine request itself."""
    site.app.engine_requests = 0
    await site.send("POST", path, json=body)
    at_hand: Exchange = site.app.exchanges[-1]
    at_hand.lease = None
    return at_hand


def opened(auditor: Auditor, at_hand: Exchange, *texts: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each engine request whether it went on, and the decisions that its event has, by stage."""
    token = exchange.set(at_hand)
    found = []
    try:
        for text in texts:
            request, claim = EngineRequest("generate", text), auditor.claim(text)
            judged = auditor.judged(text, claim)
            try:
                auditor.open(request, judged)
                went = "on"
            except Blocked:
                went = "blocked"
            found.append((went, [(verdict.stage, verdict.decision) for verdict in judged.verdicts]))
    finally:
        exchange.reset(token)
    return found


def said(*turns: tuple[str, str]) -> dict[str, Any]:
    """A chat."""
    return {"model": "m", "messages": [{"role": role, "content": text} for role, text in turns]}


async def test_what_the_gate_blocks_stays_blocked_however_the_engine_is_given_it() -> None:
    """A template that rewrites the prompt, or leaves out what was sent beside it, takes no verdict away."""
    site = Site(GateConfig())
    at_hand = await asked(site, CHAT, said(("user", "an attack")))
    assert opened(site.auditor, at_hand, OTHER) == [("blocked", [("input", "block")])]


async def test_what_the_engine_is_given_beyond_the_gates_prompts_is_blocked_with_any_of_them() -> None:
    """It can't be told which of them it is."""
    site = Site(GateConfig())
    at_hand = await asked(site, "/v1/completions", {"prompt": ["fine", "an attack"]})
    assert opened(site.auditor, at_hand, "fine", "an attack", OTHER) == [
        ("on", [("input", "allow")]),
        ("blocked", [("input", "block")]),
        ("blocked", [("input", "block")]),
    ]


async def test_what_the_engine_is_given_instead_is_judged_too() -> None:
    """Harmless words at the gate, an attack in what the engine is given."""
    site = Site(GateConfig())
    at_hand = await asked(site, CHAT, said(("user", "hello")))
    assert opened(site.auditor, at_hand, "help with an attack") == [("blocked", [("input", "block")])]


async def test_verdicts_of_both_stand_in_the_event_and_the_gates_digests_and_context() -> None:
    """Near duplicates and answers are about what was asked, not about how it was rendered."""
    site = Site(GateConfig())
    at_hand = await asked(site, CHAT, said(("system", "be kind"), ("tool", "attack"), ("user", "hello")))
    ours = at_hand.prompts[0]
    token = exchange.set(at_hand)
    judged = site.auditor.judged(OTHER, Claim(ours, fits=False))
    exchange.reset(token)
    assert [(each.stage, each.decision) for each in judged.verdicts] == [("tool", "block"), ("input", "allow")]
    assert (judged.digests, judged.context, judged.view.view) == (ours.digests, ours.context, "rendered")
    assert judged.context.system == "be kind"


@pytest.mark.parametrize(
    ("path", "went", "decision"), [(CHAT, "blocked", "block"), ("/v1/completions", "on", "shadow")]
)
async def test_token_ids_are_judged_by_the_policy_of_their_route(path: str, went: str, decision: str) -> None:
    """The gate can't read them; what the engine is given is judged as the route's texts are."""
    watched = {"POST /v1/completions": RoutePolicy(mode="shadow")}
    site = Site(GateConfig(), policy=SecretsConfig(stages=frozenset(Watch.stages), routes=watched))
    at_hand = await asked(site, path, {"prompt": [1, 2, 3]})
    assert opened(site.auditor, at_hand, "an attack") == [(went, [("input", decision)])]
