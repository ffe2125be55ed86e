"""What a vLLM that somebody else started is refused for: the plugin and the gate see what `inferwatch serve` would."""

from types import SimpleNamespace

import pytest

from inferwatch.refused import FLAGS, VARIABLES, ServeRefused, check_arguments, check_process


@pytest.mark.parametrize("name", VARIABLES)
def test_the_plugin_stops_a_process_with_such_a_variable(name: str) -> None:
    """Whatever the command: run-batch, offline, a worker."""
    with pytest.raises(ServeRefused, match=name):
        check_process(["vllm", "run-batch"], {name: "1"})
    check_process(["vllm", "run-batch"], {name: "0"})


def test_the_store_of_responses_is_among_them() -> None:
    """vLLM itself says that nothing is ever removed from it."""
    assert "VLLM_ENABLE_RESPONSES_API_STORE" in VARIABLES


@pytest.mark.parametrize("flag", FLAGS)
def test_the_plugin_stops_plain_vllm_serve_with_such_a_flag(flag: str) -> None:
    """As `inferwatch serve` does; the beginning of a flag is taken for it by vLLM's parser, and so it is here."""
    for given in (flag, f"{flag}=1", flag[:-2], flag.replace("-", "_").replace("__", "--", 1)):
        with pytest.raises(ServeRefused, match="is refused"):
            check_process(["/usr/bin/vllm", "serve", "model", given], {})
    check_process(["/usr/bin/vllm", "serve", "model", "--enable-lora", "--", "--port", "8000"], {})


def test_the_plugin_stops_the_grpc_server() -> None:
    """Started as a module it has no flag that tells."""
    with pytest.raises(ServeRefused, match="gRPC"):
        check_process(["/lib/vllm/entrypoints/launchers/grpc_server.py", "--model", "m"], {})


def test_a_filter_that_keeps_the_plugin_out_is_refused() -> None:
    """VLLM_PLUGINS must name us."""
    with pytest.raises(ServeRefused, match="VLLM_PLUGINS"):
        check_process(["vllm", "serve"], {"VLLM_PLUGINS": "other"})


def test_the_gate_reads_what_a_configuration_file_of_vllms_has_set() -> None:
    """Such a flag is on no command line."""
    with pytest.raises(ServeRefused, match="--enable-log-requests"):
        check_arguments(SimpleNamespace(enable_log_requests=True))
    check_arguments(SimpleNamespace(enable_log_requests=False, grpc=False, grpc_port=None))
    check_arguments(None)
