"""The backtest on a real broker: what a finding says it can be replayed with, replays it."""

import asyncio
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collector.kafka import KafkaConfig, ensure_topics
from detectors.config import DetectConfig
from detectors.finding import decode, encode
from streams.backtest import backtest
from tests.streams import traffic

pytestmark = pytest.mark.kafka


async def test_the_log_gives_the_same_findings_again(kafka_config: KafkaConfig, tmp_path: Path) -> None:
    """Byte for byte what the stages' engines give, poison passed over; and by the command that the finding carries."""
    await ensure_topics(kafka_config)
    start_us = time.time_ns() // 1000 - 900 * traffic.SECOND_US
    await traffic.send(kafka_config, [*traffic.spike(11, 4, start_us), (b"", b"\xff no event", 2)])
    log = await traffic.read(kafka_config, kafka_config.topic("events"), 4)
    wanted = traffic.expected(kafka_config, DetectConfig(), log).findings
    again = {(f.uid, f.revision): encode(f) async for f in backtest(kafka_config, DetectConfig())}
    assert again == wanted
    last = decode(next(raw for raw in wanted.values() if decode(raw).detector == "block_rate"))
    program, *arguments = shlex.split(last.evidence.replay)
    assert program == "inferwatch"
    environment = {
        **os.environ,
        "INFERWATCH_KAFKA__BOOTSTRAP_SERVERS": kafka_config.bootstrap_servers,
        "INFERWATCH_KAFKA__TOPIC_PREFIX": kafka_config.topic_prefix,
    }
    answer = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "inferwatch.cli", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert encode(last) in answer.stdout.splitlines()
    assert {decode(line).detector for line in answer.stdout.splitlines()} == {"block_rate"}
