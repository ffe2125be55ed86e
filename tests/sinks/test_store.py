"""The store on a real chDB: nothing lost, nothing doubled, across restarts and SIGKILL."""

import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from collector.event import AuditEvent, Rejection
from detectors.finding import Finding, decode
from sinks.clickhouse import rows as rows_module
from sinks.clickhouse.store import BATCH_ROWS_MAX, StoreError, StoreInUse, open_store, record_of, schema
from sinks.config import StoreConfig
from tests.sinks.samples import HOSTILE, START, START_US, event, finding, hostile, rejection, stored

ROOT = Path(__file__).parents[2]
COUNTS = (
    "SELECT count() AS n, countIf(late) AS late, countIf(duplicate) AS duplicate, countIf(quarantined) AS quarantined "
    "FROM events"
)


@pytest.fixture
def config(tmp_path):
    kept = {"events_days": 3_650, "rollup_days": 3_650, "findings_days": 3_650}  # the samples have a fixed date
    return StoreConfig(url=f"chdb://{tmp_path}/store", readers=2, query_timeout_s=5, **kept)


@pytest.fixture
def store(config):
    opened = open_store(config)
    yield opened
    opened.close()


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `program` in a process of its own with the store's names imported."""
    head = (
        "import os, sys\nfrom sinks.config import StoreConfig\nfrom sinks.clickhouse.store import *\n"
        "from tests.sinks.samples import *\nconfig = StoreConfig(url=sys.argv[1])\n"
    )
    command = [sys.executable, "-c", head + program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)


def test_an_event_comes_back_equal(store):
    """Every field of the event and of the rejection survives, to the microsecond and the last bit of a float."""
    events = [event(1), rejection(2), event(3, adapter=None, guardrail_results=[], ttft_ms=None, latency_ms=0.1 + 0.2)]
    store.insert_events([stored(e, n) for n, e in enumerate(events)], token="t")
    read = store.query("SELECT * FROM events ORDER BY kafka_offset")
    assert [record_of(row) for row in read] == events
    assert [type(record_of(row)) for row in read] == [AuditEvent, Rejection, AuditEvent]
    assert read[0]["append_time"] == datetime(2026, 11, 20, 12, 0, 1, tzinfo=UTC)
    assert read[0]["guard_decisions"] == ["allow", "error"]


def test_no_field_of_the_event_is_forgotten():
    """A field added to the event must be given a column, or the store would lose it."""
    columns = set(rows_module.event_columns([stored(event(), 0)]))
    elsewhere = {"guardrail_results": "guard_names", "adapter": "adapter_name"}
    fields = {elsewhere.get(field.name, field.name) for field in msgspec.structs.fields(AuditEvent)}
    assert fields - columns == set()
    assert {field.name for field in msgspec.structs.fields(type(event().guardrail_results[0]))} == set(
        rows_module._GUARD.values()
    )


def test_the_same_batch_twice_is_there_once(store):
    """In the events and in the minute counters."""
    batch = [stored(event(n, blocked=n < 3), n) for n in range(10)]
    for _ in range(3):
        store.insert_events(batch, token="iw.events:0:0-9")
    assert store.query("SELECT count() AS n FROM events") == [{"n": 10}]
    assert store.query("SELECT sum(events) AS n, sum(blocked) AS b FROM events_1m") == [{"n": 10, "b": 3}]


def test_other_rows_under_an_old_token_are_stored(store):
    """A topic made anew begins at offset 0 again: its events must not be taken for a repetition."""
    store.insert_events([stored(event(n), n) for n in range(5)], token="iw.events:0:0-4")
    store.insert_events([stored(event(100 + n), n) for n in range(5)], token="iw.events:0:0-4")
    assert store.query("SELECT count() AS n FROM events") == [{"n": 10}]


