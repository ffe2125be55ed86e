"""What `volume` keeps of a tenant and of a client above its past, and the words and figures of its alarms."""

import math
from typing import Final, NamedTuple

from msgspec import Struct, field

from detectors.columns import Ints
from detectors.config import VolumeConfig
from detectors.detector import Alarm, actor_entity, contributors
from detectors.exceedances import WEEK_S, Exceedances
from detectors.finding import Entity, Statistic
from detectors.histogram import Histogram, halve
from detectors.registry import Rows
from detectors.rollup import Cell, Sample, add_all
from detectors.time import SECOND_US
from detectors.volume_book import MEASURES, RATIO_MIN

PRIOR_MEAN_MILLI: Final = 350
"""Assumed: who exceeds his past by 1.5 exceeds it by another factor of 1.4 on average."""
PRIOR_PEAKS: Final = 6
"""And six do in a week."""
RATIO_TOLD: Final = 2.0
"""Less than twice the past is never told, however quiet a tenant is."""
POPULATION_MIN: Final = 20
POPULATION_MAX: Final = 1_000_000
"""Windows of clients that a tenant's population remembers before it halves them."""
HIGH_SHARE: Final = 0.5
MOSTLY: Final = 2 / 3
WORDS: Final = {"user": "Client", "session": "Session", "api_key": "API key", "address": "Address"}


class Judged(NamedTuple):
    """A client's window that passed a step."""

    kind: str
    """user (or what stands for one), address, api_key."""
    measure: int
    who: str
    volume: int
    ratio_milli: int
    windows: int
    sample: Sample | None


class Episode(Struct):
    """A client above its past."""

    start_us: int
    samples: list[Sample] = []
    offsets: dict[int, tuple[int, int]] = {}


class TenantVolume(Struct):
    """What the clients of one tenant do."""

    peaks: Exceedances
    population: dict[str, list[Histogram]]
    """Kind of client to, a measure, how many windows reached each power of two (its number of bits)."""
    window: int = 0
    totals: list[int] = field(default_factory=lambda: [0, 0])
    """Requests and tokens of this window so far."""
    loud: dict[str, tuple[int, int]] = {}
    """API keys and addresses of the users told in this window, by measure: the largest such user's volume, and the
    measure."""

    @classmethod
    def new(cls, second: int) -> "TenantVolume":
        """A tenant that was never seen."""
        kinds: dict[str, list[Histogram]] = {kind: [{}, {}] for kind in ("user", "api_key", "address")}
        return cls(Exceedances(second, PRIOR_MEAN_MILLI, PRIOR_PEAKS), kinds)

    def add(self, window: int, cell: Cell) -> None:
        """A second of all its clients."""
        if window != self.window:
            self.window, self.totals, self.loud = window, [0, 0], {}
        for measure, name in enumerate(MEASURES):
            self.totals[measure] += cell.counts[name]
            self._reach("user", measure, cell.histograms[name])

    def reach(self, kind: str, reached: tuple[tuple[Rows, Ints], tuple[Rows, Ints]]) -> None:
        """Windows of API keys or addresses that reached a power of two."""
        for measure, (_, sizes) in enumerate(reached):
            histogram: Histogram = {}
            for size in sizes.tolist():
                histogram[size] = histogram.get(size, 0) + 1
            self._reach(kind, measure, histogram)

    def _reach(self, kind: str, measure: int, sizes: Histogram) -> None:
        histograms = self.population[kind]
        add_all(histograms[measure], sizes)
        if max(histograms[measure].values(), default=0) > POPULATION_MAX:
            histograms[measure] = halve(histograms[measure])

    def largest(self, kind: str, measure: int, share: float) -> float | None:
        """What at most this share of the clients' windows reached, to a factor of two; None where too few are known."""
        reached = self.population[kind][measure]
        windows = max(reached.values(), default=0)
        if windows < POPULATION_MIN:
            return None
        for size in range(1, max(reached) + 1):
            if reached.get(size, 0) <= max(share * windows, 1):
                return 2.0 ** (size - 1)
        return 2.0 ** max(reached)

    def base(self, judged: Judged, config: VolumeConfig) -> float | None:
        """What the client is compared with: its past; for a stranger the population's largest windows too."""
        past = judged.volume * 1_000 / judged.ratio_milli
        if judged.windows >= config.known_windows:
            return past
        population = self.largest(judged.kind, judged.measure, config.stranger_share)
        if population is None:
            return None
        return max(past, population * (1 - judged.windows / config.known_windows))

    def excess_milli(self, judged: Judged, config: VolumeConfig) -> int | None:
        """Thousandths of a nat beyond `RATIO_MIN` times what it is compared with."""
        base = self.base(judged, config)
        return None if base is None else round(1_000 * math.log(judged.volume / base / RATIO_MIN))

    def bar_milli(self, second: int, config: VolumeConfig) -> int:
        """The excess that is told."""
        least = round(1_000 * math.log(RATIO_TOLD / RATIO_MIN))
        return max(self.peaks.excess_bar_milli(second, config.budget_per_week), least)

    def note(self, judged: Judged, by: dict[str, int]) -> None:
        """A user is told: `by` has, of whoever crossed in this second, the API key and address, and the volume."""
        for pair, volume in by.items():
            who, _, carrier = pair.partition("\n")
            if who == judged.who:
                name = f"{carrier}\n{judged.measure}"
                self.loud[name] = max(self.loud.get(name, (0, 0)), (volume, judged.measure))

    def explained(self, judged: Judged) -> bool:
        """Whether a user of it told in this window has most of it."""
        volume, _ = self.loud.get(f"{judged.who}\n{judged.measure}", (0, 0))
        return volume >= MOSTLY * judged.volume


