"""What the gate lets through: the table of the server's routes, and `[collector.gate]`.

Every route of vLLM 0.32 has a row, generation and pooling models alike: audited (it works the engine, so each request
has its event), harmless (it needs a key and no event) or refused. A route that is not in the table is refused too.
`POST /v1/guard` is the gate's own: it judges texts and answers itself.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

Handling = Literal["audited", "harmless", "refused", "own"]
MediaPolicy = Literal["deny", "allow", "guard"]


class Route(NamedTuple):
    """How one method and path is treated."""

    handling: Handling
    operation: str
    """The event's `operation`; for harmless and refused routes what they would do."""


_AUDITED: Final[Mapping[str, str]] = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/cohere/v2/chat": "chat",
    "/v1/messages": "messages",
    "/v1/embeddings": "embedding",
    "/v2/embed": "embedding",
    "/pooling": "pooling",
    "/classify": "classify",
    "/score": "score",
    "/v1/score": "score",
    "/rerank": "rerank",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/generative_scoring": "score",
    "/v1/systemone": "decision",
    "/inference/v1/generate": "tokens",
    "/invocations": "invocation",
}
_HARMLESS: Final[Mapping[str, str]] = {
    "GET /health": "health",
    "GET /ping": "health",
    "POST /ping": "health",
    "GET /load": "load",
    "GET /metrics": "metrics",
    "GET /version": "version",
    "GET /v1/models": "models",
    "GET /kv_event_sources": "events",
    "POST /is_scaling_elastic_ep": "health",
    "POST /tokenize": "tokenize",
    "POST /detokenize": "tokenize",
    "POST /v1/messages/count_tokens": "tokenize",
    "POST /v1/messages/render": "render",
    "POST /cohere/v2/chat/render": "render",
    "POST /v1/responses/render": "render",
    "POST /v1/chat/completions/render": "render",
    "POST /v1/chat/completions/derender": "render",
    "POST /v1/completions/render": "render",
    "POST /v1/completions/derender": "render",
}
_REFUSED: Final[tuple[str, ...]] = (
    # They tell a stranger what the server can do.
    "GET /docs", "HEAD /docs", "GET /docs/oauth2-redirect", "HEAD /docs/oauth2-redirect", "GET /openapi.json",
    "HEAD /openapi.json", "GET /redoc", "HEAD /redoc", "GET /server_info", "GET /tokenizer_info", "GET /weight_info",
    # They read or end what belongs to other clients: neither asks whose it is.
    "GET /v1/responses/{response_id}", "POST /v1/responses/{response_id}/cancel", "POST /abort_requests",
    "POST /inference/v1/abort_requests",
    # They take sound as a form, which the gate does not read; a websocket is refused whatever its path.
    "POST /v1/audio/transcriptions", "POST /v1/audio/translations",
    # They change the model, its weights, adapters or caches, or run code in its workers.
    "POST /adapters", "DELETE /adapters/{adapter_name}", "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter",
    "POST /collective_rpc", "POST /scale_elastic_ep", "POST /sleep", "POST /wake_up", "GET /is_sleeping",
    "POST /pause", "POST /resume", "GET /is_paused", "POST /reset_prefix_cache", "POST /reset_mm_cache",
    "POST /reset_encoder_cache", "POST /release_kv_cache_memory", "POST /init_weight_transfer_engine",
    "POST /shutdown_weight_transfer_engine", "POST /start_weight_update", "POST /start_draft_weight_update",
    "POST /finish_weight_update", "POST /update_weights", "POST /update_weight_version", "POST /weight_checker",
    "GET /get_world_size", "POST /start_profile", "POST /stop_profile", "POST /fault_tolerance/apply",
    "GET /fault_tolerance/status",
)  # fmt: skip

GUARD: Final = "POST /v1/guard"

ROUTES: Final[Mapping[str, Route]] = {
    **{f"POST {path}": Route("audited", operation) for path, operation in _AUDITED.items()},
    **{row: Route("harmless", operation) for row, operation in _HARMLESS.items()},
    **{row: Route("refused", "refused") for row in _REFUSED},
    GUARD: Route("own", "guard"),
}
"""`METHOD /path` to its treatment, paths as the server's router spells them."""


