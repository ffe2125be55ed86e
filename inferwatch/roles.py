"""The long-running roles of the analysis side, each handed its part of the configuration.

Here the rooms meet: the store process is ingest (streams), the read-only face (sinks) and the HTML view (dashboards).
"""

from collections.abc import Callable

from inferwatch.config import Config
from inferwatch.processes import write_run_file
from streams.stage1 import run_stage1
from streams.stage2 import run_stage2


def _announce(config: Config, role: str) -> Callable[[str], None]:
    """Writes the run file once the health pages are up."""
    return lambda url: void(write_run_file(config.data_dir, role, url))


def void(_: object) -> None:
    """Drops a result."""


def run_detect(config: Config, stage: int) -> None:
    """One worker of stage 1 or 2, until SIGTERM."""
    run = {1: run_stage1, 2: run_stage2}[stage]
    run(
        config.kafka,
        config.detect,
        config.streams,
        data_dir=config.data_dir / f"detect-{stage}",
        config_digest=config.digest(),
        on_serving=_announce(config, f"detect-{stage}"),
    )
