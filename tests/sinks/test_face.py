"""The read-only face: real clients are served, and hostile queries get nothing but a refusal."""

import asyncio
import base64
import json
from contextlib import asynccontextmanager

import aiohttp
import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError

from sinks.clickhouse.face import Face
from sinks.clickhouse.readonly import Forbidden, ReadOnlyEngine
from sinks.clickhouse.store import StoreError, open_store
from sinks.config import FaceConfig, StoreConfig
from tests.sinks.samples import START, event, stored

SECRET = "the-content-of-a-file"  # made up


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An open store with three events, and a file beside it that nobody may read."""
    folder = tmp_path_factory.mktemp("face")
    made = StoreConfig(url=str(folder / "store"), face=FaceConfig(port=0, query_timeout_s=3, parallel=2, waiting_max=2))
    store = open_store(made)
    store.insert_events([stored(event(n), n) for n in range(3)], token="t")
    yield made
    assert store.query("SELECT count() AS n FROM events") == [{"n": 3}]
    store.close()


@pytest.fixture
def secret(tmp_path, monkeypatch):
    """A file, also by a relative name that looks like a table's."""
    path = tmp_path / "secret"
    path.write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    return path


@asynccontextmanager
async def serving(config, **face):
    async with Face(config.model_copy(update={"face": config.face.model_copy(update=face)})) as made:
        yield made


def port_of(face):
    return int(face.url.rpartition(":")[2])


async def ask(face, sql, headers=None, **parameters):
    """Status and body of one POST."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(face.url, data=sql, params=parameters, headers=headers) as answer,
    ):
        return answer.status, await answer.text()


async def test_clickhouse_connect_reads(config):
    """The real client: types, parameters in URL and form, streams, data frames, its own start-up queries."""

    def read(port):
        with clickhouse_connect.get_client(host="127.0.0.1", port=port, tz_mode="aware") as client:
            rows = client.query(
                "SELECT event_id, latency_ms, guard_names, blocked FROM events ORDER BY timestamp"
            ).result_rows
            bound = client.query(
                "SELECT {a:String}, {b:Array(UInt8)}", parameters={"a": "x'\\\n\t", "b": [1, 2]}
            ).result_rows
            limited = client.query(
                "SELECT count() FROM events WHERE timestamp >= {t:DateTime64(6)}", parameters={"t": START}
            )
            with client.query_row_block_stream("SELECT number FROM numbers(200000)") as stream:
                streamed = sum(len(block) for block in stream)
            frame = client.query_df("SELECT tenant, count() AS n FROM events GROUP BY tenant")
        with clickhouse_connect.get_client(host="127.0.0.1", port=port, form_encode_query_params=True) as client:
            form = client.query("SELECT length({a:String})", parameters={"a": "y" * 5000}).result_rows
        return rows[0], bound, limited.result_rows, streamed, frame.to_dict("records"), form

    async with serving(config) as face:
        assert await asyncio.to_thread(read, port_of(face)) == (
            (event(0).event_id, 123.456789, ["injection", "secrets"], False),
            [("x'\\\n\t", [1, 2])],
            [(3,)],
            200_000,
            [{"tenant": "acme", "n": 3}],
            [(5000,)],
        )


async def test_clickhouse_connect_can_not_write(config):
    """Inserts, DDL and settings fail in the client as they would on a read-only server."""

    def write(port):
        said = []
        with clickhouse_connect.get_client(host="127.0.0.1", port=port) as client:
            for attempt in (
                lambda: client.insert("events", [["x"]], column_names=["tenant"]),
                lambda: client.command("CREATE TABLE x (a Int8) ENGINE = Memory"),
                lambda: client.command("DROP TABLE events"),
                lambda: client.query("SELECT 1", settings={"max_execution_time": 100000}),
                lambda: client.query("SELECT nope FROM events"),
            ):
                try:
                    attempt()
                except ClickHouseError as error:
                    said.append(type(error).__name__)
        return said

    async with serving(config) as face:
        assert len(await asyncio.to_thread(write, port_of(face))) == 5


async def test_the_first_question_of_clickhouse_go_is_answered_in_its_revision(config):
    """Grafana's plugin asks this first: a Native block with block info, and revision 0 so that the rest is plain."""
    question = "SELECT displayName(), version(), revision(), timezone()"
    async with (
        serving(config) as face,
        aiohttp.ClientSession() as session,
        session.post(
            face.url, data=question, params={"client_protocol_version": "54485", "default_format": "Native"}
        ) as answer,
    ):
        block = await answer.read()
    assert block.startswith(b"\x01\x00\x02\xff\xff\xff\xff\x00\x04\x01\x0ddisplayName()\x06String\x00\x0ainferwatch")
    assert b"\x0arevision()\x06UInt32\x00\x00\x00\x00\x00" in block
    assert block.endswith(b"\x0atimezone()\x06String\x00\x03UTC")