def alarm_of(  # noqa: PLR0917  # one of each thing that an alarm is made of
    name: str, tenant: TenantVolume, second: int, judged: Judged, episode: Episode, config: VolumeConfig
) -> Alarm:
    """The client's window has passed the threshold."""
    base, measure = tenant.base(judged, config) or 1.0, MEASURES[judged.measure]
    ratio = judged.volume / base
    threshold = base * RATIO_MIN * math.exp(tenant.bar_milli(second, config) / 1_000)
    total = max(tenant.totals[judged.measure], judged.volume)
    share = judged.volume / total
    stranger = judged.windows < config.known_windows
    assumed = second - tenant.peaks.first_s < WEEK_S
    entity = _entity(judged)
    compared = (
        f"its tenant's largest windows, {base:,.0f}, since little is known of it"
        if stranger
        else f"its largest, {base:,.0f}"
    )
    minutes = config.window_s / 60
    mean = max(tenant.peaks.mean_milli(), 1) / 1_000
    return Alarm(
        tenant=name,
        entity=entity,
        model="",
        at_us=(second + 1) * SECOND_US,
        first_seen_us=episode.start_us,
        last_seen_us=(second + 1) * SECOND_US,
        severity="low" if stranger and assumed else "high" if share > HIGH_SHARE else "medium",
        confidence="low" if stranger else "medium" if assumed else "high",
        statistic=Statistic(
            name=f"{measure} in a window of {config.window_s} s",
            observed=float(judged.volume),
            baseline=round(base, 3),
            threshold=round(min(threshold, judged.volume), 3),
            unit=measure,
            improbability=round(math.log(max(ratio / RATIO_MIN, 1)) / mean / math.log(10), 2),
        ),
        counts={
            measure: judged.volume,
            "times_its_past_percent": round(100 * ratio),
            "tenant_share_percent": round(100 * share),
            "windows_known": judged.windows,
            "peaks_learned": tenant.peaks.peaks,
        },
        summary=(
            f"{WORDS[entity.kind]} {_shown(judged.who)} had {judged.volume:,} {measure} within {minutes:g} min,"
            f" {ratio:.1f} times {compared}, and {100 * share:.0f} % of the tenant's"
        ),
        offsets=episode.offsets,
        samples=episode.samples,
        contributors=contributors({judged.who.partition("/")[0]: judged.volume}, measure, 1),
        cold_start=_cold_start(stranger=stranger, assumed=assumed),
    )


def _cold_start(*, stranger: bool, assumed: bool) -> str:
    told = []
    if stranger:
        told.append("Few earlier windows of this client: compared with the tenant's clients.")
    if assumed:
        told.append("Less than a week of this tenant: the threshold is mostly assumed.")
    return " ".join(told)


def _entity(judged: Judged) -> Entity:
    return Entity(kind="session", id=judged.who) if "/" in judged.who else actor_entity(judged.who)


def _shown(who: str) -> str:
    return "/".join(part[:14] for part in who.split("/"))
