"""The proxy before Ollama, asked by the official client: what passes, what is refused, what each leaves behind."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from collector.proxy_routes import MANAGEMENT, table
from collector.routes import GateConfig
from tests.collector.proxying import BOTH, Front, free_port, fronting, running
from tests.sim.ollama import MODELS, REMOTE, Ollama

MODEL = "tiny@" + "a" * 16
HELLO: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
WITHHELD = "This answer was withheld by policy."


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Ollama, str]]:
    """One stand-in for all tests."""
    app = Ollama()
    with running(app) as url:
        yield app, url


@pytest.fixture
def upstream(shared: tuple[Ollama, str]) -> tuple[Ollama, str]:
    """The stand-in, as new."""
    app, url = shared
    app.bodies.clear()
    app.headers.clear()
    app.pause_s, app.words, app.gone = 0.0, 0, 0
    app.models = dict(MODELS)
    return app, url


@pytest.fixture
def front(upstream: tuple[Ollama, str]) -> Iterator[Front]:
    """A proxy with a guard on prompts."""
    with fronting(upstream[1], kind="ollama") as made:
        yield made


def client(front: Front) -> ollama.Client:
    """The official client with a good key."""
    made = ollama.Client(front.url, headers=front.headers)
    front.clients.append(made._client)
    return made


def asked(app: Ollama) -> list[tuple[str, dict[str, Any]]]:
    """What reached the stand-in, but for its list of models."""
    return [(row, body) for row, body in app.bodies if row != "GET /api/tags"]


def test_every_inference_of_the_official_client_has_its_event(upstream: tuple[Ollama, str], front: Front) -> None:
    """Chat and generate, whole and streamed, and both kinds of embeddings; counts are the server's own."""
    to = client(front)
    assert to.chat("tiny", [{"role": "user", "content": "one two"}]).message.content == "one two "
    assert "".join(
        p.message.content or "" for p in to.chat("tiny", [{"role": "user", "content": "a b c"}], stream=True)
    )
    assert to.generate("tiny", "one two three").response == "one two three "
    assert [part.done for part in to.generate("tiny", "a b", stream=True)] == [False, False, True]
    assert len(to.embed("tiny", ["one", "two"]).embeddings) == 2
    assert to.embeddings("tiny", "one").embedding == [0.5]
    found = [(e.route, e.operation, e.status, e.stream, e.prompt_tokens, e.response_tokens) for e in front.events]
    assert found == [
        ("POST /api/chat", "chat", "ok", False, 6, 2),
        ("POST /api/chat", "chat", "ok", True, 7, 3),
        ("POST /api/generate", "generate", "ok", False, 7, 3),
        ("POST /api/generate", "generate", "ok", True, 6, 2),
        ("POST /api/embed", "embedding", "ok", False, 3, 0),
        ("POST /api/embed", "embedding", "ok", False, 3, 0),
        ("POST /api/embeddings", "embedding", "ok", False, 3, 0),
    ]
    assert {event.model_version for event in front.events} == {"tiny:latest@" + "a" * 16}
    assert {event.weights_digest for event in front.events} == {"sha256:" + "a" * 64}
    assert [event.tokens_from for event in front.events] == ["usage"] * 4 + ["shared"] * 2 + ["usage"]
    chat = front.events[1]
    assert (chat.finish_reason, chat.view, chat.http_status) == ("stop", "messages", 200)
    assert chat.ttft_ms is not None
    assert chat.turn_hash != ""
    assert front.publisher.order == ["begin", "event"] * 4 + ["begin", "begin", "event", "event", "begin", "event"]


