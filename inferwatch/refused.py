"""What an audited vLLM must not be started with: roads without a gate, prompts in logs, code and weights from outside.

The same rules hold for `inferwatch serve`, which sees the command line, and for plain `vllm serve` with the middleware,
where plugin and gate see the environment and the parsed arguments.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

FLAGS: Final[Mapping[str, str]] = {
    "--grpc": "the gRPC server has no gate",
    "--grpc-port": "the gRPC server has no gate",
    "--headless": "a headless engine has no gate; run it as `vllm serve` beside a gated front end",
    "--enable-log-requests": "it prints prompts into the log",
    "--enable-log-outputs": "it prints answers into the log",
    "--log-error-stack": "its traces may print prompts into the log",
}
VARIABLES: Final[Mapping[str, str]] = {
    "VLLM_USE_RUST_FRONTEND": "the Rust front end has no gate",
    "VLLM_SERVER_DEV_MODE": "it opens routes that run code and change weights",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "it prints answers into the log",
    "VLLM_ENABLE_RESPONSES_API_STORE": "it keeps prompts and answers in memory for good",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "it loads adapters from any path a client names",
}
_OFF: Final = frozenset({"", "0", "false", "off", "no"})


class ServeRefused(ValueError):
    """The server would not be watched, or not be safe: one sentence says why and what to do."""


def check_command_line(argv: Sequence[str]) -> None:
    """Raises ServeRefused for a flag that can't be served."""
    for argument in argv:
        given = argument.partition("=")[0].replace("_", "-")
        # vLLM's parser takes the beginning of a flag for the flag.
        flag = next((flag for flag in FLAGS if len(given) > len("--") and flag.startswith(given)), "")
        if flag:
            raise ServeRefused(f"{flag} is refused: {FLAGS[flag]}")


def check_arguments(arguments: Any) -> None:
    """The same for vLLM's parsed arguments, wherever they came from (its `--config` file, too). Raises ServeRefused."""
    for flag, why in FLAGS.items():
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"), None)
        if value not in (None, False):
            raise ServeRefused(f"{flag} is refused: {why}")


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises ServeRefused for a variable that opens an unwatched road, or keeps the plugin out."""
    for name, why in VARIABLES.items():
        if environment.get(name, "").lower() not in _OFF:
            raise ServeRefused(f"the environment variable {name} is refused: {why}; unset it")
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and "inferwatch" not in [name.strip() for name in plugins.split(",")]:
        raise ServeRefused("the environment variable VLLM_PLUGINS keeps inferwatch out: unset it, or add inferwatch")


def check_process(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """For the plugin, in each process of a vLLM that somebody else started. Raises ServeRefused."""
    check_environment(environment)
    if Path(argv[0] if argv else "").name == "grpc_server.py":
        raise ServeRefused(f"vLLM's gRPC server is refused: {FLAGS['--grpc']}")
    if "serve" in argv[1:2]:
        check_command_line(argv[2:])
