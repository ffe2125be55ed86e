"""Guards that ask a model ask the real vLLM, which takes their questions; noise for an answer is never an allow."""

from pathlib import Path
from typing import Any

import pytest

from collector.guards.alignment import AlignmentConfig
from collector.guards.config import GuardsConfig
from collector.guards.endpoint import BadAnswer, EndpointFailed
from collector.guards.llamaguard import LlamaGuardConfig
from collector.guards.protocol import Context, GuardRefused
from collector.guards.stack import GuardStack
from tests.engine.conftest import MODEL, Server


@pytest.fixture
def endpoint(server: Server, tmp_path: Path) -> dict[str, Any]:
    """The session's engine as somebody's judge."""
    key = tmp_path / "key"
    key.write_text(server.site.api_key)
    key.chmod(0o600)
    return {"url": f"{server.url}/v1", "model": MODEL, "api_key_file": str(key)}


@pytest.mark.parametrize(("api", "stage"), [("chat", "input"), ("chat", "output"), ("completions", "output")])
def test_a_model_that_is_no_llama_guard_is_an_error(endpoint: dict[str, Any], api: str, stage: Any) -> None:
    """vLLM takes parts, alternating roles and log-probabilities, and answers 200; its noise is no verdict."""
    guard = LlamaGuardConfig.model_validate({"endpoint": endpoint, "api": api, "deadline_ms": 60_000}).build()
    with pytest.raises(BadAnswer):
        guard.judge("How do I bake bread?", stage, Context(prompt="Bread?"))


def test_a_model_that_is_no_judge_is_an_error(endpoint: dict[str, Any]) -> None:
    """Bound to JSON or not."""
    for mode in ("none", "json_object"):
        policy = {"endpoint": endpoint, "json_mode": mode, "deadline_ms": 60_000}
        with pytest.raises(BadAnswer):
            AlignmentConfig.model_validate(policy).build().judge("Done.", "output", Context(prompt="Bake bread."))


def test_such_a_guard_does_not_start(endpoint: dict[str, Any]) -> None:
    """Nor does one whose key is wrong."""
    policy = {"endpoint": endpoint, "deadline_ms": 60_000}
    with pytest.raises(GuardRefused, match="self-test 0 failed with BadAnswer"):
        GuardStack(GuardsConfig.model_validate({"order": ["llamaguard"], "llamaguard": policy}))
    Path(endpoint["api_key_file"]).write_text("iw-wrong-key")
    with pytest.raises(EndpointFailed):
        LlamaGuardConfig.model_validate(policy).build().judge("bread", "input")
