"""Bytewax counting events a user and minute, with recovery on. Runs in an environment of its own.

python bytewax_count.py BOOTSTRAP TOPIC UNTIL
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import bytewax.operators.windowing as win
import orjson
from bytewax.connectors.kafka import KafkaSource
from bytewax.dataflow import Dataflow
from bytewax.operators.windowing import EventClock, TumblingWindower
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.recovery import RecoveryConfig
from bytewax.run import cli_main

bootstrap, topic, until = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0
began: tuple[float, float] | None = None


def decoded(message: Any) -> tuple[str, datetime]:
    """(user, moment); also counts, and tells when enough were counted."""
    global seen, began  # noqa: PLW0603  # a script
    seen += 1
    if began is None:
        began = (time.perf_counter(), time.process_time())
    if seen >= until:
        wall_s, cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
        os.write(1, json.dumps({"events": seen - 1, "cpu_s": cpu_s, "wall_s": wall_s}).encode() + b"\n")
        os._exit(0)
    event = orjson.loads(message.value)
    return event.get("user_id", ""), datetime.fromisoformat(event["timestamp"])


class _Nowhere(StatelessSinkPartition[Any]):
    def write_batch(self, items: list[Any]) -> None:
        pass


class Nowhere(DynamicSink[Any]):
    """Takes what comes."""

    def build(self, _step_id: str, _worker_index: int, _worker_count: int) -> _Nowhere:
        return _Nowhere()


flow = Dataflow("count")
stream = op.input("in", flow, KafkaSource([bootstrap], [topic], tail=False, batch_size=4_000))
keyed = op.map("decode", stream, decoded)
clock = EventClock(lambda item: item, wait_for_system_duration=timedelta(seconds=2))
windower = TumblingWindower(length=timedelta(seconds=60), align_to=datetime(2026, 1, 1, tzinfo=UTC))
counted = win.fold_window("count", keyed, clock, windower, lambda: 0, lambda n, _: n + 1, lambda a, b: a + b)
op.output("out", counted.down, Nowhere())

folder = Path(tempfile.mkdtemp())
subprocess.run([sys.executable, "-m", "bytewax.recovery", str(folder), "1"], check=True, capture_output=True)
cli_main(
    flow, recovery_config=RecoveryConfig(folder, backup_interval=timedelta(0)), epoch_interval=timedelta(seconds=1)
)
