"""The short way to a sidecar's start: it loads no other room, and reads and says what the long way does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inferwatch.config import load
from inferwatch.entry import guards_of

SERVED = '[collector.guards]\norder = ["secrets"]\n[collector.guards.secrets]\nwhere = "sidecar"\n'


def run(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, without the shell's own settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("INFERWATCH_")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=120, check=False)


def test_it_reads_what_the_whole_configuration_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is named, the one here, none; and the environment before each."""
    monkeypatch.chdir(tmp_path)
    assert guards_of(None) == load(None).collector.guards
    (tmp_path / "inferwatch.toml").write_text(SERVED + "[kafka]\nreplication = 1\n")
    (tmp_path / "other.toml").write_text("[collector.guards]\nworkers = 7\n")
    assert guards_of(None).order == ("secrets",)
    assert guards_of(Path("other.toml")) == load(Path("other.toml")).collector.guards
    monkeypatch.setenv("INFERWATCH_CONFIG", "other.toml")
    monkeypatch.setenv("INFERWATCH_COLLECTOR__GUARDS__SIDECAR__WORKERS", "5")
    read = guards_of(None)
    assert (read.workers, read.sidecar.workers) == (7, 5)
    assert read == load(None).collector.guards


def test_no_other_room_is_loaded(tmp_path: Path) -> None:
    """Neither the analysis side nor the command line: they are most of what a start would take."""
    (tmp_path / "inferwatch.toml").write_text(SERVED)
    code = (
        "import sys\nfrom inferwatch import entry\nfrom collector.guards import sidecar\n"
        "rooms = lambda: {name.split('.')[0] for name in sys.modules}\n"
        "sidecar.run_sidecar = lambda guards: print(guards.order, *rooms())\n"
        "sys.argv = ['inferwatch', *sys.argv[1:]]\nentry.main()"
    )
    told = run(tmp_path, code, "guards", "serve", "--config", "inferwatch.toml").stdout.split()
    assert told[0] == "('secrets',)"
    assert set(told) & {"typer", "detectors", "sinks", "streams", "dashboards", "aiokafka", "cryptography"} == set()


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[collector.guards]\nordre = []\n", "unknown key 'ordre' in [collector.guards]; did you mean 'order'?"),
        ("[collector.guards\n", "not valid TOML"),
        ("", 'no guard of order has where = "sidecar": there is nothing to serve'),
    ],
)
def test_a_mistake_is_told_as_ever(tmp_path: Path, toml: str, told: str) -> None:
    """In one sentence, by the command line where the configuration is at fault."""
    (tmp_path / "inferwatch.toml").write_text(toml)
    code = "from inferwatch.entry import main; main()"
    refused = run(tmp_path, code, "guards", "serve", "-c", "inferwatch.toml")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("inferwatch: ")
    assert told in refused.stderr


def test_every_other_command_goes_the_long_way(tmp_path: Path) -> None:
    """Help of the very same command, and a version."""
    code = "from inferwatch.entry import main; main()"
    assert "Example: inferwatch guards serve" in run(tmp_path, code, "guards", "serve", "--help").stdout
    assert run(tmp_path, code, "version").stdout.strip()