def test_the_server_gets_the_upstreams_key_and_nothing_of_the_clients(
    upstream: tuple[Ollama, str], front: Front
) -> None:
    """Headers are ours, but for the trace context; the client's key and names stay here."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = {**front.headers, "x-session-id": "s", "x-forwarded-for": "1.2.3.4", "traceparent": trace, "cookie": "c"}
    body = {"model": "tiny", "prompt": "hello"}
    httpx.post(f"{front.url}/api/generate", json=body, headers=headers).raise_for_status()
    sent = upstream[0].headers[-1]
    assert (sent["authorization"], sent["traceparent"]) == ("Bearer upstream-secret", trace)
    assert set(sent) == {
        *("authorization", "traceparent", "host", "accept", "accept-encoding", "user-agent", "connection"),
        *("content-type", "content-length"),
    }
    assert front.events[-1].trace_id == trace[3:35]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_blocked_prompt_never_reaches_the_server(
    upstream: tuple[Ollama, str], front: Front, path: str, *, stream: bool
) -> None:
    """403, and its event says which guard."""
    asks = {"messages": [{"role": "user", "content": "blockme"}], "prompt": "blockme"}
    body = {"model": "tiny", "stream": stream, **asks}
    answer = httpx.post(f"{front.url}{path}", json=body, headers=front.headers)
    assert (answer.status_code, asked(upstream[0])) == (403, [])
    assert front.told() == [("blocked_input", "guard", 403)]


@pytest.mark.parametrize(
    "extra",
    [
        {"Prompt": "blockme"},
        {"PROMPT": "blockme"},
        {"\u017fystem": "blockme"},
        {"\u212aeep_alive": 0},
        {"Messages": [{"role": "user", "content": "blockme"}]},
        {"messages": [{"role": "user", "content": "fine", "Content": "blockme"}]},
        {"messages": [{"role": "assistant", "Role": "user", "content": "blockme"}]},
        {"x": 1, "X": 2},
        {"_debug_render_only": True},
    ],
)
def test_a_body_that_go_reads_otherwise_is_refused(
    upstream: tuple[Ollama, str], front: Front, extra: dict[str, Any]
) -> None:
    """Go takes a key in any case for the field, and the last of several: such a body can't be judged."""
    answer = httpx.post(f"{front.url}/api/chat", json={"model": "tiny", **extra}, headers=front.headers)
    assert (answer.status_code, asked(upstream[0])) == (400, [])
    assert front.told()[0][:2] in (("rejected", "odd_key"), ("rejected", "private_field"))


@pytest.mark.parametrize(
    "extra", [{"suffix": "blockme"}, {"template": "{{ .Prompt }} blockme"}, {"input_prefix": "blockme"}]
)
def test_what_stands_beside_the_prompt_is_judged_too(
    upstream: tuple[Ollama, str], front: Front, extra: dict[str, Any]
) -> None:
    """A template of the client's, a suffix, and fields that nobody has heard of."""
    body = {"model": "tiny", "prompt": "fine", **extra}
    assert httpx.post(f"{front.url}/api/generate", json=body, headers=front.headers).status_code == 403
    assert asked(upstream[0]) == []


def test_of_two_prompts_in_a_body_the_one_that_ollama_reads_is_judged(
    upstream: tuple[Ollama, str], front: Front
) -> None:
    """Its older route for embeddings reads `prompt`, whatever stands in `input`."""
    body = {"model": "tiny", "prompt": "blockme", "input": "fine"}
    assert httpx.post(f"{front.url}/api/embeddings", json=body, headers=front.headers).status_code == 403
    assert asked(upstream[0]) == []


def test_token_ids_that_no_guard_can_read_are_refused(upstream: tuple[Ollama, str], front: Front) -> None:
    """`context` is a prompt in numbers."""
    body = {"model": "tiny", "prompt": "fine", "context": [1, 2, 3]}
    assert httpx.post(f"{front.url}/api/generate", json=body, headers=front.headers).status_code == 403
    assert (front.told(), asked(upstream[0])) == ([("blocked_input", "unreadable", 403)], [])


