"""The gate under requests made from vLLM's own OpenAPI: whatever they ask, each has its events and none is unwatched.

Long: some minutes on a small machine. `INFERWATCH_FUZZ_EXAMPLES` sets the examples for each operation, 3 by default.
"""

import os
from typing import Any

import pytest

from collector.event import AuditEvent
from collector.routes import VLLM
from tests.engine.conftest import Server

EXAMPLES = int(os.environ.get("INFERWATCH_FUZZ_EXAMPLES", "3"))
SEED = 20_261_129


@pytest.mark.long
def test_every_request_that_the_schema_allows_has_its_events(server: Server) -> None:
    """Engine requests and rejections are the events; answers of audited routes name a request that has one."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings

    before = server.mark()
    counters = server.auditor().publisher.counters
    begun = counters.engine_requests
    answered: set[str] = set()
    sent = gone = 0
    good = {"authorization": f"Bearer {server.site.api_key}"}
    schema = schemathesis.openapi.from_dict(server.app.openapi())

    def ask(case: Any, headers: dict[str, str]) -> None:
        nonlocal sent, gone
        sent += 1
        if isinstance(case.body, dict):
            case.body = {**case.body, **{name: 4 for name in ("max_tokens", "max_output_tokens") if name in case.body}}
        try:
            answer = case.call(base_url=server.url, headers=headers, timeout=3)
        except requests.RequestException:
            gone += 1
            return
        route = VLLM.find(case.method.upper(), case.path)
        harmless = route is not None and route.handling == "harmless" and answer.status_code != 401
        if not harmless and not answer.text.startswith("Invalid HTTP"):  # uvicorn's own refusal: no gate saw it
            answered.update(answer.headers["inferwatch-request-id"])
        if not headers and case.path != "/health":
            assert answer.status_code == 401

    for found in schema.get_all_operations():
        operation = found.ok()

        @seed(SEED)
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def fuzz(case: Any) -> None:
            ask(case, good)

        fuzz()
        settings(max_examples=1, deadline=None, database=None, phases=[Phase.generate])(
            given(case=operation.as_strategy())(lambda case: ask(case, {}))
        )()
    events = server.settled(len(answered), before, timeout_s=30)
    told = {event.http_request_id for event in events}
    print(f"seed {SEED}: {sent} requests, {gone} given up, {len(events)} events")
    assert answered <= told
    assert sum(type(event) is AuditEvent for event in events) == counters.engine_requests - begun
    assert all(event.key_id for event in events if type(event) is AuditEvent)
