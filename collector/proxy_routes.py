"""What the proxy lets through: a table of routes for each kind of server behind it, and the API that each route speaks.

As in the gate's own table: audited routes work the engine and have their events, harmless ones need a key and no event,
refused ones are named so that events name them. A route that is in no table is refused too.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Literal

from collector.routes import GUARD, Route, RouteTable

Api = Literal["chat", "completion", "responses", "messages", "ollama-chat", "ollama-generate", "vectors", "management"]
"""How an answer is written. `vectors`: embeddings and scores, which hold no text of the model's."""

APIS: Final[Mapping[str, Api]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/api/chat": "ollama-chat",
    "/api/generate": "ollama-generate",
    **dict.fromkeys(("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/show"), "management"),
}
"""By path; every other audited route gives vectors."""

_OPENAI: Final[Mapping[str, str]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embedding",
}
_SCORING: Final[Mapping[str, str]] = {
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/score": "score",
    "/score": "score",
}
_OLLAMA: Final[Mapping[str, str]] = {
    "/api/generate": "generate",
    "/api/chat": "chat",
    "/api/embed": "embedding",
    "/api/embeddings": "embedding",
}
_HEALTH: Final = "GET /health"
_OPENAI_HARMLESS: Final[Mapping[str, str]] = {_HEALTH: "health", "GET /v1/models": "models"}
_OLLAMA_HARMLESS: Final[Mapping[str, str]] = {**_OPENAI_HARMLESS, "GET /api/tags": "models", "GET /api/ps": "models"}
MANAGEMENT: Final = ("POST /api/pull", "POST /api/push", "POST /api/create", "POST /api/copy", "POST /api/show")
"""Ollama's routes that a setting may open. Blobs and deletion stay shut."""
_OLLAMA_REFUSED: Final = (
    *MANAGEMENT, "DELETE /api/delete", "POST /api/blobs/{digest}", "HEAD /api/blobs/{digest}",
    # What is told there says which version answers, and whose account it has.
    "GET /", "HEAD /", "GET /api/version", "HEAD /api/version", "HEAD /api/tags", "GET /api/status", "POST /api/me",
    "POST /api/signout", "DELETE /api/user/keys/{key}", "GET /v1/models/{model}",
    # They reach beyond the host, or work models whose input is no text.
    "POST /api/experimental/web_search", "POST /api/experimental/web_fetch", "POST /v1/images/generations",
    "POST /v1/images/edits", "POST /v1/audio/transcriptions",
)  # fmt: skip
_OPENAI_REFUSED: Final = (
    "GET /", "GET /version", "GET /metrics", "GET /docs", "GET /openapi.json", "GET /info", "GET /v1/models/{model}",
    # llama.cpp
    "GET /props", "POST /props", "GET /slots", "POST /slots/{slot}", "POST /completion", "POST /completions",
    "POST /chat/completions", "POST /infill", "POST /apply-template", "POST /embedding", "POST /embeddings",
    "GET /lora-adapters", "POST /lora-adapters", "GET /models", "POST /models/load", "POST /models/unload",
    # TGI and SGLang
    "POST /generate", "POST /generate_stream", "POST /invocations", "GET /get_model_info", "GET /get_server_info",
    "POST /flush_cache", "POST /update_weights_from_disk", "POST /start_profile", "POST /load_lora_adapter",
    "POST /tokenize", "POST /detokenize",
    # Others
    "POST /v1/audio/transcriptions", "POST /v1/audio/speech", "POST /v1/images/generations", "POST /v1/files",
    "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter",
)  # fmt: skip


def _table(
    audited: Mapping[str, str], harmless: Mapping[str, str], refused: Iterable[str], opened: Iterable[str] = ()
) -> RouteTable:
    return RouteTable(
        {
            **{row: Route("refused", "refused") for row in refused},
            **{f"POST {path}": Route("audited", operation) for path, operation in audited.items()},
            **{row: Route("harmless", operation) for row, operation in harmless.items()},
            **{row: Route("audited", "management") for row in opened},
            GUARD: Route("own", "guard"),
        }
    )


def table(kind: str, opened: Iterable[str] = ()) -> RouteTable:
    """The routes before a server of `kind`. `opened`: management routes that are audited and passed."""
    if kind == "ollama":
        return _table({**_OPENAI, **_OLLAMA}, _OLLAMA_HARMLESS, _OLLAMA_REFUSED, opened)
    return _table({**_OPENAI, **_SCORING}, _OPENAI_HARMLESS, _OPENAI_REFUSED)
