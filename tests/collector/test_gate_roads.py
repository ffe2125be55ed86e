"""The table of roads at the gate: what needs a key, what is refused, and what is in a prompt beside text."""

import base64
from types import SimpleNamespace
from typing import Any

import pytest

from collector.audit import Blocked, EngineRequest
from collector.auditor import Auditor
from collector.context import Exchange, exchange
from collector.event import Media
from collector.gate import Gate, _tell_unknown_routes
from collector.guards.protocol import Context, Judgement
from collector.media import Item
from collector.routes import ROUTES, VLLM, GateConfig
from tests.collector.gating import BODY, CHAT, Site, lifespan
from tests.collector.vllm_routes import DEVELOPMENT, GENERATION, POOLING


def chat_with(part: dict[str, Any]) -> dict[str, Any]:
    """A chat whose one message is a word and this part."""
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]}


@pytest.mark.parametrize("row", sorted(ROUTES))
async def test_every_route_of_the_table_needs_a_key(row: str) -> None:
    """No row lets a stranger in, /health apart, which is open by default."""
    site = Site(GateConfig())
    method, _, path = row.partition(" ")
    answer = await site.send(method, path, key=None)
    expected = 200 if row == "GET /health" else 401
    assert answer.status_code == expected
    assert len(site.publisher.rejections) == (expected == 401)


@pytest.mark.parametrize("row", sorted(row for row, route in ROUTES.items() if route.handling == "refused"))
async def test_refused_routes_are_not_there_even_with_a_key(row: str) -> None:
    """404, and the rejection names the route."""
    site = Site(GateConfig())
    method, _, path = row.partition(" ")
    answer = await site.send(method, path)
    assert (answer.status_code, site.app.bodies, len(site.publisher.rejections)) == (404, [], 1)


async def test_harmless_routes_need_a_key_and_no_event(site: Site) -> None:
    """Asking for the models is no inference."""
    assert (await site.send("GET", "/v1/models")).status_code == 200
    assert (await site.send("POST", "/tokenize", json={"prompt": "x"})).status_code == 200
    assert site.reasons == []


RENDERING = ("/tokenize", "/v1/messages/count_tokens", "/v1/chat/completions/render", "/v1/responses/render")


@pytest.mark.parametrize("path", RENDERING)
@pytest.mark.parametrize(("policy", "status"), [("deny", 403), ("allow", 200), ("guard", 403)])
async def test_media_pass_no_harmless_route_that_they_may_not_pass_elsewhere(
    path: str, policy: Any, status: int
) -> None:
    """Whatever renders a prompt fetches its pictures, from any address that a client names."""
    site = Site(GateConfig(media=policy))
    part = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}
    assert (await site.send("POST", path, json=chat_with(part))).status_code == status
    assert (len(site.app.bodies), site.reasons) == ((1, []) if status == 200 else (0, [("media", 403)]))


async def test_open_routes_are_harmless_gets_alone() -> None:
    """/metrics can be opened to a scraper; what works the engine can't be opened."""
    site = Site(GateConfig(open_routes=("/metrics",)))
    assert (await site.send("GET", "/metrics", key=None)).status_code == 200
    assert (await site.send("GET", "/health", key=None)).status_code == 401
    for path in (CHAT, "/docs", "/nothing"):
        with pytest.raises(ValueError, match="can't be open"):
            GateConfig(open_routes=(path,))


async def test_websockets_are_closed_and_audited(site: Site) -> None:
    """No websocket reaches the app, with a key or without."""
    for headers in ([], [(b"x-api-key", site.key.encode())]):
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any, into: list[Any] = sent) -> None:
            into.append(message)

        await site.gate({"type": "websocket", "path": "/v1/realtime", "headers": headers}, receive, send)
        assert sent == [{"type": "websocket.close", "code": 1008}]
    assert [reason for reason, _ in site.reasons] == ["no_key", "websocket"]
    assert site.app.bodies == []


