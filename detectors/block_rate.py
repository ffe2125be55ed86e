"""block_rate: a guard blocks more than it used to, per tenant x model x guard.

Method. Two streams of trials, each watched by a bank of one-sided Bernoulli CUSUMs for shifts of 2, 3 and 6 times
(E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954; M. R. Reynolds and Z. G. Stoumbos, "A CUSUM chart for
monitoring a proportion when inspecting continuously", J. Quality Technology 31, 1999):
  - *fresh*, for spikes by many users: a user does not count for an hour after a block, so that a retried prompt or a
    re-sent conversation is one trial. Without this the independence that a CUSUM assumes is off by a factor of twenty.
  - *distinct*, for spikes by few users: a block counts when its prompt is new, at most eight a user and day.
Thresholds are peaks over threshold on each chart's own history, from the tenant's budget split over its keys
(`detectors.block_rate_charts`, which also has the usual rates). A spike of which one user made more than two thirds is
left to the probing detector. Trials of one second are added at once: their order is not kept over partitions.
A spike is told once, and again when its evidence has doubled, with whether a few users made it or many
(`detectors.block_rate_told`). A change event of the hour before is named: attack or rollout.

Cold start. First hour: compares with an assumed rate (2 %), so a tenant whose honest rate is 8 % is told of it. First
day: the rate is learned, its daily swing is not. First week: thresholds come from a formula, not from the tenant's own
past. First month: a weekly swing is learned only where an hour of the week has some tens of blocks. The baseline takes
counts ten minutes late (one while cold), and none while an alarm goes on, so an attack does not teach it; a level that
lasts a day is normal.

Memory: stage 1, 56 bytes a user, about 400 more a user with a block within a day, plus 350 a remembered prompt (at most
eight); stage 2, about 25 KB a key, and 0.5 KB for each user of the last 128 seconds with blocks.
"""

from typing import Final

import msgspec
from msgspec import Struct

from detectors.block_rate_charts import (
    STREAMS,
    WEEK_H,
    WEEK_S,
    Chart,
    History,
    cold_threshold,
    lasted,
    run,
    share_of,
    threshold_of,
)
from detectors.block_rate_told import Announced, Blocks, Spike, alarm_of, blocks_of, by_user, heard_later
from detectors.block_rate_trials import NAME, BlockRateOne
from detectors.config import DetectConfig
from detectors.detector import Alarm, Card, Detector, StageTwo
from detectors.entities import Room
from detectors.rollup import Cell, Signal, first

ANNOUNCED_MAX: Final = 8
"""Changes remembered a tenant."""
RECENT_MAX: Final = 128
SHARING_H: Final = 14 * 24
"""Hours after which a key that is seen no more has no share of its tenant's budget."""


class Minute(Struct):
    """Counts that wait until they are old enough for the baseline: requests and blocks of all, fresh, distinct."""

    minute: int
    counts: dict[str, int]
    suspicious: bool = False


class KeyState(Struct):
    """What stage 2 knows of one tenant x model x guard."""

    first_s: int
    charts: list[Chart]
    usual: History
    suspect: History
    """Of suspicious minutes since `suspect_since_s`."""
    rates: dict[str, float] = {}
    """The usual rate of each stream in `hour`, which the charts aim at, as long as nothing settles."""
    hour: int = -1
    requests: int = 0
    suspect_since_s: int | None = None
    alarming_s: int | None = None
    """Since an alarm: when a chart was last over half its threshold."""
    raised_s: int = 0
    waiting: list[Minute] = []
    recent: list[Blocks] = []