class RouteTable:
    """The routes of one kind of server. Immutable."""

    def __init__(self, rows: Mapping[str, Route]) -> None:
        self.rows = rows
        self._paths = frozenset(row.partition(" ")[2] for row in rows)

    def find(self, method: str, path: str) -> Route | None:
        """The row of a request. Exact: no other case, no trailing slash, no pattern; refused patterns are not found."""
        return self.rows.get(f"{method} {path}")

    def label(self, method: str, path: str) -> str:
        """A route's name for the event: `METHOD /path` where the path is in the table, else only that it is not.

        What a client invents as a path is the client's text.
        """
        known = path in self._paths and method in {"GET", "POST", "HEAD", "DELETE", "PUT", "PATCH", "OPTIONS"}
        return f"{method} {path}" if known else "unlisted"

    def unknown(self, routes: Iterable[str]) -> list[str]:
        """Which of the server's `METHOD /path` rows this version has never heard of."""
        return sorted(set(routes) - self.rows.keys())


VLLM: Final = RouteTable(ROUTES)
find, label, unknown = VLLM.find, VLLM.label, VLLM.unknown


class GateConfig(BaseModel):
    """`[collector.gate]`: what passes the gate, within which bounds, and what happens to blocked answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field(
        "default",
        pattern="^[a-z0-9][a-z0-9_-]{0,62}$",
        description="Whose key makes the pseudonyms of requests without a valid API key, or outside the gate.",
    )
    open_routes: tuple[str, ...] = Field(
        ("/health",), max_length=8, description="Harmless GET routes that need no key, such as /metrics for a scraper."
    )
    body_bytes_max: int = Field(
        1_048_576, ge=1_024, le=1_073_741_824, description="Largest request body; beyond it the answer is 413."
    )
    body_timeout_s: float = Field(30, gt=0, le=600, description="Time for a client to send its body; then 408.")
    buffered_bytes_max: int = Field(
        268_435_456,
        ge=1_048_576,
        description="Bodies of all requests being read or judged; beyond it the answer is 503.",
    )
    judge_all_roles: bool = Field(
        False,
        description="Judge system and assistant messages as input too: for keys that are in the hands of end users.",
    )
    hold_streams: bool = Field(
        True,
        description="Where a guard that can block judges answers, hold streams back until they are judged. false: "
        "deltas pass at once, and a blocked answer is cut at its end.",
    )
    hold_back_chars: int = Field(
        256,
        ge=0,
        le=1_000_000,
        description="How much of a stream is held back: its last characters, while the guards judge it as it comes; at "
        "least what a guard needs to see in one piece. A late block ends the stream. 0, or a guard that needs the "
        "whole answer: hold it to its end.",
    )
    blocked_text: str = Field(
        "This answer was withheld by policy.", min_length=1, max_length=1_000, description="Put for a blocked answer."
    )
    kv_transfer: bool = Field(
        False,
        description="Let requests name what other engines have cached (kv_transfer_params), as the router of engines "
        "for prefill and decode does. Whoever may can have others' prompts answered: leave no key to anyone else.",
    )
    markers: tuple[tuple[str, str], ...] = Field(
        (),
        max_length=16,
        description="Pairs of marks between which applications put fetched text into prompts, such as "
        '[["<document>", "</document>"]]: what stands there is judged as retrieved, too.',
    )

    media: MediaPolicy = Field(
        "deny",
        description="Images, sound and films in prompts, which text guards can't read. deny: 403. allow: digest, size "
        "and count in the event. guard: ask the image guard.",
    )
    media_tenants: dict[str, MediaPolicy] = Field({}, max_length=4_096, description="The same for single tenants.")

    def media_policy(self, tenant: str) -> MediaPolicy:
        """What happens to media in this tenant's prompts."""
        return self.media_tenants.get(tenant, self.media)

    @field_validator("markers")
    @classmethod
    def _check_markers(cls, value: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        if any(not 3 <= len(mark) <= 64 for pair in value for mark in pair):
            raise ValueError("a mark has 3 to 64 characters")
        return value

    @field_validator("open_routes")
    @classmethod
    def _check_open(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            route = find("GET", path)
            if route is None or route.handling != "harmless":
                raise ValueError(f"{path!r} can't be open: only harmless GET routes can")
        return value
