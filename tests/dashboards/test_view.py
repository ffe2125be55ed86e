"""The HTML view over HTTP: pages, refusals, trouble in one panel, and data that try to be markup."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient, TestServer

from collector.event import from_timestamp_us
from dashboards.config import DashboardsConfig
from dashboards.panels import BY_NAME, PANELS
from dashboards.shield import host_name
from dashboards.view import Query, make_view, serve_view
from detectors.finding import Finding, encode
from tests.dashboards import day
from tests.dashboards.stored import StoreProcess
from tests.dashboards.test_markup import NASTY, Tags

Client = TestClient[web.Request, web.Application]


async def client_of(query: Query, **settings: Any) -> Client:
    """A client of a view on a free loopback port."""
    client = TestClient(TestServer(make_view(query, DashboardsConfig(**settings))))
    await client.start_server()
    return client


@pytest.fixture
async def client(seeded: StoreProcess) -> AsyncIterator[Client]:
    """A client of the view over the seeded store."""
    made = await client_of(seeded.query)
    yield made
    await made.close()


async def page(client: Client, path: str, status: int = 200) -> str:
    """The body of a page that answers with `status`."""
    async with client.get(path) as answer:
        assert answer.status == status
        return await answer.text()


async def test_the_overview_shows_every_panel_with_its_data(client: Client) -> None:
    """All panels are there, the plots have paths, and none is in trouble."""
    html = await page(client, "/?range=6h")
    assert re.findall(r'data-panel="(\w+)"', html) == [panel.name for panel in PANELS]
    assert "trouble" not in html
    lines = re.findall(r'class="line c\d" d="(M[^"]{100,})"', html)
    assert len(lines) >= 10
    assert len(re.findall(r'class="bar [\w ]+" d="M', html)) >= 3
    assert "One session had 62 different prompts blocked" in html


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
async def test_each_panel_has_a_page_and_a_part(client: Client, panel: Any) -> None:
    """The part is the panel's section alone, the page has it within a whole document."""
    part = await page(client, f"/panel/{panel.name}?range=6h&part=1")
    assert part.startswith("<section")
    assert "<html" not in part
    whole = await page(client, f"/panel/{panel.name}?range=6h")
    assert whole.startswith("<!doctype html>")
    assert f'id="panel-{panel.name}"' in whole


async def test_a_finding_shows_why_what_to_do_and_where_to_look(client: Client) -> None:
    """Statistic, runbook, offsets, replay command, sample events, revisions and ids are on its page."""
    html = await page(client, "/?range=6h")
    address = next(found for found in re.findall(r'href="(/finding/[^"]+)"', html)).replace("&amp;", "&")
    found = await page(client, address)
    text = Tags(found).text
    for told in (
        "near copies of each other", "threshold8 prompts", "baseline0.40 prompts", "less than once in 10^14",
        "suspect the rollout", "iw.events/0 1200–1900", "iw.events/2 1214–1900",
        "inferwatch backtest --from 0:1200 --detector probing", "AML.T0051.000, AML.T0054", "LLM01",
        "revision 3: updated", "revision 1: opened", "Block rate by guard",
    ):  # fmt: skip
        assert told in text, told
    assert found.count("injection block 0.97 (input)") >= 3
    user = re.search(r'href="(/events\?[^"]*user=u_[^"]+session=s_[^"]+)"', found)
    assert user is not None
    listed = await page(client, user.group(1).replace("&amp;", "&"))
    assert listed.count("<tr>") > 60


async def test_an_unknown_finding_panel_or_file_is_a_sentence(client: Client) -> None:
    """404 with one sentence; nothing of the file system is served."""
    assert "no finding with this uid" in await page(client, "/finding/" + "0" * 32, 404)
    assert await page(client, "/panel/nothing", 404) == "There is no such panel.\n"
    assert await page(client, "/static/..%2fconfig.py", 404) == "There is no such file.\n"
    assert "1h" in await page(client, "/?range=forever", 400)


