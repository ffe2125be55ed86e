"""`inferwatch broker`: a real Kafka that starts, keeps its records, refuses what it must, and leaves nothing behind."""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from collector.kafka import BatchWriter, KafkaConfig, TopicPartition, ensure_topics, make_consumer, make_producer
from streams import jars
from streams.broker import Broker, BrokerError
from streams.config import BrokerSettings
from tests.conftest import RunningBroker

pytestmark = pytest.mark.kafka
ROOT = Path(__file__).parent.parent.parent


def _settings(data_dir: Path, *, port: int = 0, cache_dir: Path | None = None) -> BrokerSettings:
    return BrokerSettings(port=port, data_dir=data_dir, cache_dir=cache_dir, heap_mb=192, quick_start=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A copy of the jars that a test may spoil."""
    real = jars.classpath(jars.default_cache(), lambda _done, _all, _name: None)[0].parent
    copy = tmp_path / "cache"
    shutil.copytree(real, copy / real.name)
    return copy


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _write(config: KafkaConfig, *values: bytes) -> None:
    producer = make_producer(config, client_id="test")
    await producer.start()
    writer = BatchWriter(producer, config.topic("status"))
    for value in values:
        await writer.append(b"key-" + value, value, 0)
    await writer.flush(20)
    await producer.stop()


async def _read(config: KafkaConfig) -> list[bytes | None]:
    consumer = make_consumer(config, group_id=None)
    await consumer.start()
    status = TopicPartition(config.topic("status"), 0)
    consumer.assign([status])
    found: list[bytes | None] = []
    while len(found) < (await consumer.end_offsets([status]))[status]:
        for records in (await consumer.getmany(timeout_ms=1000)).values():
            found += [record.value for record in records]
    await consumer.stop()
    return found


async def test_records_outlive_stop_and_sigkill(tmp_path: Path) -> None:
    """After a clean stop and after SIGKILL the broker serves again on its port, with every acknowledged record."""
    broker = Broker(_settings(tmp_path))
    await asyncio.to_thread(broker.start)
    try:
        config = KafkaConfig(bootstrap_servers=broker.bootstrap)
        await ensure_topics(config)
        await _write(config, b"first")
        await asyncio.to_thread(broker.stop)
        await asyncio.to_thread(broker.start)
        await _write(config, b"second")
        await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(broker.start)
        assert broker.bootstrap == config.bootstrap_servers
        assert await _read(config) == [b"first", b"second"]
    finally:
        await asyncio.to_thread(broker.stop)


def test_cluster_id_that_looks_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cluster id in 64 begins with a dash; formatting takes it all the same."""
    monkeypatch.setattr("streams.broker.uuid.uuid4", lambda: uuid.UUID(bytes=b"\xfb" * 16))
    monkeypatch.setattr(Broker, "_start_serving", lambda *_: None)  # formatting is what is tried
    broker = Broker(_settings(tmp_path))
    broker.start()
    broker.stop()
    assert "cluster.id=-_v7" in (tmp_path / "data" / "meta.properties").read_text()


async def test_two_brokers_side_by_side(broker: RunningBroker, kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Each has its own port and records; stopping one leaves the other serving."""
    own = Broker(_settings(tmp_path / "own"))
    await asyncio.to_thread(own.start)
    own_config = kafka_config.model_copy(update={"bootstrap_servers": own.bootstrap})
    try:
        assert own.bootstrap != broker.bootstrap
        for config, value in ((kafka_config, b"shared"), (own_config, b"own")):
            await ensure_topics(config)
            await _write(config, value)
        assert [await _read(kafka_config), await _read(own_config)] == [[b"shared"], [b"own"]]
    finally:
        await asyncio.to_thread(own.stop)
    assert await _read(kafka_config) == [b"shared"]


def test_two_threads_fetch_into_one_cache(tmp_path: Path, cache: Path) -> None:
    """Those who start together with an empty cache: one fetches, all get the same verified jars."""
    lock_file, jar_names = _small_lock(tmp_path, cache)
    fetched: list[str] = []
    shared = tmp_path / "shared"
    with ThreadPoolExecutor(3) as pool:
        tasks = [
            pool.submit(jars.classpath, shared, lambda _done, _all, name: fetched.append(name), lock_file=lock_file)
            for _ in range(3)
        ]
        paths = [[path.name for path in task.result()] for task in tasks]
    assert paths == [jar_names] * 3
    assert fetched == jar_names
    assert [entry.name for entry in shared.iterdir() if entry.name.startswith(".")] == []


def _small_lock(folder: Path, cache: Path) -> tuple[Path, list[str]]:
    """A lock of the two smallest jars, so that fetching is quick."""
    sizes = {jar: next(cache.glob(f"*/{jar.file_name}")).stat().st_size for jar in jars.locked_jars()}
    smallest = sorted(sizes, key=lambda jar: sizes[jar])[:2]
    rows = [
        f'[[dependencies]]\ngroupId = "{jar.group}"\nartifactId = "{jar.artifact}"\n'
        f'version = "{jar.version}"\nsha256 = "{jar.sha256}"\n'
        for jar in smallest
    ]
    lock_file = folder / "small.lock.toml"
    lock_file.write_text("\n".join(rows))
    return lock_file, [jar.file_name for jar in smallest]


def test_fetched_jar_that_is_not_the_locks_is_refused(tmp_path: Path, cache: Path) -> None:
    """What the network delivers is checked like the rest; a wrong jar leaves no folder behind."""
    lock_file, jar_names = _small_lock(tmp_path, cache)
    lines = lock_file.read_text().splitlines()
    lines[4] = f'sha256 = "{"0" * 64}"'
    lock_file.write_text("\n".join(lines))
    shared = tmp_path / "shared"
    with pytest.raises(jars.JarError, match=rf"{jar_names[0]} is not the jar that the lock file names"):
        jars.classpath(shared, lambda _done, _all, _name: None, lock_file=lock_file)
    assert [entry.name for entry in shared.iterdir() if entry.is_dir()] == []


def test_tampered_jar_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    """One changed byte in one jar stops the start before Java runs, with the jar's name and what to do."""
    victim = next(cache.glob("*/kafka-clients-*.jar"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    broker = Broker(_settings(tmp_path / "data", cache_dir=cache))
    with pytest.raises(
        jars.JarError, match=rf"{victim.name} is not the jar .*: delete {victim.parent} and start again"
    ):
        broker.start()
    assert broker.pid is None
    assert not (tmp_path / "data").exists()


def test_missing_jar_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    """A jar that is gone is named too."""
    victim = next(cache.glob("*/zstd-jni-*.jar"))
    victim.unlink()
    with pytest.raises(jars.JarError, match=rf"{victim.name} is missing"):
        Broker(_settings(tmp_path / "data", cache_dir=cache)).start()


def test_added_jar_is_not_loaded(cache: Path) -> None:
    """A jar that someone put beside the others is not on the class path."""
    intruder = next(cache.glob("*/kafka-clients-*.jar")).with_name("intruder.jar")
    intruder.write_bytes(b"PK")
    paths = jars.classpath(cache, lambda _done, _all, _name: None)
    assert intruder not in paths
    assert len(paths) == len(jars.locked_jars())


def test_lock_names_every_jar_and_no_address() -> None:
    """The lock has a SHA-256 for every jar, an SLF4J binding among them, and says nothing of where they come from."""
    text = jars.LOCK_FILE.read_text() + jars.LOCK_FILE.with_name("jgo.toml").read_text()
    assert "://" not in text
    locked = jars.locked_jars()
    assert all(len(jar.sha256) == 64 and set(jar.sha256) <= set("0123456789abcdef") for jar in locked)
    assert {"kafka_2.13-4.3.1.jar", "slf4j-jdk14-1.7.36.jar"} <= {jar.file_name for jar in locked}
    assert len({jar.file_name for jar in locked}) == len(locked)


def test_taken_port_is_one_sentence(tmp_path: Path) -> None:
    """A port that another program holds is named, with the setting that helps; nothing is left running."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        broker = Broker(_settings(tmp_path / "data", port=port))
        with pytest.raises(
            BrokerError, match=rf"^port {port} of 127\.0\.0\.1 is taken .*: set broker\.port, or 0 for any$"
        ):
            broker.start()
    assert broker.pid is None


def test_data_folder_in_use_is_one_sentence(broker: RunningBroker) -> None:
    """A second broker on the same folder is refused and does the first no harm."""
    second = Broker(_settings(broker.data_dir))
    with pytest.raises(BrokerError, match=rf"^another broker uses {broker.data_dir}: stop it, or set another"):
        second.start()
    assert _alive(broker.pid)
    assert (broker.data_dir / "broker.json").is_file()


def test_unusable_data_folder_is_one_sentence(tmp_path: Path) -> None:
    """A data folder that is a file, and one with a comma (Kafka's separator), are refused."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BrokerError, match=r"can't use broker\.data_dir"):
        Broker(_settings(tmp_path / "file")).start()
    with pytest.raises(BrokerError, match=r"no comma"):
        Broker(_settings(tmp_path / "a,b")).start()


def test_log_says_why_kafka_did_not_start(tmp_path: Path) -> None:
    """When Kafka itself gives up, its reason and the folder of the logs are in the sentence."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.properties").write_text("version=1\ncluster.id=other\nnode.id=9\n")
    broker = Broker(_settings(tmp_path))
    with pytest.raises(BrokerError, match=r"^Kafka stopped while starting: .*(meta\.properties|node\.id|9).*logs"):
        broker.start()
    assert broker.pid is None


def _command(data_dir: Path) -> subprocess.Popen[bytes]:
    options = ["--port", "0", "--data-dir", str(data_dir), "--heap-mb", "192", "--quick-start"]
    return subprocess.Popen(
        [sys.executable, "-m", "streams.broker", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _wait_for(file: Path, process: subprocess.Popen[bytes]) -> dict[str, object]:
    end_s = time.monotonic() + 60
    while not file.is_file():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return dict(json.loads(file.read_text()))


def _wait_gone(pid: int) -> bool:
    end_s = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < end_s:
        time.sleep(0.05)
    return not _alive(pid)


def _folder_is_free(data_dir: Path) -> bool:
    """Whether nobody holds the folder's lock, which the Java process shares for as long as it lives."""
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_all_of_it(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C end the command with status 0, no traceback, no Java process, no run file, records closed."""
    process = _command(tmp_path)
    told = _wait_for(tmp_path / "broker.json", process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"Traceback" not in said
    assert f"serves at {told['bootstrap']}".encode() in said
    assert _wait_gone(int(str(told["pid"])))
    assert not (tmp_path / "broker.json").exists()
    assert (tmp_path / "data" / ".kafka_cleanshutdown").exists()


def test_signal_while_starting_stops_all_of_it(tmp_path: Path) -> None:
    """SIGTERM before the broker serves ends it as cleanly."""
    process = _command(tmp_path)
    end_s = time.monotonic() + 60
    while not (tmp_path / "logs" / "broker.0.log").is_file():
        assert time.monotonic() < end_s
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"Traceback" not in said
    assert _folder_is_free(tmp_path)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is absent: Java can't be tied to its parent")
def test_sigkill_of_the_command_takes_java_with_it(tmp_path: Path) -> None:
    """Even SIGKILL of the Python process leaves no Java process behind."""
    process = _command(tmp_path)
    told = _wait_for(tmp_path / "broker.json", process)
    process.kill()
    process.communicate()
    assert _wait_gone(int(str(told["pid"])))
    assert _folder_is_free(tmp_path)


def test_command_says_one_sentence_and_fails(tmp_path: Path) -> None:
    """Bad input on the command line: status 1, one line, no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "streams.broker", "--port", port, "--data-dir", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"inferwatch broker: port {port} of 127.0.0.1 is taken")
    assert "Traceback" not in done.stderr


def test_logs_are_bounded(tmp_path: Path) -> None:
    """Log files are turned over at their limit (one line may go over it), and at most three are kept."""
    settings = _settings(tmp_path).model_copy(update={"log_bytes_max": 16 * 1024})
    broker = Broker(settings)
    broker.start()  # writes about 130 KiB
    broker.stop()
    files = sorted(file.name for file in broker.logs_dir.glob("broker.*.log"))
    assert files == ["broker.0.log", "broker.1.log", "broker.2.log"]
    assert max(file.stat().st_size for file in broker.logs_dir.glob("broker.*.log")) < 32 * 1024
