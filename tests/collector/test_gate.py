"""The gate before a recording app: who gets in, what is refused, what each refusal leaves behind."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from collector.audit import Auditor
from collector.context import exchange
from collector.doors import Identity
from collector.gate import Gate
from collector.guards.config import GuardsConfig
from collector.guards.protocol import Judgement, Probe
from collector.guards.secrets import SecretsConfig
from collector.guards.stack import GuardStack
from collector.identity import KeyRing, Pseudonyms, new_api_key
from collector.journal import JournalFull
from collector.lanes import Counters
from collector.routes import ROUTES, GateConfig

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Recorder:
    """Stands in for the publisher: keeps what it is told."""

    def __init__(self) -> None:
        self.rejections: list[dict[str, Any]] = []
        self.counters = Counters()
        self.full = False

    def reject(self, **fields: Any) -> None:
        """One rejection."""
        if self.full:
            raise JournalFull
        self.rejections.append(fields)

    def begin(self, **fields: Any) -> dict[str, Any]:
        """A request begun."""
        return fields

    def finish(self, ticket: Any, **fields: Any) -> None:
        """A request finished."""


class Watch:
    """A guard that blocks `attack` and remembers the threads and texts it saw."""

    name, version = "secrets", "test"
    stages = frozenset({"input", "tool", "retrieved"})
    labels = frozenset({"attack"})
    probes = (Probe("attack", "input", block=True), Probe("fine", "input", block=False))

    def judge(self, text: str, stage: str) -> Judgement:
        """The judgement."""
        bad = "attack" in text
        return Judgement(0.9 if bad else 0.1, "attack" if bad else "", bad)


class App:
    """The server behind the gate: reads the body, may make engine requests, answers as told."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.exchanges: list[Any] = []
        self.status = 200
        self.engine_requests = 1
        self.error: Exception | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        at_hand = exchange.get()
        self.exchanges.append(at_hand)
        if self.error is not None:
            raise self.error
        if at_hand is not None:
            at_hand.engine_requests += self.engine_requests
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Site:
    """A gate, what is behind it, and what it wrote."""

    def __init__(self, config: GateConfig, *, guarded: bool = True) -> None:
        self.app, self.publisher = App(), Recorder()
        self.key, key_id, table = new_api_key(user="alice")
        self.proxy_key, proxy_id, proxy = new_api_key(user="proxy", on_behalf=True)
        policy = SecretsConfig(stages=frozenset(Watch.stages))
        order = ("secrets",) if guarded else ()
        guards = GuardStack(GuardsConfig(order=order, secrets=policy), guards={"secrets": Watch()})
        self.auditor = Auditor(
            self.publisher,  # type: ignore[arg-type]  # the recorder has what the auditor calls
            guards,
            Identity(
                keys=KeyRing({key_id: table, proxy_id: proxy}), pseudonyms={"default": Pseudonyms(bytes(range(32)))}
            ),
            config,
            model_version="m@1",
        )
        self.stopped = 0
        self.gate = Gate(self.app, auditor=lambda _: self.auditor, stop=self.stop)

    def stop(self) -> None:
        """The server ends."""
        self.stopped += 1

    async def send(self, method: str, path: str, *, key: str | None = "", **options: Any) -> httpx.Response:
        """One request; with the good key unless told otherwise."""
        headers = [*options.pop("headers", [])]
        if key is not None:
            headers.append(("authorization", f"Bearer {key or self.key}"))
        transport = httpx.ASGITransport(self.gate)  # type: ignore[arg-type]  # the same protocol, typed otherwise
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            return await client.request(method, path, headers=headers, **options)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Reason and HTTP status of each rejection."""
        return [(fields["reason"], fields["http_status"]) for fields in self.publisher.rejections]


@pytest.fixture
def site() -> Site:
    """A gate with its defaults."""
    return Site(GateConfig())


async def test_a_good_request_passes_unchanged_and_leaves_no_rejection(site: Site) -> None:
    """The app gets the very bytes, and the exchange says who asks and what the guards said."""
    raw = b'{ "messages": [{"role":"user","content":"hello"}],\n "user":"bob" }'
    answer = await site.send("POST", CHAT, content=raw)
    (at_hand,) = site.app.exchanges
    assert (answer.status_code, site.app.bodies, site.reasons) == (200, [raw], [])
    assert answer.headers["inferwatch-request-id"] == at_hand.http_request_id
    assert (at_hand.route, at_hand.operation) == (f"POST {CHAT}", "chat")
    assert [(r.stage, r.decision) for r in at_hand.prompts[0].verdicts] == [("input", "allow")]
    assert exchange.get() is None


@pytest.mark.parametrize(
    ("key", "headers", "reason"),
    [
        (None, [], "no_key"),
        ("wrong", [], "wrong_key"),
        (None, [("authorization", "Basic abc")], "no_key"),
        (None, [("authorization", "Bearer")], "no_key"),
        (None, [("x-api-key", "wrong")], "wrong_key"),
        ("", [("x-api-key", "other")], "two_keys"),
    ],
)
async def test_without_a_good_key_nobody_gets_in(
    site: Site, key: str | None, headers: list[tuple[str, str]], reason: str
) -> None:
    """Each refusal is a 401 in OpenAI's shape and one rejection; the app never hears of it."""
    answer = await site.send("POST", CHAT, key=key, headers=headers, json=BODY)
    assert (answer.status_code, site.app.bodies, site.reasons) == (401, [], [(reason, 401)])
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert site.publisher.rejections[0]["client_address"].startswith("a_")
    assert site.publisher.rejections[0]["http_request_id"] == answer.headers["inferwatch-request-id"]