class BlockRateTwo(StageTwo):
    """The charts, on merged seconds."""

    def __init__(self, config: DetectConfig) -> None:
        self._config = config.block_rate
        self._contributors_max = config.contributors_max
        self._keys: dict[str, KeyState] = {}
        self._room = Room[str, KeyState](lambda state: state.hour * 3_600)
        self._states: dict[str, list[KeyState]] = {}
        """A tenant's, which share its budget."""
        self._guards: dict[str, History] = {}
        """Of a tenant's guard over all models, to which a sparse key is shrunk."""
        self._announced: dict[str, list[Announced]] = {}
        self._refused_keys = 0

    @property
    def counters(self) -> dict[str, int]:
        return {"keys": len(self._keys), "refused_keys": self._refused_keys}

    def second(self, second: int, cells: list[tuple[str, str, Cell]]) -> list[Alarm]:
        alarms = []
        for tenant, key, cell in cells:
            state = self._state(tenant, key, second)
            if state is not None:
                alarm = self._step(state, second, tenant, key, cell)
                alarms += [alarm] if alarm is not None else []
        return alarms

    def signal(self, signal: Signal) -> list[Alarm]:
        """A change event. At most eight a tenant are remembered, and so many tenants as there may be keys."""
        told = Announced(signal.second, *signal.key.split("\n")[:3])
        if signal.tenant in self._announced or len(self._announced) < self._config.keys_max:
            known = self._announced.get(signal.tenant, [])
            fresh = [each for each in known if (each.subject, each.after) != (told.subject, told.after)]
            self._announced[signal.tenant] = [*fresh, told][-ANNOUNCED_MAX:]
        return []

    def _state(self, tenant: str, key: str, second: int) -> KeyState | None:
        name = f"{tenant}\n{key}"
        state = self._keys.get(name)
        if state is None:
            if len(self._keys) >= self._config.keys_max and not self._made_room(second):
                self._refused_keys += 1
                return None
            charts = [Chart(stream, ratio) for stream in STREAMS for ratio in self._config.ratios]
            state = self._keys[name] = KeyState(second, charts, History.new(), History.new())
            self._states.setdefault(tenant, []).append(state)
        return state

    def _made_room(self, second: int) -> bool:
        if not self._room.made(self._keys, second):
            return False
        self._share()
        guards = {_guard_of(*name.split("\n", 1)) for name in self._keys}
        self._guards = {name: known for name, known in self._guards.items() if name in guards}
        return True

    def _share(self) -> None:
        self._states = {}
        for name, state in self._keys.items():
            self._states.setdefault(name.partition("\n")[0], []).append(state)

    def _step(self, state: KeyState, second: int, tenant: str, key: str, cell: Cell) -> Alarm | None:
        counts = cell.counts
        self._settle(state, second, tenant, key)
        state.requests += counts["requests"]
        if counts.get("blocks"):
            state.recent.append(blocks_of(second, cell, self._contributors_max))
            del state.recent[:-RECENT_MAX]
        if "later" in cell.weights:
            heard_later(state.recent, first(cell.weights["later"], self._contributors_max))
        doubled = state.requests.bit_length() > (state.requests - counts["requests"]).bit_length()
        if second // 3_600 != state.hour or (doubled and not state.charts[0].maxima):
            self._turn(state, second, tenant)
        if not state.rates:
            guard, prior, weight = self._guard(tenant, key), self._config.prior_rate, self._config.prior_blocks
            for stream in STREAMS:
                pooled = guard.streams[stream].overall(prior, weight)
                state.rates[stream] = state.usual.streams[stream].at(state.hour % WEEK_H, pooled, weight)
            for chart in state.charts:
                chart.aim(state.rates[chart.stream])
        run(state.charts, second, counts)
        worst = self._crossed(state, counts)
        told = worst is not None and self._to_tell(state, worst, second)
        self._wait(state, second, counts, suspicious=state.alarming_s is not None)
        return self._alarm(state, worst, second, tenant, key) if told and worst is not None else None

    def _crossed(self, state: KeyState, counts: dict[str, int]) -> Chart | None:
        """The chart furthest over its threshold, if a block of this second put it there and no user is alone."""
        over = [
            chart
            for chart in state.charts
            if chart.sum >= chart.threshold and counts.get(f"{chart.stream}_blocks") and self._shared(state, chart)
        ]
        return max(over, key=lambda chart: chart.sum / chart.threshold) if over else None

    def _to_tell(self, state: KeyState, chart: Chart, second: int) -> bool:
        """A spike is told while evidence comes, and again when it has doubled; not whenever a chart is still high."""
        new = state.alarming_s is None or second - state.raised_s < self._config.again_s
        if new or chart.sum >= 2 * chart.threshold:
            state.raised_s = state.alarming_s = second
            return True
        return False

    def _turn(self, state: KeyState, second: int, tenant: str) -> None:
        """Once an hour, at first whenever requests double: usual rates, and thresholds from the charts' past."""
        state.hour, state.rates = second // 3_600, {}
        sharing = sum(state.hour - each.hour < SHARING_H for each in self._states[tenant])
        per_week = share_of(self._config.budget_per_week, sharing, len(state.charts))
        a_week = state.requests / max(second - state.first_s + 1, 60) * WEEK_S
        cold = cold_threshold(self._config.prior_rate, a_week, per_week)
        for chart in state.charts:
            chart.turn(second)
            chart.threshold = threshold_of(chart.maxima, cold, per_week)

    def _guard(self, tenant: str, key: str) -> History:
        name = _guard_of(tenant, key)
        if name not in self._guards:
            self._guards[name] = History.new()
        return self._guards[name]

    def _shared(self, state: KeyState, chart: Chart) -> bool:
        """Whether the spike is more than one user's. Callers without a name are not one: probing knows none of them."""
        counted = by_user(state.recent, chart.start_s, "counted")
        most = max((blocks for user, blocks in counted.items() if user), default=0)
        return most <= self._config.top_user_share_max * sum(counted.values())

    def _wait(self, state: KeyState, second: int, counts: dict[str, int], *, suspicious: bool) -> None:
        if suspicious:
            if any(chart.sum >= chart.threshold / 2 for chart in state.charts):
                state.alarming_s = second
            elif state.alarming_s is not None and second - state.alarming_s >= self._config.calm_s:
                state.alarming_s = None
        minute = second // 60
        if not state.waiting or state.waiting[-1].minute != minute:
            state.waiting.append(Minute(minute, {}))
        waiting = state.waiting[-1]
        waiting.suspicious = waiting.suspicious or suspicious
        for name, count in counts.items():
            waiting.counts[name] = waiting.counts.get(name, 0) + count

    def _settle(self, state: KeyState, second: int, tenant: str, key: str) -> None:
        """Minutes that are old enough enter the baseline, unless an alarm was going on in them."""
        settle_s = self._config.settle_cold_s if self._cold(state) else self._config.settle_s
        if not state.waiting or (state.waiting[0].minute + 1) * 60 > second - settle_s:
            return
        guard = self._guard(tenant, key)
        while state.waiting and (state.waiting[0].minute + 1) * 60 <= second - settle_s:
            waiting = state.waiting.pop(0)
            state.rates = {}
            if waiting.suspicious:
                self._doubt(state, waiting)
                continue
            if state.suspect_since_s is not None:
                state.suspect, state.suspect_since_s = History.new(), None
            state.usual.add(waiting.minute, waiting.counts, self._config.half_life_s)
            guard.add(waiting.minute, waiting.counts, self._config.half_life_s)

    def _doubt(self, state: KeyState, waiting: Minute) -> None:
        """A suspicious minute is set aside; when nothing else came for a day, what was set aside is the new normal, if
        it lasted. Else it was a burst whose charts fall slowly, since few ask: over, and not learned."""
        if state.suspect_since_s is None:
            state.suspect_since_s = waiting.minute * 60
        state.suspect.add(waiting.minute, waiting.counts, self._config.half_life_s)
        if waiting.minute * 60 - state.suspect_since_s >= self._config.adopt_s:
            if lasted(state.suspect, state.usual, state.suspect_since_s, self._config):
                state.usual = state.suspect
            state.suspect, state.suspect_since_s, state.alarming_s = History.new(), None, None
            for chart in state.charts:
                chart.sum = 0.0

    def _cold(self, state: KeyState) -> bool:
        """Whether the assumed rate still outweighs what was learned."""
        return state.usual.trials() < self._config.prior_blocks / self._config.prior_rate

    def _alarm(self, state: KeyState, chart: Chart, second: int, tenant: str, key: str) -> Alarm:
        rate, distinct = state.rates[chart.stream], state.rates["distinct"]
        spike = Spike(tenant, key, chart, second, rate, distinct, self._cold(state))
        announced = [*self._announced.get(tenant, []), *self._announced.get("", [])]
        return alarm_of(spike, state.recent, announced, self._config.change_s)

    def snapshot(self) -> bytes:
        keys_of = {tenant: len(states) for tenant, states in self._states.items()}
        return _encoder.encode((self._keys, keys_of, self._guards, self._announced, self._refused_keys))

    def restore(self, raw: bytes) -> None:
        state = _keys_decoder.decode(raw)
        self._keys, _, self._guards, self._announced, self._refused_keys = state
        self._share()


def _guard_of(tenant: str, key: str) -> str:
    return f"{tenant}\n{key.partition(chr(10))[2]}"


_encoder = msgspec.msgpack.Encoder()
_keys_decoder = msgspec.msgpack.Decoder(
    tuple[dict[str, KeyState], dict[str, int], dict[str, History], dict[str, list[Announced]], int]
)

DETECTOR: Final = Detector(
    card=Card(
        name=NAME,
        version="7",
        atlas=["AML.T0051.000", "AML.T0054"],
        owasp=["LLM01"],
        runbook=[
            "Did the guard, the model, an adapter or a template change just before? If so, suspect the rollout.",
            "Open the sample events: one family of prompts (an attack passed around), or a guard that turned strict?",
            "Do the named users share an address or an API key? Were any of their other requests answered?",
        ],
        key=["tenant", "model", "guard"],
        window_s=86_400,
        lookback_s=3_600,
    ),
    reads=frozenset({"verdicts"}),
    enabled=lambda config: config.block_rate.enabled,
    stage_one=BlockRateOne,
    stage_two=BlockRateTwo,
)