ALLOWED = [
    "SELECT count() FROM events",
    "select count() from inferwatch.events -- a comment\n format TSV",
    "/* x */ WITH x AS (SELECT tenant FROM events) SELECT count() FROM x",
    "SELECT count() FROM (SELECT * FROM findings_now UNION ALL SELECT * FROM findings_now)",
    "SELECT sum(number) FROM numbers(10)",
    "SELECT count() FROM system.columns WHERE table = 'events'",
    "SHOW TABLES",
    "SHOW CREATE TABLE events",
    "DESCRIBE TABLE events",
    "EXISTS TABLE events",
    "EXPLAIN SELECT count() FROM events",
    "SELECT quantile(0.5)(latency_ms) FROM events WHERE tenant IN ('acme') GROUP BY tenant WITH TOTALS",
    "SELECT format('{}', 'file(url)'), ' INTO OUTFILE ', 'FORMAT Null'",
    "SELECT 1;",
]


@pytest.mark.parametrize("sql", ALLOWED)
def test_reading_the_store_is_allowed(config, sql):
    """Whatever a dashboard needs."""
    assert ReadOnlyEngine(config).run(sql, "TabSeparated", {}, {}).body


HOSTILE_SQL = [
    "SELECT * FROM file('{path}', 'LineAsString')",
    "SELECT file('{path}')",
    "SELECT FILE('{path}')",
    "SELECT `file`('{path}')",
    "-- c\nSELECT file('{path}')",
    "/* c */ DESCRIBE file('{path}')",
    "SELECT file('{path}') FORMAT Null",
    "SELECT 1 FORMAT Null UNION ALL SELECT file('{path}')",
    "SELECT (SELECT file('{path}')) FROM events",
    "SELECT arrayMap(x -> file(x), ['{path}'])",
    "SELECT * APPLY (x -> file(x)) FROM (SELECT '{path}')",
    "SELECT COLUMNS('.*') APPLY file FROM (SELECT '{path}')",
    "SELECT * FROM view(SELECT file('{path}'))",
    "SELECT * FROM viewExplain('EXPLAIN', '', (SELECT file('{path}')))",
    "SELECT * FROM eval('SELECT file(\\'{path}\\')')",
    "EXPLAIN SELECT * FROM file('{path}')",
    "EXPLAIN AST SELECT file('{path}')",
    "SELECT * FROM `{path}`",
    "SELECT * FROM '{path}'",
    "SELECT * FROM default.`{path}`",
    "SELECT * FROM secret",
    "SELECT * FROM default.secret",
    "SELECT 1 IN default.secret",
    "SELECT 1 IN secret",
    "SELECT * FROM {{t:Identifier}}",
    "SELECT * FROM default.{{t:Identifier}}",
    "WITH secret AS (SELECT 1) SELECT * FROM default.secret",
    "SELECT * FROM events WHERE tenant IN file('{path}', 'LineAsString')",
    "SELECT * FROM events JOIN file('{path}', 'LineAsString') AS f ON 1 = 1",
    "SELECT 1 INTO OUTFILE '{path}.out'",
    "SELECT 1 INTO OUTFILE '{path}.out' FORMAT CSV",
    "INSERT INTO FUNCTION file('{path}.out', 'TSV', 'a Int8') SELECT 1",
    "SELECT * FROM url('http://127.0.0.1:1/', 'LineAsString')",
    "SELECT * FROM s3('http://127.0.0.1:1/b/k', 'CSV')",
    "SELECT * FROM remote('127.0.0.1', 'system.one')",
    "SELECT * FROM mysql('127.0.0.1:1', 'd', 't', 'u', 'p')",
    "SELECT * FROM sqlite('{path}', 't')",
    "SELECT * FROM executable('x.sh', 'TSV', 'a Int8')",
    "SELECT * FROM Python(SECRET)",
    "SELECT * FROM SECRET",
    "SELECT * FROM merge('.*', '.*')",
    "SELECT * FROM loop(events)",
    "SELECT * FROM filesystem('/')",
    "SELECT * FROM system.processes",
    "SELECT * FROM `system`.`query_log`",
    "SELECT 1 IN system.processes",
    "SELECT 1 SETTINGS max_execution_time = 0",
    "SELECT * FROM (SELECT 1 SETTINGS readonly = 0)",
    "SELECT 1; DROP TABLE events",
    "SELECT 1; SELECT 2",
    "INSERT INTO events (tenant) VALUES ('x')",
    "CREATE TABLE x (a Int8) ENGINE = Memory",
    "CREATE TEMPORARY TABLE x (a Int8)",
    "DROP TABLE events",
    "TRUNCATE TABLE events",
    "ALTER TABLE events DELETE WHERE 1",
    "OPTIMIZE TABLE events FINAL",
    "DETACH TABLE events",
    "RENAME TABLE events TO x",
    "USE default",
    "SET readonly = 0",
    "SYSTEM SHUTDOWN",
    "SYSTEM STOP MERGES",
    "KILL QUERY WHERE 1",
    "BACKUP TABLE events TO File('{path}.zip')",
    "SHOW PROCESSLIST",
    "SELECT sleepEachRow(3) FROM numbers(100)",
    "SELECT dictGet('d', 'a', 1)",
    "",
    "nonsense",
    "SELECT",
    "(" * 2000,
]