async def test_both_ways_of_sending_the_key_are_good(site: Site) -> None:
    """`x-api-key` serves as well as a bearer token, and both at once where they agree."""
    for key, headers in [(None, [("x-api-key", site.key)]), ("", [("x-api-key", site.key)])]:
        assert (await site.send("POST", CHAT, key=key, headers=headers, json=BODY)).status_code == 200


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


@pytest.mark.parametrize(
    "path",
    [
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/./completions",
        "/v1/chat/../chat/completions",
        "/V1/chat/completions",
        "/v1/chat/completion%73",
        "/v1%2fchat/completions",
        "/%2e/v1/chat/completions",
        "/v1/chat/completions%00",
        "/v1/chat/completions%20",
        "/v1/chat/completions;a=b",
        "/v1/chat/completions.",
        "/v1/responses/resp_1",
        "/v1/audio/transcriptions",
        "/",
    ],
)
async def test_other_spellings_of_a_path_are_other_paths(site: Site, path: str) -> None:
    """A path that is not spelled as in the table reaches nothing, and its text stays out of the event."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": httpx.URL("http://gate" + path).path,
        "raw_path": path.encode(),
        "headers": [(b"authorization", f"Bearer {site.key}".encode())],
        "client": ("127.0.0.1", 1),
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(BODY).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    await site.gate(scope, receive, send)
    assert (sent[0]["status"], site.app.bodies, site.reasons) == (404, [], [("unlisted_route", 404)])
    assert site.publisher.rejections[0]["route"] == "unlisted"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
async def test_other_methods_do_not_pass(site: Site, method: str) -> None:
    """A known path by another method is refused under its own name."""
    assert (await site.send(method, CHAT)).status_code == 404
    assert site.publisher.rejections[0]["route"] == f"{method} {CHAT}"
    assert site.app.bodies == []


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"messages": "\xff"}', "not_utf8"),
        ('{"messages": "hi"}'.encode("utf-16"), "not_utf8"),
        ('{"messages": "hi"}'.encode("utf-16-le"), "bad_json"),
        (b'\xef\xbb\xbf{"messages": "hi"}', "bad_json"),
        (b"{", "bad_json"),
        (b"", "bad_json"),
        (b'{"a": 1} {"a": 2}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"a":' + b"9" * 5000 + b"}", "bad_json"),
        (b"[1]", "not_an_object"),
        (b'{"messages": [], "messages": []}', "doubled_key"),
        (b'{"messages": [{"role": "user", "role": "tool", "content": "x"}]}', "doubled_key"),
        (b'{"messages": [{"role": "user", "content": "x"}], "use_beam_search": true}', "beam_search"),
        (b'{"input": "x", "background": true}', "background"),
        (b'{"messages": [{"role": "user", "content": ' + b"[" * 50 + b"]" * 50 + b"}]}", "too_deep"),
    ],
)
async def test_a_body_that_can_not_be_read_in_one_way_is_refused(site: Site, raw: bytes, reason: str) -> None:
    """400, a clear sentence without a word of the body, one rejection."""
    answer = await site.send("POST", CHAT, content=raw)
    assert (answer.status_code, site.app.bodies, site.reasons) == (400, [], [(reason, 400)])
    assert answer.json()["error"]["code"] == reason


async def test_a_body_over_the_limit_is_refused_before_it_is_read(site: Site) -> None:
    """1 MB and more is a 413 by its declared length, and by what arrives where no length is declared."""
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 1_100_000}]}).encode()

    async def pieces() -> Any:
        for start in range(0, len(big), 65_536):
            yield big[start : start + 65_536]

    assert (await site.send("POST", CHAT, content=big)).status_code == 413
    assert (await site.send("POST", CHAT, content=pieces())).status_code == 413
    assert (site.app.bodies, site.reasons) == ([], [("body_too_large", 413)] * 2)
    assert (await site.send("POST", "/tokenize", content=big)).status_code == 413


async def test_a_large_body_passes_where_the_configuration_allows_it() -> None:
    """The limit is the operator's."""
    site = Site(GateConfig(body_bytes_max=4_000_000))
    body = {"messages": [{"role": "user", "content": "word " * 300_000}]}
    assert (await site.send("POST", CHAT, json=body)).status_code == 200


