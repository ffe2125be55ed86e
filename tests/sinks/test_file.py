"""The file sink: whole lines, no doubles, and neighbours that rename, fill or share the file."""

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sinks.config import FileConfig
from sinks.delivery import SinkSetupError
from sinks.file import build
from tests.sinks.samples import HOSTILE, finding, hostile


def ids(path):
    """UID.REVISION of each line; fails when a line is not whole."""
    return [json.loads(line)["metadata"]["uid"] for line in path.read_bytes().splitlines()]


async def write(path, findings, **config):
    sink = build(FileConfig(path=path, **config))
    await sink.send(findings)
    await sink.close()


async def test_each_finding_is_one_line(tmp_path):
    """Create, update and close, in order, with hostile values too."""
    path = tmp_path / "out" / "findings.jsonl"
    evil = [hostile(value) for value in HOSTILE.values()]
    await write(path, [finding("a", 1), finding("a", 2, state="close")], fsync=True)
    await write(path, evil)
    assert ids(path) == ["a.1", "a.2", *["f" * 32 + ".1"] * len(evil)]
    assert path.stat().st_mode & 0o777 == 0o640


async def test_a_replay_adds_no_line(tmp_path):
    """A new process leaves out what the tail of the file already holds, the rotated one too."""
    path = tmp_path / "f.jsonl"
    await write(path, [finding("a", 1), finding("b", 1)])
    await write(path, [finding("a", 1), finding("b", 1), finding("b", 2)])
    path.rename(tmp_path / "f.jsonl.1")
    await write(path, [finding("b", 2), finding("b", 3)])
    assert (ids(tmp_path / "f.jsonl.1"), ids(path)) == (["a.1", "b.1", "b.2"], ["b.3"])


async def test_text_in_a_finding_is_not_taken_for_an_id(tmp_path):
    """A summary that looks like the metadata of another finding hides nothing."""
    path = tmp_path / "f.jsonl"
    await write(path, [finding("a", summary='"metadata":{"uid":"b.1"')])
    await write(path, [finding("b")])
    assert ids(path) == ["a.1", "b.1"]


@pytest.mark.parametrize("cut", [1, 5, 40, 500])
async def test_a_piece_of_a_line_is_cut_off_and_comes_again(tmp_path, cut):
    """After a power cut the last line may be a piece; the replay writes it whole."""
    path = tmp_path / "f.jsonl"
    await write(path, [finding("a"), finding("b")])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut)
    await write(path, [finding("a"), finding("b")])
    assert ids(path) == ["a.1", "b.1"]


async def test_a_stranger_file_is_not_damaged(tmp_path):
    """A last line that isn't ours keeps every byte and gets its line end."""
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"first\nlast without end")
    await write(path, [finding("a")])
    assert path.read_bytes().startswith(b'first\nlast without end\n{"activity_id":1,')


async def test_rotation_by_size_keeps_so_many(tmp_path):
    """No line is lost while rotating, the oldest files go, and no file passes the limit."""
    path = tmp_path / "f.jsonl"
    big = "x" * 4000
    sink = build(FileConfig(path=path, rotate_mb=1, keep=2))
    for number in range(60):
        await sink.send(
            [finding(f"{number}-{part}", summary=big, cold_start=big, runbook=[big] * 10) for part in range(2)]
        )
    await sink.close()
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["f.jsonl", "f.jsonl.1", "f.jsonl.2"]
    assert all((tmp_path / name).stat().st_size <= 1024 * 1024 for name in names)
    kept = [uid for name in reversed(names) for uid in ids(tmp_path / name)]
    assert kept == [f"{number}-{part}.1" for number in range(60) for part in range(2)][-len(kept) :]
    assert len(kept) > 20


async def test_a_renamed_or_removed_file_is_opened_anew(tmp_path):
    """As logrotate does, without a signal."""
    path = tmp_path / "f.jsonl"
    sink = build(FileConfig(path=path))
    await sink.send([finding("a")])
    path.rename(tmp_path / "moved")
    await sink.send([finding("b")])
    path.unlink()
    await sink.send([finding("c")])
    await sink.close()
    assert (ids(tmp_path / "moved"), ids(path)) == (["a.1"], ["c.1"])


async def test_a_full_disk_leaves_no_piece(tmp_path, monkeypatch):
    """A write that took only part of a line is undone, and the error says why."""
    path = tmp_path / "f.jsonl"
    sink = build(FileConfig(path=path))
    await sink.send([finding("a")])
    write_whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write_whole(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left"):
        await sink.send([finding("b")])
    monkeypatch.undo()
    await sink.send([finding("b")])
    await sink.close()
    assert ids(path) == ["a.1", "b.1"]


@pytest.mark.parametrize("place", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_refused(tmp_path, place):
    """One sentence that names the setting; a pipe without a reader must not hang the start."""
    path = tmp_path / place
    if place == "folder":
        path.mkdir()
    elif place == "pipe":
        os.mkfifo(path)
    else:
        path = type(path)("/dev/null")
    with pytest.raises(SinkSetupError, match=r"^sinks\.file\.path .* can't be appended to: "):
        build(FileConfig(path=path))


async def test_two_writers_share_a_file_through_rotation(tmp_path):
    """Each line of both is there once and whole."""
    path = tmp_path / "f.jsonl"
    big = "x" * 4000

    async def run(name):
        sink = build(FileConfig(path=path, rotate_mb=1, keep=20))
        for number in range(60):
            await sink.send([finding(f"{name}-{number}", summary=big, runbook=[big] * 5)])
        await sink.close()

    await asyncio.gather(run("a"), run("b"))
    found = [uid for entry in tmp_path.iterdir() for uid in ids(entry)]
    assert sorted(found) == sorted(f"{name}-{number}.1" for name in "ab" for number in range(60))
    assert len(list(tmp_path.iterdir())) > 1


def test_sigkill_leaves_whole_lines(tmp_path):
    """A writer killed at any moment leaves a file that the next one goes on with."""
    path = tmp_path / "f.jsonl"
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from sinks.config import FileConfig; from sinks.file import build; from tests.sinks.samples import finding\n"
        "sink = build(FileConfig(path=Path(sys.argv[1])))\n"
        "n = 0\n"
        "async def run():\n"
        "    global n\n"
        "    while True:\n"
        "        await sink.send([finding(str(n))]); n += 1; print(n, flush=True)\n"
        "asyncio.run(run())\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, cwd=root) as writer:
        for _ in range(50):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.stdout.read()
    found = ids(path)
    assert found == [f"{number}.1" for number in range(len(found))]
    assert len(found) >= acknowledged


async def test_a_held_lock_delays_and_does_not_break(tmp_path):
    """Another process that holds the file's lock is waited for, without blocking the event loop."""
    path = tmp_path / "f.jsonl"
    sink = build(FileConfig(path=path))
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        sending = asyncio.create_task(sink.send([finding("a")]))
        await asyncio.sleep(0.05)
        assert not sending.done()
        fcntl.flock(other, fcntl.LOCK_UN)
        await sending
    await sink.close()
    assert ids(path) == ["a.1"]


async def test_a_lock_that_is_never_freed_is_an_error(tmp_path, monkeypatch):
    """After a limited wait, to be tried again; no thread is left behind."""
    monkeypatch.setattr("sinks.file._LOCK_WAIT_S", 0.05)
    path = tmp_path / "f.jsonl"
    sink = build(FileConfig(path=path))
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process holds the lock"):
            await sink.send([finding("a")])
    await sink.send([finding("a")])
    await sink.close()
    assert ids(path) == ["a.1"]
