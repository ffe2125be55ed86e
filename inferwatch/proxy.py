"""`inferwatch proxy`: the gate before Ollama or any server that speaks OpenAI's API, as a server of its own."""

import signal
import sys
from typing import Any

import structlog
from pydantic import ValidationError

from collector import cores
from collector.proxy_config import ProxyConfig
from collector.startup import check
from inferwatch.config import Config
from inferwatch.settings import ConfigError

log = structlog.get_logger(__name__)


def run_proxy(config: Config, flags: dict[str, Any]) -> None:
    """Serve until SIGTERM or Ctrl-C. `flags`: what the command line says over `[collector.proxy]`.

    Raises ConfigError, KeyProblem, GuardRefused or BrokerAway with one sentence; exits with status 3 where the start
    fails later.
    """
    proxy = proxy_config(config.collector.proxy, flags)
    try:
        from collector.proxy_server import site  # noqa: PLC0415 - it needs the extra `proxy`
    except ModuleNotFoundError as error:
        if error.name not in ("httpx", "uvicorn", "h11"):
            raise
        raise ConfigError(f"{error.name} is not installed here: pip install 'inferwatch[proxy]'") from None
    made = site(config.kafka, config.collector, proxy, config_digest=config.digest())
    check(config.kafka, config.collector)
    cores.forbid()
    server = made.server()
    log.info("the proxy serves", host=proxy.host, port=proxy.port, upstream=proxy.upstream, kind=proxy.kind)
    # uvicorn stops at SIGTERM and then raises it once more, for whoever had a handler: the stop was all we wanted.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run()
    if not server.started:
        sys.exit(3)


def proxy_config(configured: ProxyConfig, flags: dict[str, Any]) -> ProxyConfig:
    """The settings in force. Raises ConfigError: nothing to stand before, or a flag that can't be used."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        proxy = ProxyConfig.model_validate(configured.model_dump() | given)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(f"--{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
    if not proxy.upstream:
        raise ConfigError("the proxy needs a server to stand before: --upstream http://127.0.0.1:11434")
    return proxy
