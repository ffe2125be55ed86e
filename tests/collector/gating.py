"""A gate with what is behind it: a recording app, a recording publisher, a guard that knows one word."""

import threading
from typing import Any

import httpx

from collector.auditor import Auditor
from collector.context import exchange
from collector.doors import Identity
from collector.gate import Gate
from collector.guards.config import GuardsConfig
from collector.guards.protocol import Judgement, Probe
from collector.guards.secrets import SecretsConfig
from collector.guards.stack import GuardStack
from collector.identity import KeyRing, Pseudonyms, new_api_key
from collector.journal import JournalFull
from collector.judging import JudgingThreads
from collector.lanes import Counters
from collector.routes import GateConfig

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
    """A guard that blocks `attack`, waits where it says `wait`, and remembers its threads."""

    name, version = "secrets", "test"
    stages = frozenset({"input", "tool", "retrieved"})
    labels = frozenset({"attack"})
    probes = (Probe("attack", "input", block=True), Probe("fine", "input", block=False))

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.waiting, self.go_on = threading.Semaphore(0), threading.Event()

    def judge(self, text: str, stage: str, context: object = None) -> Judgement:
        """The judgement."""
        self.threads.add(threading.current_thread().name)
        if "wait" in text:
            self.waiting.release()
            self.go_on.wait(10)
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

    def __init__(
        self,
        config: GateConfig,
        *,
        guarded: bool = True,
        policy: SecretsConfig | None = None,
        threads: JudgingThreads | None = None,
    ) -> None:
        self.app, self.publisher = App(), Recorder()
        self.key, key_id, table = new_api_key(user="alice")
        self.proxy_key, proxy_id, proxy = new_api_key(user="proxy", on_behalf=True)
        policy = policy or SecretsConfig(stages=frozenset(Watch.stages))
        order = ("secrets",) if guarded else ()
        self.guard = Watch()
        guards = GuardStack(GuardsConfig(order=order, secrets=policy, cache_entries=0), guards={"secrets": self.guard})
        self.auditor = Auditor(
            self.publisher,  # type: ignore[arg-type]  # the recorder has what the auditor calls
            guards,
            Identity(
                keys=KeyRing({key_id: table, proxy_id: proxy}), pseudonyms={"default": Pseudonyms(bytes(range(32)))}
            ),
            config,
            model_version="m@1",
            threads=threads,
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