@pytest.mark.parametrize("sql", HOSTILE_SQL)
async def test_hostile_queries_are_refused(config, secret, sql):
    """No content of a file in the answer, no file written, and the store goes on."""
    query = sql.format(path=secret)
    try:
        answer = ReadOnlyEngine(config).run(query, "TabSeparated", {"t": str(secret)}, {})
    except (Forbidden, RuntimeError) as error:
        said = str(error)
    else:
        said = answer.body.decode()
        pytest.fail(f"answered: {said[:200]}")
    assert SECRET not in said
    assert [entry.name for entry in secret.parent.iterdir()] == ["secret"]
    assert ReadOnlyEngine(config).run("SELECT count() FROM events", "TSV", {}, {}).body == b"3\n"


async def test_limits_can_be_lowered_only(config):
    """A client's own time limit is taken when shorter; other settings are refused by name."""
    async with serving(config) as face:
        slow = "SELECT sum(cityHash64(number)) FROM numbers(100000000000)"
        status, said = await ask(face, slow, max_execution_time="1")
        assert (status, "Timeout exceeded" in said, "maximum: 1000" in said) == (408, True, True)
        status, said = await ask(face, slow, max_execution_time="999")
        assert (status, "maximum: 3000" in said) == (408, True)
        assert (await ask(face, "SELECT 1", readonly="0"))[0] == 403
        assert await ask(face, "SELECT 1", allow_introspection_functions="1") == (
            403,
            "Code: 164. DB::Exception: setting allow_introspection_functions can't be changed here\n",
        )
        assert (await ask(face, "SELECT 1", max_threads="1; DROP TABLE events"))[0] == 403


async def test_a_large_result_is_refused(config):
    """Before it fills the memory of the store process."""
    async with serving(config, result_max_mb=1) as face:
        status, said = await ask(face, "SELECT number FROM numbers(10000000)")
    assert (status, "Limit for result exceeded" in said) == (400, True)


