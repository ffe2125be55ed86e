"""Incidents: findings of a tenant that belong together carry one id, so that one page is sent for all.

Together belong findings about the same entity or the same actor (a session's is its user), blocks, probing and
campaigns that share somebody who drove them, and latency of the same model. A finding joins the oldest incident that
knows any of this and was not quiet for `incident_s`; it never changes its incident, and incidents never merge, so that
one busy user can't gather everything under one page.

Memory: `incidents_max` incidents with at most `incident_links_max` names of about 100 bytes; beyond that the longest
quiet one is forgotten, which is counted: what would have joined it is an incident, and a page, of its own.
"""

import hashlib
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from detectors.config import LifecycleConfig
from detectors.detector import Alarm
from detectors.time import SECOND_US

SHARING: Final = ("block_rate", "probing", "campaign")
"""Detectors whose findings belong together when somebody drives both."""


class Incident(Struct):
    """What is known of one incident."""

    tenant: str
    start_us: int
    last_us: int
    links: list[str]
    told_rank: int = -1
    """The worst severity that people were told."""


class Incidents:
    """The incidents of one stage-2 engine, longest quiet first."""

    def __init__(self, config: LifecycleConfig) -> None:
        self._config = config
        self._incidents: dict[str, Incident] = {}
        self._links: dict[tuple[str, str], str] = {}
        self.counters = dict.fromkeys(("incidents", "incidents_forgotten"), 0)

    def join(self, uid: str, detector: str, alarm: Alarm) -> str:
        """The incident that a new finding belongs to."""
        self._forget(alarm.at_us)
        links = links_of(detector, alarm)
        known = {self._links[alarm.tenant, link] for link in links if (alarm.tenant, link) in self._links}
        if known:
            incident_id = min(known, key=lambda each: (self._incidents[each].start_us, each))
        else:
            incident_id = incident_digest(alarm.tenant, uid)
            self.counters["incidents"] += 1
        self.touch(incident_id, detector, alarm, -1)
        return incident_id

    def touch(self, incident_id: str, detector: str, alarm: Alarm, told_rank: int) -> None:
        """An alarm of a finding in it, of which people were told `told_rank`: it goes on, and knows who was named."""
        incident = self._incidents.pop(incident_id, None)
        if incident is None:  # new, or quiet for longer than its finding was
            if len(self._incidents) >= self._config.incidents_max:
                self._drop(next(iter(self._incidents)))
                self.counters["incidents_forgotten"] += 1
            incident = Incident(alarm.tenant, alarm.at_us, alarm.at_us, [], told_rank)
        self._incidents[incident_id] = incident
        incident.last_us = max(incident.last_us, alarm.at_us)
        for link in links_of(detector, alarm):
            if len(incident.links) < self._config.incident_links_max and (alarm.tenant, link) not in self._links:
                self._links[alarm.tenant, link] = incident_id
                incident.links.append(link)

    def leads(self, incident_id: str, rank: int) -> bool:
        """Whether this is the first that people are told of the incident, or worse than all before; remembers it."""
        incident = self._incidents.get(incident_id)
        if incident is None:
            return True
        worse = rank > incident.told_rank
        incident.told_rank = max(rank, incident.told_rank)
        return worse

    def hush(self, incident_id: str) -> None:
        """A finding of it is held back now: what else people hear of the incident, they hear as if for the first time.

        Else one suppressed entity would take the page of another that came with it.
        """
        incident = self._incidents.get(incident_id)
        if incident is not None:
            incident.told_rank = -1

    def dump(self) -> list[tuple[str, Incident]]:
        """All of them, in order."""
        return list(self._incidents.items())

    def load(self, incidents: Iterable[tuple[str, Incident]]) -> None:
        """Goes on from what `dump` gave."""
        self._incidents = dict(incidents)
        self._links = {
            (incident.tenant, link): incident_id
            for incident_id, incident in self._incidents.items()
            for link in incident.links
        }

    def _forget(self, now_us: int) -> None:
        quiet_us = self._config.incident_s * SECOND_US
        while self._incidents:
            oldest = next(iter(self._incidents))
            if self._incidents[oldest].last_us + quiet_us >= now_us:
                return
            self._drop(oldest)

    def _drop(self, incident_id: str) -> None:
        incident = self._incidents.pop(incident_id)
        for link in incident.links:
            del self._links[incident.tenant, link]


def links_of(detector: str, alarm: Alarm) -> list[str]:
    """What a finding is recognised by, the entity itself first."""
    kind, entity = alarm.entity.kind, alarm.entity.id
    links = [f"{kind}:{entity}"]
    if kind == "session":
        links.append(f"user:{entity.partition('/')[0]}")
    if detector == "latency":
        links.append(f"latency of:{alarm.model}")
    if detector in SHARING:
        links += [f"user:{each.entity.id}" for each in alarm.contributors]
    if kind in ("user", "api_key", "address"):
        links.append(f"user:{entity}")
    return list(dict.fromkeys(links))


def incident_digest(tenant: str, uid: str) -> str:
    """16 hex digits, told by the first finding."""
    return hashlib.blake2b(f"{tenant}\n{uid}".encode(), digest_size=8, person=b"iw-incident").hexdigest()