def test_every_route_that_vllm_was_seen_to_serve_has_a_row() -> None:
    """Generation, pooling, development mode: none is unknown, and no development route is more than refused."""
    assert VLLM.unknown([*GENERATION, *DEVELOPMENT, *POOLING]) == []
    assert {ROUTES[row].handling for row in DEVELOPMENT} == {"refused"}


def test_a_route_of_a_newer_server_is_told(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """What the table has never heard of is named at the start, and refused like anything unlisted."""
    app = SimpleNamespace(routes=[SimpleNamespace(path="/v9/mind", methods={"POST"}), SimpleNamespace(path="/health")])
    _tell_unknown_routes({"app": app}, VLLM)
    assert "POST /v9/mind" in "".join(capfd.readouterr())


PIXEL = base64.b64encode(b"a picture").decode()
INLINE, ADDRESS = f"data:image/png;base64,{PIXEL}", {"url": "https://example.org/a.png"}
IMAGES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "chat, inline": (
        CHAT,
        chat_with({"type": "image_url", "image_url": {"url": INLINE}}),
        "inline",
        9,
    ),
    "chat, address": (
        CHAT,
        chat_with({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}),
        "url",
        0,
    ),
    "chat, bare": (CHAT, chat_with({"image_url": "https://example.org/a.png"}), "url", 0),
    "chat, from the cache": (CHAT, chat_with({"type": "image_url", "image_url": None, "uuid": "u"}), "cached", 0),
    "chat, sound": (
        CHAT,
        chat_with({"type": "input_audio", "input_audio": {"data": PIXEL}}),
        "inline",
        9,
    ),
    "responses": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": INLINE}]}]},
        "inline",
        9,
    ),
    "messages": (
        "/v1/messages",
        chat_with({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}),
        "inline",
        9,
    ),
    "embed": ("/v2/embed", {"images": [INLINE]}, "inline", 9),
    "score": (
        "/score",
        {"data_1": "x", "data_2": {"content": [{"type": "image_url", "image_url": ADDRESS}]}},
        "url",
        0,
    ),
    "invocations": ("/invocations", chat_with({"type": "video_url", "video_url": {"url": "http://a/b"}}), "url", 0),
}


@pytest.mark.parametrize("name", IMAGES)
async def test_media_are_refused_by_default_and_counted(site: Site, name: str) -> None:
    """Text guards can't read them: 403 on every road, and the rejection has digest, size and kind."""
    path, body, source, size = IMAGES[name]
    answer = await site.send("POST", path, json=body)
    assert (answer.status_code, site.app.bodies, site.reasons) == (403, [], [("media", 403)])
    (fields,) = site.publisher.rejections
    (told,) = fields["media"]
    assert (fields["media_count"], told.source, told.size_bytes) == (1, source, size)
    assert told.digest.startswith("hmac:") or source == "cached"


@pytest.mark.parametrize(
    ("policy", "verdict", "status"),
    [("allow", None, 200), ("guard", None, 403), ("guard", True, 403), ("guard", False, 200)],
)
async def test_a_tenant_has_its_own_policy_for_media(policy: Any, verdict: bool | None, status: int) -> None:
    """allow passes; guard asks the image guard, and without one nothing passes; all are in the exchange."""
    site = Site(GateConfig(media_tenants={"default": policy}))
    asked: list[Item] = []

    class Eye:
        name, version = "eye", "1"

        def judge(self, item: Item, context: Context) -> Judgement:
            asked.append(item)
            return Judgement(0.9 if verdict else 0.1, "", bool(verdict))

    site.auditor._media_guard = None if verdict is None else Eye()
    _, body, _, _ = IMAGES["chat, inline"]
    assert (await site.send("POST", CHAT, json=body)).status_code == status
    assert [item.data for item in asked] == ([] if verdict is None else [b"a picture"])
    told = site.app.exchanges[0].media if status == 200 else site.publisher.rejections[0]["media"]
    assert [each.size_bytes for each in told] == [9]