def test_a_batch_cut_elsewhere_doubles_no_event(store):
    """The table replaces by offset; FINAL shows at once what merging makes of it."""
    store.insert_events([stored(event(n), n) for n in range(8)], token="iw.events:0:0-7")
    store.insert_events([stored(event(n), n) for n in range(5, 12)], token="iw.events:0:5-11")
    assert store.query("SELECT count() AS n FROM events FINAL") == [{"n": 12}]


def test_flags_keep_rows_apart(store):
    """A duplicate lies beside the first; only late ones are counted in the minutes."""
    batch = [
        stored(event(1), 0),
        stored(event(1), 1, "duplicate"),
        stored(event(2), 2, "late"),
        stored(event(3, timestamp=START + timedelta(days=365)), 3, "quarantined"),
    ]
    store.insert_events(batch, token="t")
    assert store.query(COUNTS + " FINAL") == [{"n": 4, "late": 1, "duplicate": 1, "quarantined": 1}]
    assert store.query("SELECT sum(events) AS n, sum(late) AS late FROM events_1m") == [{"n": 2, "late": 1}]


def test_clocks_gone_wild_scatter_nothing(store):
    """Years 1 to 9999 in one batch: all stored, in one partition, and the same batch again is still no double."""
    events = [event(n, timestamp=datetime(1 + n * 33, 1, 1, tzinfo=UTC)) for n in range(303)]
    batch = [stored(e, n, "late") for n, e in enumerate(events)]
    for _ in range(2):
        store.insert_events(batch, token="t")
    assert store.query("SELECT count() AS n, uniqExact(_partition_id) AS parts FROM events") == [{"n": 303, "parts": 1}]
    kept = sum(e.timestamp > START - timedelta(days=400) for e in events)
    assert store.query("SELECT sum(events) AS n FROM events_1m") == [{"n": kept}]


def test_minutes_add_up(store):
    """Counters by status, and a percentile from the buckets within their width."""
    statuses = ["ok"] * 96 + ["aborted", "error", "lost"]
    batch = [
        stored(event(n, status=status, latency_ms=float(n + 1), response_tokens=2, prompt_tokens=3), n)
        for n, status in enumerate(statuses)
    ]
    store.insert_events([*batch, stored(rejection(200), 200)], token="t")
    row = store.query(
        "SELECT sum(events) AS events, sum(rejected) AS rejected, sum(aborted) AS aborted, sum(errors) AS errors, "
        "sum(lost) AS lost, sum(response_tokens) AS tokens, max(latency_ms_max) AS slowest FROM events_1m"
    )[0]
    assert row == {
        "events": 100, "rejected": 1, "aborted": 1, "errors": 1, "lost": 1, "tokens": 198, "slowest": 96.0,
    }  # fmt: skip
    median = store.query(
        "SELECT quantileExactWeighted(0.5)(exp2((toInt32(b.1) + 0.5) / 8) - 1, b.2) AS p50 "
        "FROM (SELECT arrayJoin(latency_buckets::Array(Tuple(String, UInt64))) AS b FROM events_1m)"
    )[0]["p50"]
    assert median == pytest.approx(48.5, rel=0.09)


def test_findings_are_kept_by_revision_and_shown_once(store):
    """Every revision is there, a repeated one once; `findings_now` has the last of each; `json` is the finding."""
    revisions = [finding("a", 1), finding("a", 2, state="close"), finding("b", 1)]
    store.insert_findings(revisions[:2], token="0-1")
    store.insert_findings(revisions, token="0-2")
    assert store.query("SELECT count() AS n FROM findings FINAL") == [{"n": 3}]
    now = store.query(
        "SELECT uid, revision, state, first_seen, counts, evidence_offsets FROM findings_now ORDER BY uid"
    )
    assert [(row["uid"], row["revision"], row["state"]) for row in now] == [("a", 2, "close"), ("b", 1, "open")]
    assert (now[0]["first_seen"], now[0]["counts"]) == (START, {"events": 60, "blocked": 42})
    read = store.query("SELECT json FROM findings FINAL ORDER BY uid, revision")
    assert [decode(str(row["json"]).encode()) for row in read] == revisions


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("surrogates", "megabyte")])
def test_hostile_values_come_back(store, name):
    """Any text that JSON can carry is stored as it was."""
    found: Finding = hostile(HOSTILE[name])
    store.insert_findings([found], token="t")
    read = store.query("SELECT json, summary, entity_id FROM findings WHERE summary = {s:String}", {"s": HOSTILE[name]})
    assert [decode(str(row["json"]).encode()) for row in read] == [found]


