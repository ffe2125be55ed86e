"""Bodies of requests, and what the audit calls their answers."""

from typing import Any

import httpx

from tests.engine.conftest import MODEL

PROMPT = [{"role": "user", "content": "hello there"}]
EOS = {"ignore_eos": True}


def chat(**fields: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": MODEL, "messages": PROMPT, "max_tokens": 5, **EOS, **fields}


def identity(answer: httpx.Response) -> str:
    """The id under which the answer's request was audited."""
    return answer.headers["inferwatch-request-id"]
