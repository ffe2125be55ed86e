"""Numbers as a log of audit events, and that log through both stages: findings of the lifecycle.

The path is the deployed one: bytes to `PartitionEngine.observe_log`, rollups through their wire form to `TenantEngine`.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from collector.event import AuditEvent, Goodbye, GuardResult, Hello, Tick, encode, from_timestamp_us
from detectors import rollup
from detectors.catalogue import detectors
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from detectors.finding import Finding

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
SECOND_US: Final = 1_000_000
CHUNK: Final = 20_000
HOUR_US: Final = 3_600 * SECOND_US
MINUTE_US: Final = 60 * SECOND_US
COMMON: Final[dict[str, Any]] = {"schema_version": "1.0", "collector_id": "c", "boot": "b"}


@dataclass(frozen=True)
class Calls:
    """Answered calls in order of time, an entry each."""

    moment_us: Ints
    latency_ms: Floats
    ttft_ms: Floats
    queue_ms: Floats
    response_tokens: Ints
    prompt_tokens: Ints
    max_tokens: Ints
    user: Ints
    score: Floats
    """Of the output guard."""
    cut: Ints
    """1 where the answer ended with finish_reason=length."""

    def __len__(self) -> int:
        return len(self.moment_us)

    def part(self, rows: slice) -> "Calls":
        """Some of them."""
        return Calls(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})


def calls_of(moment_us: Ints, latency_ms: Floats, **other: Any) -> Calls:
    """Calls with these latencies; what isn't given is alike for all."""
    size = len(moment_us)
    numbers = {"response_tokens": 100, "prompt_tokens": 500, "max_tokens": 0, "user": 0, "cut": 0}
    filled: dict[str, Any] = {name: np.full(size, value, np.int64) for name, value in numbers.items()}
    filled |= {"ttft_ms": latency_ms / 2, "queue_ms": np.full(size, 1.0), "score": np.zeros(size)}
    return Calls(moment_us=moment_us, latency_ms=latency_ms, **(filled | other))


def others_than(name: str) -> list[str]:
    """The detectors that have a switch, but for this one."""
    names = [detector.card.name for detector in detectors()]
    return [each for each in names if each != name and hasattr(getattr(DetectConfig(), each, None), "enabled")]


class Pipe:
    """Both stages, one after the other, of one partition; `copy` is another that goes on from here."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config
        self._one = PartitionEngine(config, topic="iw.events", partition=0, partitions=1)
        self._two = TenantEngine(config, partition=0, partitions=1)
        self._offset = 0

    def copy(self) -> "Pipe":
        """Its twin, by way of the snapshots that a restart takes."""
        other = Pipe(self._config)
        other._one.restore(self._one.snapshot())
        other._two.restore(self._two.snapshot())
        other._offset = self._offset
        return other

    def hello(self, moment_us: int) -> list[Finding]:
        """The collector's first words."""
        return self._observe(
            [encode(Hello(event_id="hello", timestamp=from_timestamp_us(moment_us), seq=0, **COMMON))], [moment_us]
        )

    def calls(self, calls: Calls) -> list[Finding]:
        """Findings that these calls raise."""
        findings: list[Finding] = []
        for begin in range(0, len(calls), CHUNK):
            end = min(begin + CHUNK, len(calls))
            findings += self._observe(
                _raws(calls, begin, end, _template(), self._offset - begin), calls.moment_us[begin:end]
            )
        return findings

    def goodbye(self, moment_us: int) -> list[Finding]:
        """The collector's last words, and those of another that close the last second."""
        later_us = moment_us + MINUTE_US
        last = Goodbye(event_id="goodbye", timestamp=from_timestamp_us(moment_us), seq=self._offset, **COMMON)
        tick = Tick(event_id="tick", timestamp=from_timestamp_us(later_us), seq=0, **COMMON)
        return self._observe([encode(last), encode(tick)], [moment_us, later_us])

    def _observe(self, raws: list[bytes], moment_us: Ints | list[int]) -> list[Finding]:
        append_ms = np.asarray(moment_us, np.int64) // 1_000
        refused = self._one.observe_log(raws, append_ms, np.arange(self._offset, self._offset + len(raws)))
        if refused:
            raise ValueError(f"stage 1 refused {len(refused)} records: {refused[0][1]}")
        self._offset += len(raws)
        for each in self._one.take():
            self._two.observe(rollup.decode(rollup.encode(each)))
        return self._two.take()


def passed(calls: Calls, config: DetectConfig) -> list[Finding]:
    """Every revision that the calls raise, in order; a hello a second before them and a goodbye an hour after."""
    pipe = Pipe(config)
    findings = pipe.hello(int(calls.moment_us[0]) - SECOND_US)
    findings += pipe.calls(calls)
    return findings + pipe.goodbye(int(calls.moment_us[-1]) + HOUR_US)


def _raws(calls: Calls, begin: int, end: int, template: str, ahead: int) -> list[bytes]:
    """Records of rows `begin` to `end`, numbered `ahead` more than their rows."""
    part = slice(begin, end)
    per_token = (calls.latency_ms - calls.ttft_ms)[part] / np.maximum(calls.response_tokens[part], 1)
    cut = ["length" if each else "stop" for each in calls.cut[part].tolist()]
    columns = (
        [f"{number - 1:09x}" for number in range(begin + ahead, end + ahead)],
        np.datetime_as_string(calls.moment_us[part].astype("datetime64[us]")).tolist(),
        [f"u_{number:032x}" for number in calls.user[part].tolist()],
    )
    numbers = (
        calls.response_tokens[part].tolist(),
        calls.latency_ms[part].round(3).tolist(),
        cut,
        calls.prompt_tokens[part].tolist(),
        calls.max_tokens[part].tolist(),
        calls.ttft_ms[part].round(3).tolist(),
        calls.queue_ms[part].round(3).tolist(),
        per_token.round(3).tolist(),
    )
    rows = zip(range(begin + ahead, end + ahead), *columns, calls.score[part].round(4).tolist(), *numbers, strict=True)
    return [
        (template % (event, stamp, seq, user, score, *rest)).encode() for seq, event, stamp, user, score, *rest in rows
    ]


@cache
def _template() -> str:
    """A record with `%s` where the changing values go, made by the event's own encoder."""
    marks: dict[str, Any] = {
        "event_id": "@event",
        "user_id": "u_@user",
        "seq": 901_234_501,
        "response_tokens": 901_234_502,
        "latency_ms": 901_234_503.5,
        "finish_reason": "@cut",
        "prompt_tokens": 901_234_504,
        "max_tokens": 901_234_505,
        "ttft_ms": 901_234_506.5,
        "queue_ms": 901_234_507.5,
        "ms_per_output_token": 901_234_508.5,
    }
    event = AuditEvent(
        **(COMMON | marks),
        timestamp=from_timestamp_us(0),
        tenant="acme",
        session_id="s_1",
        prompt_hash="",
        turn_hash="hmac:0",
        model_version="tiny@0123abc",
        guardrail_results=[GuardResult(guard="leak", version="1", stage="output", decision="allow", score=0.987654321)],
        blocked=False,
        status="ok",
    )
    text = encode(event).decode().replace("%", "%%").replace('"1970-01-01T00:00:00Z"', '"%sZ"')
    text = text.replace("0.987654321", "%s")
    for mark in ("u_@user", *marks.values()):
        text = text.replace(str(mark), "%s")
    return text