@pytest.mark.parametrize("row", sorted(r for r, route in table("ollama").rows.items() if route.handling == "refused"))
def test_management_and_banners_are_not_there(upstream: tuple[Ollama, str], front: Front, row: str) -> None:
    """404 and a rejection that names the route; the server never hears of it."""
    method, _, path = row.partition(" ")
    answer = httpx.request(method, f"{front.url}{path}", headers=front.headers)
    assert (answer.status_code, asked(upstream[0])) == (404, [])
    assert [event.status for event in front.events] == ["rejected"]
    assert "server" not in answer.headers


def test_an_opened_management_route_is_told_before_it_is_passed(upstream: tuple[Ollama, str]) -> None:
    """One event that says so; the others stay shut; blobs and deletion can't be opened."""
    with fronting(upstream[1], kind="ollama", open_management=["POST /api/pull"]) as front:
        progress = list(client(front).pull("tiny", stream=True))
        assert [part.status for part in progress] == ["pulling manifest", "success"]
        with pytest.raises(ollama.ResponseError):
            client(front).show("tiny")
        assert [(e.route, e.status, e.reason) for e in front.events] == [
            ("POST /api/pull", "ok", "management"),
            ("POST /api/show", "rejected", "refused_route"),
        ]
    for row in ("DELETE /api/delete", "POST /api/blobs/{digest}", "POST /api/chat"):
        with pytest.raises(ValueError, match="can't be opened"):
            Front("http://127.0.0.1:1", kind="ollama", open_management=[row])
    assert len(MANAGEMENT) == 5


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/api/generate", {"model": "tiny"}, "model_load"),
        ("/api/chat", {"model": "tiny", "keep_alive": 0}, "model_load"),
        ("/api/chat", {"model": REMOTE.upper(), "messages": [{"role": "user", "content": "hi"}]}, "remote_model"),
        ("/api/generate", {"model": "any:cloud", "prompt": "hi"}, "remote_model"),
        ("/api/generate", {"model": "any:120b-cloud", "prompt": "hi"}, "remote_model"),
        ("/api/generate", {"model": "any:120b-cloud ", "prompt": "hi"}, "remote_model"),
        ("/api/generate", {"model": "any:\u00a0CLOUD\n", "prompt": "hi"}, "remote_model"),
        ("/api/generate", {"model": f"https://registry.ollama.ai/library/{REMOTE}", "prompt": "hi"}, "remote_model"),
        ("/api/generate", {"model": f"{REMOTE}:local", "prompt": "hi"}, "remote_model"),
        ("/v1/completions", {"model": "tiny", "prompt": ""}, "model_load"),
        ("/api/embed", {"model": "tiny", "input": ""}, "model_load"),
        ("/api/embed", {"model": "tiny", "input": [], "keep_alive": -1}, "model_load"),
        ("/api/embeddings", {"model": "tiny", "prompt": ""}, "model_load"),
        ("/v1/messages", HELLO | {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ("/v1/messages", HELLO | {"tools": [{"type": " web_search"}]}, "web_search"),
    ],
)
def test_what_ollama_does_beside_inference_is_shut(
    upstream: tuple[Ollama, str], front: Front, path: str, body: dict[str, Any], reason: str
) -> None:
    """Loading models, and sending prompts to other hosts; each is a rejection."""
    assert httpx.post(f"{front.url}{path}", json=body, headers=front.headers).status_code == 403
    assert (front.told(), asked(upstream[0])) == ([("rejected", reason, 403)], [])


def test_no_prompt_goes_to_another_host_before_the_models_are_known(upstream: tuple[Ollama, str]) -> None:
    """The proxy starts before Ollama does; the first request asks which models are served from elsewhere."""
    with free_port() as port, fronting(f"http://127.0.0.1:{port}", kind="ollama") as front:
        to = {"url": f"{front.url}/api/generate", "json": {"model": REMOTE, "prompt": "hi"}, "headers": front.headers}
        assert httpx.post(**to).status_code == 502
        with running(upstream[0], port=port):
            time.sleep(1.1)  # it is asked once a second
            assert httpx.post(**to).status_code == 403
        assert [reason for _, reason, _ in front.told()] == ["server_refused", "remote_model"]
        assert asked(upstream[0]) == []