def test_status_keeps_the_newest_of_each_process(store):
    """As streams writes it; a record without a time is an error that names the field."""
    now = datetime.now(UTC).replace(microsecond=0)  # what is older than the days of status goes at any merge
    behind = now - timedelta(milliseconds=500)
    record = {
        "process_id": "p", "role": "store", "at": (now - timedelta(seconds=10)).isoformat(), "version": "1", "lag": 7,
        "watermark": "", "late": 1, "drops": 0, "extra": {"any": "thing"},
    }  # fmt: skip
    newer = record | {"at": now.isoformat(), "watermark": behind.isoformat(timespec="milliseconds"), "lag": 0}
    store.insert_status([newer], token="1")
    store.insert_status([record], token="0")
    assert store.query("SELECT process_id, lag, watermark, drops FROM process_status") == [
        {"process_id": "p", "lag": 0, "watermark": behind, "drops": 0}
    ]
    with pytest.raises(msgspec.ValidationError, match="role"):
        store.insert_status([{"process_id": "p", "at": record["at"]}], token="2")


def test_queries_are_limited_and_can_not_write(store):
    """Time, rows and writing each end in one sentence; the next query works."""
    with pytest.raises(StoreError, match="READONLY"):
        store.query("CREATE TABLE x (a Int8) ENGINE = Memory")
    with pytest.raises(StoreError, match="Limit for result exceeded"):
        store.query("SELECT number FROM numbers(2000000)")
    with pytest.raises(StoreError, match="Timeout exceeded"):
        store.query("SELECT sum(cityHash64(number)) FROM numbers(100000000000)")
    assert store.query("SELECT {a:String} AS a, {b:Array(UInt8)} AS b", {"a": "x'\\\n", "b": [1, 2]}) == [
        {"a": "x'\\\n", "b": [1, 2]}
    ]


def test_threads_share_the_store(store):
    """Inserts and queries from many threads at once: every batch is there, no query fails."""
    failures = []

    def work(number):
        try:
            for step in range(5):
                batch = [
                    stored(event(number * 1000 + step * 10 + k), step * 10 + k, partition=number) for k in range(10)
                ]
                store.insert_events(batch, token=f"{number}:{step}")
                store.query("SELECT count() AS n FROM events")
        except Exception as error:  # noqa: BLE001  # shown below, from any thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.query("SELECT count() AS n FROM events") == [{"n": 300}]


def test_empty_and_oversized_batches(store):
    """Nothing to do, and more than fits one block."""
    store.insert_events([], token="t")
    one = stored(event(), 0)
    with pytest.raises(ValueError, match="at most 100000"):
        store.insert_events([one] * (BATCH_ROWS_MAX + 1), token="t")


def test_a_restart_keeps_rows_and_tokens(config):
    """The same batch after a restart is still no double, and retention follows the configuration."""
    batch = [stored(event(n), n) for n in range(10)]
    for days in (90, 30):
        reopened = open_store(config.model_copy(update={"events_days": days}))
        reopened.insert_events(batch, token="iw.events:0:0-9")
        assert reopened.query("SELECT count() AS n FROM events") == [{"n": 10}]
        assert reopened.query("SELECT sum(events) AS n FROM events_1m") == [{"n": 10}]
        made = reopened.query("SELECT engine_full FROM system.tables WHERE name = 'events' AND database = 'inferwatch'")
        assert f"toIntervalDay({days})" in str(made)
        reopened.close()


