"""`inferwatch serve` before vLLM is loaded: what it adds to the line, and what it refuses with one sentence."""

from pathlib import Path

import pytest

from collector.identity import KeyProblem, create_key_file
from collector.kafka import BrokerAway
from inferwatch.keys import add_api_key
from inferwatch.serve import GATE, ServeRefused, serve, set_environment, vllm_arguments
from inferwatch.settings import CONFIG_VARIABLE, ConfigError

ADDED = [
    *("--middleware", GATE, "--load-format", "safetensors", "--shutdown-timeout", "20"),
    "--disable-uvicorn-access-log",
]


def test_the_gate_and_safe_defaults_are_added() -> None:
    """The user's arguments come first and as they are."""
    assert vllm_arguments(["m", "--port", "1"], {}) == ["m", "--port", "1", *ADDED]


def test_what_the_user_set_is_kept() -> None:
    """No default goes over the user's own setting, spelled either way."""
    line = [
        "m",
        "--shutdown_timeout=5",
        "--load-format",
        "dummy",
        f"--middleware={GATE}",
        "--disable-uvicorn-access-log",
    ]
    assert vllm_arguments(line, {}) == line


@pytest.mark.parametrize(
    "flag", ["--grpc", "--headless", "--enable-log-requests", "--enable_log_outputs", "--log-error-stack"]
)
def test_flags_that_open_a_way_round_are_refused(flag: str) -> None:
    """One sentence names the flag and why."""
    with pytest.raises(ServeRefused, match="is refused: "):
        vllm_arguments(["m", flag], {})


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_USE_RUST_FRONTEND",
        "VLLM_SERVER_DEV_MODE",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    ],
)
def test_variables_that_open_a_way_round_are_refused(name: str) -> None:
    """Set to anything but off, the server does not start."""
    with pytest.raises(ServeRefused, match=name):
        vllm_arguments(["m"], {name: "1"})
    assert vllm_arguments(["m"], {name: "0"}) == ["m", *ADDED]


def test_a_plugin_list_without_us_is_refused() -> None:
    """vLLM loads only the plugins that VLLM_PLUGINS names."""
    with pytest.raises(ServeRefused, match="VLLM_PLUGINS"):
        vllm_arguments(["m"], {"VLLM_PLUGINS": "other"})
    assert vllm_arguments(["m"], {"VLLM_PLUGINS": "other, inferwatch"})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pkl"])
@pytest.mark.parametrize("option", [[], ["--model"]])
def test_a_model_folder_with_a_pickle_is_refused(tmp_path: Path, name: str, option: list[str]) -> None:
    """Loading a pickle runs what is in it; the sentence says what to do."""
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ServeRefused, match="convert them to safetensors"):
        vllm_arguments([*option, str(tmp_path)], {})
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert vllm_arguments([*option, str(tmp_path)], {})


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_asking_for_pickles_is_refused(load_format: str) -> None:
    """Whatever the model is."""
    with pytest.raises(ServeRefused, match="pickles"):
        vllm_arguments(["m", f"--load-format={load_format}"], {})


def test_a_missing_configuration_is_one_sentence(tmp_path: Path) -> None:
    """Without a configuration nothing would be watched."""
    with pytest.raises(ConfigError, match="no such configuration file"):
        serve(tmp_path / "none.toml", ["m"])


def test_what_would_stop_the_collector_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    """Missing keys, then a broker that is away: each one sentence, without vLLM."""
    file = tmp_path / "c.toml"
    keys = f'[collector.identity]\nkey_dir = "{tmp_path}/keys"\napi_keys_file = "{tmp_path}/api-keys.toml"\n'
    away = '[kafka]\nbootstrap_servers = "127.0.0.1:9"\n[collector.publisher]\nstart_timeout_ms = 300\n'
    file.write_text(away)
    with pytest.raises(KeyProblem, match="there are no API keys"):
        serve(file, ["m"])
    file.write_text(away + keys)
    with pytest.raises(KeyProblem, match=r"default\.key: no such key file"):
        serve(file, ["m"])
    create_key_file(tmp_path / "keys" / "default.key")
    with pytest.raises(KeyProblem, match="no such file of API keys"):
        serve(file, ["m"])
    add_api_key(tmp_path / "api-keys.toml", tenant="default", user="alice", on_behalf=False)
    with pytest.raises(BrokerAway, match=r"no Kafka at 127\.0\.0\.1:9"):
        serve(file, ["m"])


def test_the_processes_of_vllm_find_the_configuration(tmp_path: Path) -> None:
    """By the environment, and the user's own settings there stay."""
    environment = {"DO_NOT_TRACK": "0"}
    set_environment(environment, tmp_path / "c.toml")
    assert environment == {
        CONFIG_VARIABLE: str(tmp_path / "c.toml"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "0",
    }


def test_without_a_configuration_the_plugin_is_inert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing inferwatch changes no vLLM: `register` loads nothing, here not even vLLM, which is absent."""
    from inferwatch.vllm import register

    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    register()