async def test_events_are_listed_by_hash_and_by_user(client: Client, end_us: int) -> None:
    """A prompt's hash finds its one event; only blocked ones are listed when asked."""
    made, _ = day.seeded(7, end_us, day_s=4 * 3_600)
    event = next(row.event for row in reversed(made) if row.event.blocked)
    html = await page(client, f"/events?range=6h&prompt={event.prompt_hash}")
    assert html.count("<tr>") == 2
    assert event.event_id in html
    blocked = await page(client, "/events?range=6h&only=blocked")
    assert "blocked_input" in blocked
    assert ">ok<" not in blocked
    assert "No such events" in await page(client, "/events?range=6h&user=u_nobody")


async def test_an_empty_store_is_told_in_each_panel(empty: StoreProcess) -> None:
    """No events: every plot and table says so in its own sentence, and nothing is in trouble."""
    client = await client_of(empty.query)
    html = await page(client, "/")
    await client.close()
    assert "trouble" not in html
    for panel in PANELS:
        if panel.kind in ("timeseries", "table"):
            assert panel.empty in html
    assert len(re.findall(r'class="sentence empty"', html)) >= 11


async def test_every_answer_forbids_what_could_harm(client: Client) -> None:
    """Policy, nosniff, no framing and no storing are on pages, parts, files and refusals alike."""
    for path in ("/", "/panel/latency?part=1", "/static/view.js", "/finding/x", "/panel/x", "/?range=x", "/none"):
        async with client.get(path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["X-Frame-Options"] == "DENY"
            assert answer.headers["Cache-Control"] == "no-store"
            assert "Server" not in answer.headers


async def test_no_page_has_inline_script_or_style_or_a_foreign_address(client: Client) -> None:
    """Scripts come from /static alone, no element carries a style or a handler, every link stays on this host."""
    overview = await page(client, "/?range=6h")
    address = next(found for found in re.findall(r'href="(/finding/[^"]+)"', overview)).replace("&amp;", "&")
    for html in (overview, await page(client, address), await page(client, "/events?range=6h")):
        for tag, attributes in Tags(html).tags:
            assert not [name for name in attributes if name.startswith("on") or name == "style"]
            assert tag != "style"
            assert tag != "script" or (attributes.get("src") or "").startswith("/static/")
            for name in ("href", "src", "action"):
                assert (attributes.get(name) or "/").startswith(("/", "#"))
                assert not (attributes.get(name) or "/").startswith("//")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost:99"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "soc-wall.internal"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
    ],
)
async def test_only_known_hosts_and_own_pages_may_ask(headers: dict[str, str], status: int) -> None:
    """Another name (DNS rebinding) and another site's script, image or frame are refused; a link may be followed."""
    client = await client_of(lambda _sql, _parameters: [], allowed_hosts=("soc-wall.internal",))
    async with client.get("/panel/latency", headers=headers) as answer:
        assert answer.status == status
    await client.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_the_view_only_reads(method: str) -> None:
    """Any other method is refused, whatever the path."""
    client = await client_of(lambda _sql, _parameters: [])
    async with client.request(method, "/panel/latency") as answer:
        assert answer.status == 405
    await client.close()


def test_a_host_header_is_cut_to_its_name() -> None:
    """Ports, brackets and a final dot are no part of the name."""
    assert [host_name(host) for host in ("a.b:1", "[::1]:80", "LocalHost.", "[fe80::1", "")] == [
        "a.b", "::1", "localhost", "fe80::1", "",
    ]  # fmt: skip


class Store:
    """Answers nothing, except where told to fail or to hang."""

    def __init__(self, failing: str = "", error: Exception | None = None, wait_s: float = 0) -> None:
        self.failing, self.error, self.wait_s = failing, error, wait_s
        self.asked: list[str] = []
        self.let_go = threading.Event()

    def __call__(self, sql: str, _parameters: Mapping[str, object]) -> list[dict[str, object]]:
        self.asked.append(sql)
        if self.failing in sql:
            self.let_go.wait(self.wait_s)
            if self.error is not None:
                raise self.error
        return []


