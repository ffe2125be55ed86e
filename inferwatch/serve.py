"""`inferwatch serve`: `vllm serve` with the collector inside, and without the ways round it.

Runs vLLM in this very process. What would open a road that nobody audits, print prompts, or load weights that can run
code is refused before vLLM is loaded, each with one sentence.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Final

from collector.startup import check
from inferwatch.config import load
from inferwatch.refused import ServeRefused, check_command_line, check_environment
from inferwatch.settings import CONFIG_VARIABLE, ConfigError

GATE: Final = "inferwatch.vllm.Gate"
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_PICKLE_FORMATS: Final = frozenset({"pt", "npcache"})


def serve(config_path: Path | None, argv: Sequence[str]) -> None:
    """Run `vllm serve ARGV` behind the gate until it is stopped.

    Raises ServeRefused, ConfigError, KeyProblem, GuardRefused or BrokerAway before the model is loaded, SystemExit with
    one sentence where the gate did not open.
    """
    named = config_path or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    file = (named or Path("inferwatch.toml")).absolute()
    if not file.exists():
        raise ConfigError(f"{file}: no such configuration file; `inferwatch config example` prints one")
    config = load(file)
    line = vllm_arguments(argv, os.environ)
    check(config.kafka, config.collector)
    set_environment(os.environ, file)
    sys.argv = ["vllm", "serve", *line]
    try:
        from collector.engine import run_command_line  # noqa: PLC0415 - it loads vLLM
    except ModuleNotFoundError as error:
        if error.name not in ("vllm", "torch"):
            raise
        raise ServeRefused("vLLM is not installed here: pip install 'inferwatch[vllm]', or `make engine`") from None
    run_command_line()
    from inferwatch import vllm  # noqa: PLC0415

    if vllm.failure is not None:
        raise SystemExit(f"inferwatch: {vllm.failure}")


def vllm_arguments(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What follows `vllm serve`: the user's arguments, the gate, and safer defaults. Raises ServeRefused."""
    check_command_line(argv)
    check_environment(environment)
    _refuse_pickles(argv)
    line = list(argv)
    if GATE not in [_value(argument) for argument in argv]:
        line += ["--middleware", GATE]
    line += [] if _given(argv, "--load-format") else ["--load-format", "safetensors"]
    # Without a drain time vLLM was seen to leave clients hanging at SIGTERM.
    line += [] if _given(argv, "--shutdown-timeout") else ["--shutdown-timeout", "20"]
    # The access log holds addresses and query strings; the audit says more.
    line += [] if _given(argv, "--disable-uvicorn-access-log") else ["--disable-uvicorn-access-log"]
    return line


def set_environment(environment: MutableMapping[str, str], config_file: Path) -> None:
    """What vLLM's processes inherit."""
    environment[CONFIG_VARIABLE] = str(config_file)
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("DO_NOT_TRACK", "1")


def _refuse_pickles(argv: Sequence[str]) -> None:
    if _given(argv, "--load-format") in _PICKLE_FORMATS:
        raise ServeRefused("--load-format pt and npcache load pickles, which can run code: use safetensors")
    model = argv[0] if argv and not argv[0].startswith("-") else _given(argv, "--model")
    folder = Path(model) if model else None
    if folder is None or not folder.is_dir():
        return
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise ServeRefused(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when loaded: "
            "convert them to safetensors"
        )


def _given(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag; the flag itself where it has none; None where it is not there."""
    for place, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            if equals:
                return value
            following = argv[place + 1] if place + 1 < len(argv) else "-"
            return flag if following.startswith("-") else following
    return None


def _value(argument: str) -> str:
    return argument.partition("=")[2] or argument