async def test_a_flood_is_refused(config):
    """Beyond those that run and those that may wait, 503; afterwards all is well."""
    async with serving(config) as face:
        slow = "SELECT sum(cityHash64(number)) FROM numbers(100000000000)"
        answers = await asyncio.gather(*(ask(face, slow, max_execution_time="1") for _ in range(8)))
        assert sorted(status for status, _ in answers) == [408] * 4 + [503] * 4
        assert (await ask(face, "SELECT 1"))[0] == 200


async def test_a_password_is_asked_for(config, tmp_path):
    """By header, by basic authentication or in the URL; a wrong one gives 403 and no hint."""
    (tmp_path / "password").write_text("correct horse\n")
    basic = base64.b64encode(b"default:correct horse").decode()
    async with serving(config, password_file=tmp_path / "password") as face:
        good = [
            await ask(face, "SELECT 1", {"X-ClickHouse-User": "default", "X-ClickHouse-Key": "correct horse"}),
            await ask(face, "SELECT 1", {"Authorization": f"Basic {basic}"}),
            await ask(face, "SELECT 1", user="default", password="correct horse"),
        ]
        bad = [
            await ask(face, "SELECT 1"),
            await ask(face, "SELECT 1", {"X-ClickHouse-Key": "wrong"}),
            await ask(face, "SELECT 1", {"X-ClickHouse-User": "root", "X-ClickHouse-Key": "correct horse"}),
            await ask(face, "SELECT 1", {"Authorization": "Basic !!!"}),
            await ask(face, "SELECT 1", {"Authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()}),
        ]
    assert good == [(200, "1\n")] * 3
    assert {status for status, _ in bad} == {403}
    assert not any("correct" in said for _, said in bad)


async def test_a_name_that_leads_here_is_not_enough(config):
    """Without a password only calls by this machine's own name are answered (DNS rebinding from a web page)."""
    async with serving(config) as face:
        assert (await ask(face, "SELECT 1", {"Host": f"evil.example:{port_of(face)}"}))[0] == 403
        assert (await ask(face, "SELECT 1", {"Host": f"localhost:{port_of(face)}"}))[0] == 200


async def test_odd_requests_are_answered(config):
    """No traceback and no 500: bytes that are no text, too much, unknown compression, GET, ping, nothing."""
    async with serving(config, body_max_kb=16) as face, aiohttp.ClientSession() as session:
        assert (await ask(face, b"\xff\xfe"))[0] == 400
        assert (await ask(face, "SELECT '" + "x" * 20_000 + "'"))[0] == 413
        assert (await ask(face, "SELECT 1", compress="1"))[0] == 400
        assert await ask(face, "") == (200, "Ok.\n")
        async with session.get(face.url, params={"query": "SELECT 1 AS a FORMAT JSON"}) as answer:
            assert json.loads(await answer.read())["data"] == [{"a": 1}]
            assert answer.headers["X-ClickHouse-Format"] == "JSON"
        async with session.get(f"{face.url}/ping") as answer:
            assert await answer.text() == "Ok.\n"
        async with session.delete(face.url) as answer:
            assert answer.status == 405


async def test_settings_that_can_not_be_are_one_sentence(config, tmp_path):
    """A server needs no face; beyond this machine a password is a must; a missing file and a taken port say so."""
    with pytest.raises(StoreError, match="a ClickHouse server has its own"):
        Face(StoreConfig(url="http://127.0.0.1:8123/iw"))
    with pytest.raises(StoreError, match=r"0\.0\.0\.0 is not this machine alone: set store\.face\.password_file"):
        async with serving(config, host="0.0.0.0"):  # noqa: S104  # refused before it listens
            pass
    with pytest.raises(StoreError, match=r"password_file .*nope can't be read: No such file"):
        async with serving(config, password_file=tmp_path / "nope"):
            pass
    async with serving(config) as face:
        with pytest.raises(StoreError, match=r"can't listen on 127\.0\.0\.1:\d+: "):
            async with serving(config, port=port_of(face)):
                pass