def troubles(html: str) -> dict[str, str]:
    """Panel → what it says, of the panels in trouble."""
    found = re.findall(
        r'class="panel [^"]*trouble" id="panel-(\w+)".*?class="sentence bad" role="status">([^<]*)<', html
    )
    return dict(found)


async def test_one_failing_panel_harms_no_other() -> None:
    """The panel whose query fails says so, without the error's text; all others are drawn."""
    store = Store(BY_NAME["guards"].query(), RuntimeError("Code: 47. secret-canary SELECT ... UNKNOWN_IDENTIFIER"))
    client = await client_of(store)
    html = await page(client, "/")
    await client.close()
    assert troubles(html) == {"guards": "The store could not answer (RuntimeError); this panel tries again by itself."}
    assert "secret-canary" not in html
    assert html.rstrip().endswith("</html>")


async def test_a_store_that_is_down_is_told_in_every_panel() -> None:
    """Each of the panels has its sentence; the page itself is whole."""
    client = await client_of(Store("", ConnectionRefusedError("127.0.0.1:8123")))
    html = await page(client, "/")
    finding = await page(client, "/finding/abc", 503)
    events = await page(client, "/events")
    await client.close()
    assert set(troubles(html)) == {panel.name for panel in PANELS}
    assert "could not answer (ConnectionRefusedError)" in finding
    assert "could not answer (ConnectionRefusedError)" in events
    assert "127.0.0.1:8123" not in html


async def test_a_slow_query_is_given_up_and_the_others_are_shown() -> None:
    """After the time limit the panel says so; the page takes no longer than that, not the sum of all."""
    store = Store(BY_NAME["latency"].query(), wait_s=20)
    client = await client_of(store, query_timeout_s=2)
    began_s = time.monotonic()
    html = await page(client, "/")
    took_s = time.monotonic() - began_s
    store.let_go.set()
    await client.close()
    assert troubles(html) == {"latency": "The store took longer than 2 s; try a shorter time range."}
    assert took_s < 15


async def test_queries_that_cant_even_start_say_that_the_store_is_busy() -> None:
    """With every thread stuck, a panel says busy rather than slow, and no thread more is made."""
    store = Store("", wait_s=20)
    client = await client_of(store, query_timeout_s=0.3, queries_parallel=1)
    html = await page(client, "/panel/tokens")
    again = await page(client, "/panel/latency")
    store.let_go.set()
    await client.close()
    assert "took longer" in troubles(html)["tokens"] or "busy" in troubles(html)["tokens"]
    assert "busy with earlier questions" in troubles(again)["latency"]
    assert len(store.asked) == 1


async def test_the_stores_own_time_limit_is_told() -> None:
    """A query that the store stopped says so."""
    client = await client_of(Store("", RuntimeError("Code: 159. DB::Exception: TIMEOUT_EXCEEDED: SELECT secret")))
    html = await page(client, "/panel/tokens")
    await client.close()
    assert troubles(html)["tokens"].startswith("The store stopped this query after its time limit")


async def test_many_pages_ask_the_store_once() -> None:
    """Twenty walls that open the same panel together cost one query."""
    store = Store(wait_s=0.2)
    client = await client_of(store)
    await asyncio.gather(*(page(client, "/panel/sessions?range=24h&part=1") for _ in range(20)))
    await client.close()
    now = BY_NAME["sessions"].query()
    assert 1 <= store.asked.count(now) <= 4