async def test_an_image_guard_that_fails_lets_nothing_in() -> None:
    """Its failure is the verdict, by the class of the error alone."""
    site = Site(GateConfig(media="guard"))

    class Blind:
        name, version = "eye", "1"

        def judge(self, item: Item, context: Context) -> Judgement:
            raise RuntimeError("secret words")

    site.auditor._media_guard = Blind()
    answer = await site.send("POST", CHAT, json=IMAGES["chat, inline"][1])
    (verdict,) = site.publisher.rejections[0]["guardrail_results"]
    assert (answer.status_code, verdict.decision, verdict.error) == (403, "error", "RuntimeError")
    assert site.publisher.counters.guard_errors == {"eye": 1}


async def test_words_and_schemas_that_only_sound_like_media_pass(site: Site) -> None:
    """A tool with a parameter named image, a JSON schema, a word: no media."""
    schema = {"type": "object", "properties": {"image": {"type": "string"}, "images": {"type": "array"}}}
    tools = [{"type": "function", "function": {"name": "draw", "parameters": schema}}]
    body = {**BODY, "tools": tools, "metadata": {"image": "none", "file": "a word"}}
    assert (await site.send("POST", CHAT, json=body)).status_code == 200


async def test_beam_search_passes_the_gate(site: Site) -> None:
    """It is audited as one request behind it."""
    assert (await site.send("POST", CHAT, json={**BODY, "use_beam_search": True})).status_code == 200


async def test_the_gate_opens_only_after_its_self_test(site: Site) -> None:
    """A self-test that fails stops the start, and until it has passed nothing is answered."""

    async def fail(_scope: Any, auditor: Auditor) -> None:
        assert auditor is site.auditor
        raise RuntimeError("the self-test made no event")

    site.gate = Gate(site.app, auditor=lambda _: site.auditor, stop=site.stop, selftest=fail)
    told = await lifespan(site.gate)
    assert told == [{"type": "lifespan.startup.failed", "message": "inferwatch: the self-test made no event"}]
    assert (await site.send("POST", CHAT, json=BODY)).status_code == 503
    assert site.app.bodies == []


SEEN = Media(kind="image", source="engine", digest="9f" * 32)


@pytest.mark.parametrize("policy", ["deny", "guard", "allow"])
def test_media_that_no_gate_saw_are_refused_by_the_wrapper_unless_allowed(policy: Any) -> None:
    """The engine was handed a picture and no gate asked for it: blocked, or allowed with a keyed digest."""
    site = Site(GateConfig(media=policy))
    request = EngineRequest("generate", "look", media=(SEEN,))
    if policy != "allow":
        with pytest.raises(Blocked):
            site.auditor.open(request)
        return
    audit = site.auditor.open(request)
    (told,) = audit._known["media"]  # type: ignore[misc]  # a list, seen as any object
    assert (told.kind, told.source, audit._known["media_count"]) == ("image", "engine", 1)
    assert told.digest.startswith("hmac:")
    assert SEEN.digest not in told.digest


def test_an_adapter_that_may_not_answer_is_blocked_with_its_event(site: Site) -> None:
    """Whatever road it came by."""
    with pytest.raises(Blocked, match="blocked by policy"):
        site.auditor.open(EngineRequest("generate", "hello", adapter_refused=True))


async def test_a_decoy_that_the_gate_saw_does_not_let_a_second_picture_in() -> None:
    """One image in the body was judged; the engine was handed two."""
    site = Site(GateConfig(media="guard"))
    token = exchange.set(Exchange("r", site.auditor.caller("default"), media=[SEEN]))
    try:
        site.auditor.open(EngineRequest("generate", "look", media=(SEEN,)))
        with pytest.raises(Blocked):
            site.auditor.open(EngineRequest("generate", "look", media=(SEEN, SEEN)))
    finally:
        exchange.reset(token)