async def test_a_body_that_never_comes_is_given_up() -> None:
    """A slow client is told 408 and counted, and holds no memory afterwards."""
    site = Site(GateConfig(body_timeout_s=0.05))

    async def never() -> Any:
        yield b'{"mess'
        await asyncio.sleep(60)

    assert (await site.send("POST", CHAT, content=never())).status_code == 408
    assert site.reasons == [("slow_body", 408)]
    assert site.gate._buffered_bytes == 0


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-session-id", "x-user-id", "content-type"])
async def test_a_header_that_decides_may_come_once(site: Site, name: str) -> None:
    """Two of them could be read differently by the gate and by what is behind it."""
    answer = await site.send("POST", CHAT, key=None, headers=[(name, "a"), (name, "b")], content=b"{}")
    assert (answer.status_code, site.app.bodies) == (400, [])
    assert site.reasons == [("doubled_header", 400)]


async def test_a_length_said_in_two_ways_ends_the_connection(site: Site) -> None:
    """Who stands before the gate may have read the other one."""
    headers = [("content-length", "2"), ("transfer-encoding", "chunked")]
    answer = await site.send("POST", CHAT, headers=headers, content=b"{}")
    assert (answer.status_code, answer.headers["connection"], site.app.bodies) == (400, "close", [])
    assert site.reasons == [("two_lengths", 400)]


async def test_the_trace_id_is_on_every_event_of_the_request(site: Site) -> None:
    """Requests that pass and requests that do not."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = [("traceparent", f"00-{trace}-00f067aa0ba902b7-01")]
    await site.send("POST", CHAT, headers=headers, json=BODY)
    await site.send("POST", CHAT, key="wrong", headers=headers, json=BODY)
    await site.send("POST", CHAT, key="wrong", headers=[("traceparent", "words")], json=BODY)
    assert site.app.exchanges[0].trace_id == trace
    assert [fields["trace_id"] for fields in site.publisher.rejections] == [trace, ""]


@pytest.mark.parametrize(
    ("status", "engine_requests", "error", "expected"),
    [
        (400, 0, None, [("server_refused", 400)]),
        (500, 0, None, [("server_refused", 500)]),
        (200, 0, None, [("no_engine_request", 200)]),
        (403, 1, None, []),
        (200, 4, None, []),
        (200, 0, RuntimeError("words"), [("server_failed", 500)]),
    ],
)
async def test_each_audited_request_has_its_event(
    site: Site, status: int, engine_requests: int, error: Exception | None, expected: list[tuple[str, int]]
) -> None:
    """Whatever the server does without an engine request is one rejection; with one, none."""
    site.app.status, site.app.engine_requests, site.app.error = status, engine_requests, error
    if error is None:
        await site.send("POST", CHAT, json=BODY)
    else:
        with pytest.raises(RuntimeError):
            await site.send("POST", CHAT, json=BODY)
    assert site.reasons == expected


async def test_a_client_that_goes_before_the_engine_begins_has_its_event(site: Site) -> None:
    """A cancelled request without an engine request is an aborted rejection."""
    started = asyncio.Event()

    async def hang(_scope: Any, _receive: Any, _send: Any) -> None:
        started.set()
        await asyncio.sleep(60)

    site.gate._app = hang
    task = asyncio.ensure_future(site.send("POST", CHAT, json=BODY))
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (fields,) = site.publisher.rejections
    assert (fields["reason"], fields["status"], fields["http_status"]) == ("client_gone", "aborted", 0)


async def test_harmless_routes_need_a_key_and_no_event(site: Site) -> None:
    """Asking for the models is no inference."""
    assert (await site.send("GET", "/v1/models")).status_code == 200
    assert (await site.send("POST", "/tokenize", json={"prompt": "x"})).status_code == 200
    assert site.reasons == []


async def test_open_routes_are_harmless_gets_alone() -> None:
    """/metrics can be opened to a scraper; what works the engine can't be opened."""
    site = Site(GateConfig(open_routes=("/metrics",)))
    assert (await site.send("GET", "/metrics", key=None)).status_code == 200
    assert (await site.send("GET", "/health", key=None)).status_code == 401
    for path in (CHAT, "/docs", "/nothing"):
        with pytest.raises(ValueError, match="can't be open"):
            GateConfig(open_routes=(path,))