def nasty_finding(text: str) -> Finding:
    """A finding all of whose free texts are `text`."""
    plain = day.findings(time.time_ns() // 1000)[5]
    return msgspec.structs.replace(
        plain,
        summary=text,
        tenant=text[:256],
        detector=text[:100],
        model=text[:256],
        entity=msgspec.structs.replace(plain.entity, id=text),
        statistic=msgspec.structs.replace(plain.statistic, name=text, unit=text),
        counts={text: 1},
        runbook=[text],
        cold_start=text,
        atlas=[text],
        evidence=msgspec.structs.replace(plain.evidence, replay=text, event_ids=[text]),
    )


def nasty_store(text: str) -> Query:
    """A store whose every text is `text`."""
    finding = nasty_finding(text)
    moment = from_timestamp_us(finding.last_seen_us)
    row: dict[str, object] = {
        "time": moment, "series": text, "value": 0.5, "tenant": text, "uid": finding.uid, "detector": text,
        "severity": text, "summary": text, "first_seen": moment, "last_seen": moment, "updated": moment,
        "entity_kind": text, "entity_id": text, "model": text, "state": text, "evidence_offsets": [(text, 0, 1, 2)],
        "role": text, "at": moment, "lag": 1, "late": 0, "drops": 0, "delay_s": 3.0, "version": text, "why": text,
        "label": text, "tone": text, "critical": 1, "high": 1, "medium": 1, "p50": 1.0, "p99": 2.0, "longest": 3.0,
        "ttft_p50": 1.0, "ttft_p99": 1.0, "queue_p99": 1.0, "tokens_in": 1.0, "tokens_out": 1.0, "prompts": 1,
        "blocked_requests": 1, "requests": 1, "tokens": 1, "revision": 3, "observed": 1.0,
        "json": encode(finding).decode(errors="surrogatepass"), "timestamp": moment, "event_id": text, "status": text,
        "user_id": text, "session_id": text, "prompt_hash": text, "model_version": text, "prompt_tokens": 1,
        "response_tokens": 1, "latency_ms": 1.0, "kafka_partition": 0, "kafka_offset": 1, "guard_names": [text],
        "guard_stages": [text], "guard_decisions": [text], "guard_scores": [0.5], "samples": 1,
    }  # fmt: skip
    return lambda _sql, _parameters: [row]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
async def test_data_never_become_markup(text: str) -> None:
    """Whatever a name, model or summary holds, each page has the very elements that a harmless name gives."""
    shapes = []
    for said in (text, "harmless"):
        client = await client_of(nasty_store(said))
        uid = nasty_finding(said).uid
        paths = ("/", "/panel/findings", f"/finding/{uid}", "/events?user=x")
        pages = [await page(client, path) for path in paths]
        await client.close()
        assert not any(troubles(html) for html in pages)
        shapes.append([[(tag, tuple(sorted(names))) for tag, names in Tags(html).tags] for html in pages])
        for html in pages:
            assert "\u202e" not in html
            assert "\x00" not in html
            assert "x" * 1_100 not in html
    tags = [[{tag for tag, _ in page_tags} for page_tags in shape] for shape in shapes]
    assert tags[0] == tags[1]
    assert [page_tags.count(("script", ("src",))) for page_tags in shapes[0]] == [1, 1, 1, 1]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
async def test_an_address_never_becomes_markup_or_sql(text: str) -> None:
    """A tenant, a filter or a uid from the address comes back escaped, and reaches the store as a parameter only."""
    seen: list[tuple[str, Mapping[str, object]]] = []

    def query(sql: str, parameters: Mapping[str, object]) -> list[dict[str, object]]:
        seen.append((sql, parameters))
        return []

    client = await client_of(query)
    for path in ("/", "/events", "/panel/latency"):
        options = {"tenant": text[:256], "user": text, "model": text, "theme": text, "only": text}
        async with client.get(path, params={key: value[:1_000] for key, value in options.items()}) as answer:
            html = await answer.text()
            assert answer.status == 200
        assert "<script>alert" not in html
        assert "<img" not in html
    await client.close()
    assert all(text[:12] not in sql for sql, _ in seen)


async def test_the_view_serves_on_its_port_and_refuses_a_taken_one() -> None:
    """The address it gives answers; a second view on the port fails with one sentence that names the key."""
    config = DashboardsConfig(port=0)
    runner, url = await serve_view(make_view(lambda _sql, _parameters: [], config), config)
    async with ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
    taken = DashboardsConfig(port=int(url.rpartition(":")[2]))
    with pytest.raises(OSError, match=r"set dashboards\.port"):
        await serve_view(make_view(lambda _sql, _parameters: [], taken), taken)
    await runner.cleanup()