def test_old_rows_go(config):
    """What the broker appended longer ago than the retention is dropped."""
    opened = open_store(config)
    old = stored(event(1), 0)._replace(append_ms=START_US // 1000 - 4_000 * 86_400_000)
    opened.insert_events([old], token="a")
    opened.insert_events([stored(event(2), 1)._replace(append_ms=3_000_000_000_000)], token="b")
    opened._command("OPTIMIZE TABLE events FINAL")
    assert opened.query("SELECT kafka_offset FROM events") == [{"kafka_offset": 1}]
    opened.close()


def test_sigkill_loses_and_doubles_nothing(tmp_path):
    """Killed while inserting; whoever comes next sends the same batches again: each row is there once."""
    writer = (
        "store = open_store(config)\n"
        "for b in range(40):\n"
        "    store.insert_events([stored(event(b * 50 + n), b * 50 + n) for n in range(50)], token=f'0:{b}')\n"
        "    print(b, flush=True)\n"
        "    if b == int(sys.argv[2]): os.kill(os.getpid(), 9)\n"
        "print(store.query('SELECT count() AS n FROM events'), store.query('SELECT sum(events) AS n FROM events_1m'))\n"
        "store.close()\n"
    )
    folder = str(tmp_path / "store")
    killed = [run(writer, folder, at) for at in ("3", "17")]
    assert [process.returncode for process in killed] == [-9, -9]
    last = run(writer, folder, "-1")
    assert last.stdout.splitlines()[-1] == "[{'n': 2000}] [{'n': 2000}]", last.stderr


def test_a_second_process_is_told_who_has_the_folder(config, store):
    """One sentence with the pid, not a traceback from the engine."""
    import os

    program = "try: open_store(config)\nexcept StoreInUse as error: print(error)\n"
    said = run(program, config.url).stdout
    assert f"is open in process {os.getpid()}, and chDB allows one process a folder" in said


def test_a_crash_ends_the_owner_at_once(tmp_path):
    """After chDB's import a SIGSEGV would hang the process for minutes; ours dies with a traceback."""
    program = "open_store(config)\nimport faulthandler; faulthandler._sigsegv()\n"
    died = run(program, str(tmp_path / "store"))
    assert died.returncode == -11
    assert "Fatal Python error: Segmentation fault" in died.stderr


def test_a_strangers_folder_and_a_bad_one_are_refused(tmp_path):
    """Tables of another program are left alone; a folder that can't be made is one sentence."""
    program = (
        "import clickhouse_connect as c\nx = c.get_client(interface='chdb', path=sys.argv[1])\n"
        "x.command('CREATE TABLE theirs (a Int8) ENGINE = MergeTree ORDER BY a'); x.close()\n"
        "try: open_store(config)\nexcept StoreError as error: print(error)\n"
    )
    said = run(program, str(tmp_path / "theirs")).stdout
    assert "holds tables of another program" in said
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be made: Not a directory"):
        open_store(StoreConfig(url=f"{tmp_path}/file/store"))


def test_a_server_that_is_away_is_one_sentence(tmp_path):
    """It names the address and never the password."""
    (tmp_path / "password").write_text("hunter2")
    config = StoreConfig(url="http://iw@127.0.0.1:9/iw", password_file=tmp_path / "password")
    with pytest.raises(StoreError, match=r"^no store at http://127\.0\.0\.1:9: ") as away:
        open_store(config)
    assert "hunter2" not in str(away.value)
    with pytest.raises(StoreError, match=r"password_file .*nope can't be read"):
        open_store(config.model_copy(update={"password_file": tmp_path / "nope"}))


def test_the_schema_has_no_placeholder_left():
    """Each statement is whole."""
    statements = schema(StoreConfig())
    assert len(statements) == 15
    assert all(statement.startswith(("CREATE ", "ALTER ")) and "_days" not in statement for statement in statements)


def test_the_error_type_is_exported():
    """Callers catch StoreError for all of them."""
    assert issubclass(StoreInUse, StoreError)