def test_a_model_that_ollama_does_not_list_is_asked_for_nothing(upstream: tuple[Ollama, str], front: Front) -> None:
    """It may be another host's by an alias that no list tells. One that has been pulled since is served at once."""
    with pytest.raises(ollama.ResponseError) as refused:
        client(front).generate("words of the client", "hi")
    assert (refused.value.status_code, "words of the client" in str(refused.value)) == (404, False)
    assert (front.told(), asked(upstream[0])) == ([("rejected", "unlisted_model", 404)], [])
    upstream[0].models["new:latest"] = "d" * 64
    time.sleep(1.1)  # it is asked once a second
    assert client(front).generate("new", "hi").response == "hi "
    del upstream[0].models["new:latest"]
    assert front.events[1].model_version == "new:latest@" + "d" * 16


def test_a_new_digest_of_a_model_is_seen(
    upstream: tuple[Ollama, str], front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of models is asked again once it is old."""
    to = client(front)
    to.generate("tiny", "hi")
    upstream[0].models["tiny:latest"] = "d" * 64
    proxy = front.site._gate._app
    proxy._upstream._listed_s = 0.0  # type: ignore[attr-defined]
    end_s = time.monotonic() + 10
    while front.events[-1].weights_digest != "sha256:" + "d" * 64:
        to.generate("tiny", "hi")
        assert time.monotonic() < end_s
    assert front.events[0].weights_digest == "sha256:" + "a" * 64


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_a_blocked_answer_is_withheld(upstream: tuple[Ollama, str], path: str, *, hold: bool) -> None:
    """Whole: replaced. Held streams: replaced, not a word goes out. Streams that are not held: cut at the end."""
    upstream[0].words = 3
    asks = {"messages": [{"role": "user", "content": "block me"}], "prompt": "block me"}
    gate = GateConfig(hold_streams=hold)
    with fronting(upstream[1], kind="ollama", stages=frozenset({"output"}), gate=gate) as front:
        front.guard.bad = "block me"
        for stream in (False, True):
            body = {"model": "tiny", "stream": stream, **asks}
            answer = httpx.post(f"{front.url}{path}", json=body, headers=front.headers)
            assert WITHHELD in answer.text
            assert ("block" in answer.text) == (stream and not hold)
            assert '"done_reason": "content_filter"' in answer.text or '"done_reason":"content_filter"' in answer.text
        assert front.told() == [("blocked_output", "", 200)] * 2
        assert [event.response_tokens for event in front.events] == [5, 5]


def test_a_good_answer_passes_a_guard_on_answers(upstream: tuple[Ollama, str]) -> None:
    """Held and judged whole, then handed on as it came."""
    with fronting(upstream[1], kind="ollama", stages=BOTH) as front:
        parts = list(client(front).chat("tiny", [{"role": "user", "content": "a b"}], stream=True))
        assert [part.message.content for part in parts] == ["a ", "b ", ""]
        assert front.guard.saw[-2:] == [("input", "a b"), ("output", "a b ")]


@pytest.mark.parametrize("policy", ["deny", "allow"])
def test_images_go_by_the_tenants_policy(upstream: tuple[Ollama, str], policy: Any) -> None:
    """Refused with a rejection, or passed with their number and size in the event."""
    with fronting(upstream[1], kind="ollama", gate=GateConfig(media=policy)) as front:
        image = "iVBORw0KGgo="
        body = {"model": "tiny", "messages": [{"role": "user", "content": "what", "images": [image]}], "stream": False}
        answer = httpx.post(f"{front.url}/api/chat", json=body, headers=front.headers)
        assert answer.status_code == (200 if policy == "allow" else 403)
        (event,) = front.events
        assert [media.kind for media in event.media] == ["image"]
        assert front.guard.saw.count(("input", image)) == 0
