"""Quix Streams counting events a user and minute, with RocksDB state and changelog. Runs in an environment of its own.

python quix.py BOOTSTRAP TOPIC UNTIL
"""

import json
import os
import sys
import tempfile
import time

import orjson
from quixstreams import Application
from quixstreams.models import Topic  # noqa: F401  # part of what is measured: its import

bootstrap, topic, until = sys.argv[1], sys.argv[2], int(sys.argv[3])
seen = 0
began: tuple[float, float] | None = None


def count(row: object) -> object:
    """Counts, and tells when enough were counted."""
    global seen, began  # noqa: PLW0603  # a script
    seen += 1
    if began is None:
        began = (time.perf_counter(), time.process_time())
    if seen >= until:
        wall_s, cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
        os.write(1, json.dumps({"events": seen - 1, "cpu_s": cpu_s, "wall_s": wall_s}).encode() + b"\n")
        os._exit(0)
    return row


app = Application(
    broker_address=bootstrap,
    consumer_group=f"{topic}-quix",
    auto_offset_reset="earliest",
    state_dir=tempfile.mkdtemp(),
    loglevel="ERROR",
    commit_interval=1.0,
)
frame = app.dataframe(app.topic(topic, key_deserializer="bytes", value_deserializer="bytes"))
frame = frame.apply(orjson.loads).apply(count)
frame = frame.tumbling_window(60_000).count().current()
app.run()