async def test_users_and_sessions_are_pseudonyms_of_what_the_key_allows(site: Site) -> None:
    """Only a key that may speak for others names a user; header and body spell the same pseudonym."""
    for key, headers, body in [
        (site.key, [("x-user-id", "bob")], {**BODY, "user": "bob", "session_id": "s1"}),
        (site.proxy_key, [("x-user-id", "bob")], {**BODY, "session_id": "s1"}),
        (site.proxy_key, [("x-session-id", "s1")], {**BODY, "user": "bob"}),
        (site.proxy_key, [], BODY),
    ]:
        await site.send("POST", CHAT, key=key, headers=headers, json=body)
    alice, bob, same, proxy = [at_hand.caller for at_hand in site.app.exchanges]
    assert bob.user_id == same.user_id
    assert len({alice.user_id, bob.user_id, proxy.user_id}) == 3
    assert alice.session_id == bob.session_id == same.session_id
    assert proxy.session_id == ""
    assert "bob" not in repr(bob)
    assert bob.key == bob.user_id


async def test_verdicts_are_on_each_prompt_of_the_body(site: Site) -> None:
    """The engine plugin finds the blocked one by its place and its text."""
    await site.send("POST", "/v1/completions", json={"prompt": ["fine", "an attack"]})
    (at_hand,) = site.app.exchanges
    assert [judged.blocked for judged in at_hand.prompts] == [False, True]


async def test_a_verdict_counts_for_its_own_prompt_only(site: Site) -> None:
    """Another text at the place of a judged prompt has no verdict of the gate's."""
    site.app.engine_requests = 0
    site.app.status = 400
    await site.send("POST", "/v1/completions", json={"prompt": ["fine", "good"]})
    (at_hand,) = site.app.exchanges
    assert at_hand.judged("fine") is at_hand.prompts[0]
    assert at_hand.judged("fine and more") is None
    at_hand.engine_requests = 1
    assert at_hand.judged("fine") is None
    assert at_hand.judged("good") is at_hand.prompts[1]
    at_hand.engine_requests = 2
    assert at_hand.judged("good") is None


async def test_where_no_event_can_be_written_nothing_is_answered(site: Site) -> None:
    """A full journal turns even a refusal into 503."""
    site.publisher.full = True
    assert (await site.send("POST", CHAT, key="wrong", json=BODY)).status_code == 503


async def test_a_fault_of_the_gate_lets_nobody_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug while judging is a 500 and a rejection, and says nothing of the prompt."""

    def broken(*_: Any) -> None:
        raise RuntimeError("secret words")

    monkeypatch.setattr(site.auditor, "judge", broken)
    answer = await site.send("POST", CHAT, json=BODY)
    assert (answer.status_code, site.app.bodies, site.reasons) == (500, [], [("gate_failed", 500)])
    assert "secret" not in answer.text


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


async def lifespan(gate: Gate) -> list[dict[str, Any]]:
    """Start and stop; what the gate told the server."""
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    await gate({"type": "lifespan"}, receive, send)
    return sent


async def test_the_publisher_stops_before_the_server_says_that_it_has(site: Site) -> None:
    """Goodbye is said while the process still lives."""
    sent = await lifespan(site.gate)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert site.stopped == 1


async def test_a_gate_that_can_not_open_stops_the_start(site: Site) -> None:
    """One sentence says why, and no request is answered."""

    def refuse(_: Any) -> Auditor:
        raise RuntimeError("inferwatch's plugin is not active in this vLLM")

    gate = Gate(site.app, auditor=refuse, stop=site.stop)
    assert await lifespan(gate) == [
        {"type": "lifespan.startup.failed", "message": "inferwatch: inferwatch's plugin is not active in this vLLM"}
    ]
    site.gate = gate
    assert (await site.send("POST", CHAT, json=BODY)).status_code == 503
    assert (await site.send("GET", "/health")).status_code == 503
    assert site.app.bodies == []


@pytest.mark.parametrize("make", [lambda text: {**BODY, "messages": [{"role": "user", "content": text}]}])
async def test_no_canary_in_any_rejection_log_or_answer(
    make: Callable[[str], dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """A word of the prompt, the key, the path or a header is in nothing that the gate writes."""
    site, canary = Site(GateConfig()), "canary7f3a"
    body = json.dumps(make(canary))
    answers = [
        await site.send("POST", CHAT, key=canary, content=body),
        await site.send("POST", f"/{canary}", content=body),
        await site.send("POST", CHAT, content=body + canary),
        await site.send("POST", CHAT, content=body.replace("{", '{"a":1,"a":"' + canary + '",', 1)),
        await site.send("POST", CHAT, headers=[("x-session-id", canary), ("x-session-id", canary)], content=body),
    ]
    site.app.status, site.app.engine_requests = 400, 0
    await site.send("POST", CHAT, headers=[("x-session-id", canary)], content=body)
    assert len(site.publisher.rejections) == 6
    written = "".join(map(str, site.publisher.rejections)) + "".join(answer.text for answer in answers)
    out, err = capfd.readouterr()
    assert canary not in written + out + err
