"""Reads iw.findings: the newest revision of each finding, for the command line."""

from collections.abc import Callable

from collector.kafka import KafkaConfig, ensure_topics, read_topic, wait_for_broker
from detectors.finding import Finding
from streams.deadletter import Unusable
from streams.storing import finding_of

PREFIX_DIGITS_MIN = 8


class NoSuchFinding(ValueError):
    """No finding, or more than one, has such a uid."""


async def newest_findings(
    kafka: KafkaConfig,
    *,
    uid_prefix: str = "",
    timeout_s: float = 10.0,
    wanted: Callable[[Finding], bool] | None = None,
) -> list[Finding]:
    """The newest revision of each finding on the topic that is `wanted`, latest seen first.

    Memory: one revision of each. Raises BrokerAway or TopicMismatch.
    """
    await wait_for_broker(kafka, timeout_s)
    await ensure_topics(kafka)
    newest: dict[str, Finding] = {}
    async for record in read_topic(kafka, "findings"):
        if not (record.key or b"").startswith(uid_prefix.encode()):
            continue
        try:
            finding = finding_of(record.value or b"")
        except Unusable:
            continue  # its dead letter is delivery's to write
        known = newest.get(finding.uid)
        if known is None or finding.revision >= known.revision:
            newest[finding.uid] = finding
    found = [finding for finding in newest.values() if wanted is None or wanted(finding)]
    return sorted(found, key=lambda finding: (-finding.last_seen_us, finding.uid))


async def find(kafka: KafkaConfig, uid: str, *, timeout_s: float = 10.0) -> Finding:
    """The finding whose uid begins with at least eight digits. Raises NoSuchFinding, BrokerAway or TopicMismatch."""
    if len(uid) < PREFIX_DIGITS_MIN or set(uid) - set("0123456789abcdef"):
        raise NoSuchFinding(f"a finding is named by {PREFIX_DIGITS_MIN} to 32 hexadecimal digits of its uid")
    found = await newest_findings(kafka, uid_prefix=uid, timeout_s=timeout_s)
    if not found:
        raise NoSuchFinding(f"no finding on {kafka.topic('findings')} has a uid that begins with {uid}")
    if len(found) > 1:
        raise NoSuchFinding(f"{len(found)} findings have a uid that begins with {uid}: give more digits")
    return found[0]
