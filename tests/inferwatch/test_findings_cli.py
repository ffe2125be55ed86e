"""Commands of people on the command line: keys, what is refused before anything is sent, and what is signed."""

import stat
import time
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from collector.identity import KeyProblem
from detectors.commands import Revoke, public_keys, sign, verify
from detectors.config import CommandsConfig
from detectors.finding import Contributor, Entity
from inferwatch.cli import app
from inferwatch.commands import BadWords, Operator, entity_of, make, seconds_of, suppression_of
from inferwatch.operators import create_operator_key, load_operator
from tests.inferwatch.test_cli import run, said
from tests.sinks.samples import finding

COMMANDS = (
    ("finding", "list"), ("finding", "ack"), ("finding", "false-positive"), ("finding", "suppress"),
    ("finding", "revoke"), ("maintenance",), ("change",),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example(command: tuple[str, ...]) -> None:
    """`--help` ends well and shows how the command is typed."""
    answer = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
    assert answer.exit_code == 0
    assert f"Example: inferwatch {' '.join(command)}" in answer.output


def test_an_operators_key_is_private_and_its_lines_are_configuration(tmp_path: Path) -> None:
    """Mode 0600; the printed lines make a configuration that knows the operator; a second key is refused."""
    answer = run("keys", "operator", "al.ice", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    file = tmp_path / ".inferwatch/operators/al.ice.pem"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    config = CommandsConfig(**tomllib.loads(answer.stdout)["detect"]["commands"])
    name, key = load_operator(file.parent, "", None, config)
    assert name == "al.ice"
    assert key.public_key() == public_keys(config)["al.ice"]
    assert "PRIVATE" not in answer.stdout + answer.stderr
    with pytest.raises(KeyProblem, match="exists"):
        create_operator_key(file.parent, "al.ice")


@pytest.mark.parametrize("name", ["", "../alice", "a b", "alice\n", "é", "x" * 65])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    """It becomes a file and a key of the configuration."""
    with pytest.raises(KeyProblem, match="the name of an operator"):
        create_operator_key(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    """Missing, readable by others, no key, not in the configuration, one of several."""
    file, public = create_operator_key(tmp_path, "alice")
    known = CommandsConfig(operators={"alice": public})

    def problem(config: CommandsConfig = known, name: str = "alice") -> str:
        with pytest.raises(KeyProblem) as caught:
            load_operator(tmp_path, name, None, config)
        return str(caught.value)

    assert "no such key; `inferwatch keys operator bob` makes one" in problem(name="bob")
    assert f'add alice = "{public}" to [detect.commands.operators]' in problem(CommandsConfig())
    file.chmod(0o640)
    assert problem() == f"{file} can be read by others: chmod 600 {file}"
    file.chmod(0o600)
    file.write_text("nonsense")
    assert "holds no private key" in problem()
    create_operator_key(tmp_path, "bob")
    assert problem(name="") == f"name the operator with --operator; keys in {tmp_path}: alice, bob"


WINDOW = ("--tenant", "t", "--from", "2026-01-02T00:00:00Z", "--to", "2026-01-01T00:00:00Z", "--reason", "x")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("finding", "ack", "4f1c", "--reason", "x"), "a finding is named by 8 to 32 hexadecimal digits of its uid"),
        (("finding", "ack", "4F1C09AA", "--reason", "x"), "a finding is named by 8 to 32 hexadecimal digits"),
        (("finding", "suppress", "4f1c09aa", "--for", "soon", "--reason", "x"), "like 90m, 12h or 7d; not 'soon'"),
        (("finding", "suppress", "--for", "1d", "--reason", "x"), "name a finding, or --tenant, --detector and"),
        (
            ("finding", "suppress", "--tenant=t", "--detector=d", "--entity=u_1", "--for=1d", "--reason=x"),
            "an entity is KIND:ID",
        ),
        (
            ("finding", "suppress", "--tenant=t", "--detector=d", "--entity=user:u", "--for=400d", "--reason=x"),
            "the command would be refused: it lasts longer than the 7776000 s allowed",
        ),
        (("maintenance", *WINDOW), "the command would be refused: it ends before it begins"),
        (("change", "--tenant", "t", "--reason", "a\tb"), "its reason is not one line of printable characters"),
    ],
)
def test_bad_words_are_one_sentence_and_nothing_is_sent(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    """Refused before Kafka is asked, so without a broker."""
    lines = run("keys", "operator", "alice", folder=tmp_path).stdout
    (tmp_path / "inferwatch.toml").write_text('[kafka]\nbootstrap_servers = "127.0.0.1:9"\n' + lines)
    assert sentence in said(run(*words, folder=tmp_path))


def test_what_is_made_is_what_stage_2_takes(tmp_path: Path) -> None:
    """A suppression carries what its operator saw: severity, and who was behind it."""
    _, public = create_operator_key(tmp_path, "alice")
    config = CommandsConfig(operators={"alice": public})
    operator = Operator(*load_operator(tmp_path, "alice", None, config))
    behind = [Contributor(entity=Entity(kind="user", id=name), amount=1, unit="blocks") for name in ("u_2", "u_1")]
    seen = finding(entity=Entity(kind="model", id="m/g"), contributors=behind, counts={"users": 2})
    made = suppression_of(seen, operator, "test", 3_600)
    assert (made.known, made.severity, made.entity) == (["u_1", "u_2"], "high", seen.entity)
    assert verify(sign(made, operator.key), time.time_ns() // 1_000_000, public_keys(config), config) == made


def test_a_finding_with_more_behind_it_than_it_names_is_not_suppressed(tmp_path: Path) -> None:
    """The sentence says what to do instead."""
    _, public = create_operator_key(tmp_path, "alice")
    operator = Operator(*load_operator(tmp_path, "alice", None, CommandsConfig(operators={"alice": public})))
    seen = finding(entity=Entity(kind="model", id="m/g"), counts={"users": 30})
    with pytest.raises(BadWords, match="could hide others: acknowledge it, or announce a maintenance window"):
        suppression_of(seen, operator, "test", 3_600)


def test_times_and_entities_are_read() -> None:
    """90m, 12h, 7d; KIND:ID, where the id may hold colons."""
    assert [seconds_of(text) for text in ("90m", "12h", "7d")] == [5_400, 43_200, 604_800]
    assert entity_of("model:a:b/c") == Entity(kind="model", id="a:b/c")
    for text in ("0d", "7", "7w", "-1h", "1.5h", "", "9999999d"):
        with pytest.raises(BadWords):
            seconds_of(text)


def test_ids_are_new_each_time() -> None:
    """Two commands of the same words are two commands."""
    operator = Operator("alice", Ed25519PrivateKey.generate())
    first, second = (make(Revoke, operator, "t", "r", command="0" * 32) for _ in range(2))
    assert first.id != second.id
