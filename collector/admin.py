"""Topics as they are and as they must be: made where they are missing, checked, told, and given more partitions."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from collector.login import BrokerAway, admin_client
from collector.topics import KafkaConfig, TopicSpec, topic_specs

log = structlog.get_logger(__name__)


class TopicMismatch(RuntimeError):
    """A topic exists, but with a setting that would break order, time or delivery."""


async def ensure_topics(config: KafkaConfig, specs: Sequence[TopicSpec] | None = None) -> dict[str, int]:
    """Create the topics that are missing, check those that exist, and return topic → partitions.

    Checked: partition count, LogAppendTime, clean-up policy, and that `max.message.bytes` is not too small. Retention
    and replication of an existing topic are the operator's. Safe to run from several processes at once.
    Raises TopicMismatch, or BrokerAway where no broker answers within the request timeout.
    """
    wanted = {spec.name: spec for spec in (topic_specs(config) if specs is None else specs)}
    try:
        async with asyncio.timeout(4 * config.request_timeout_ms / 1000), admin_client(config) as admin:
            missing = wanted.keys() - (await _partition_counts(admin)).keys()
            await _create(admin, [wanted[name] for name in sorted(missing)])
            # The controller knows a new topic a moment before the brokers do.
            while wanted.keys() - (counts := await _partition_counts(admin)).keys():  # noqa: ASYNC110 (another machine)
                await asyncio.sleep(0.05)
            configs = await _configs(admin, sorted(wanted))
    except (KafkaError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise BrokerAway(f"no Kafka at {config.bootstrap_servers} to check topics with: {reason}") from None
    wrong = [fault for name, spec in wanted.items() for fault in _faults(spec, counts[name], configs[name])]
    if wrong:
        raise TopicMismatch("; ".join(wrong))
    return {name: counts[name] for name in wanted}


async def _partition_counts(admin: AIOKafkaAdminClient) -> dict[str, int]:
    # All topics are listed: naming a missing one may create it with the broker's defaults.
    topics = await admin.describe_topics(None)
    return {t["topic"]: len(t["partitions"]) for t in topics if t["error_code"] == 0 and t["partitions"]}


async def _create(admin: AIOKafkaAdminClient, specs: Sequence[TopicSpec]) -> None:
    if not specs:
        return
    new = [NewTopic(s.name, s.partitions, s.replication, topic_configs=dict(s.configs)) for s in specs]
    for name, code, message in (await admin.create_topics(new)).topic_errors:
        if code == 0:
            log.info("topic created", topic=name)
        elif code != 36:  # 36: another process was quicker
            hint = ' (one broker alone wants [kafka] scale = "dev")' if code == 38 else ""
            raise TopicMismatch(f"Kafka would not create {name}: {message or f'error {code}'}{hint}")


async def _configs(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, dict[str, str]]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    found = {}
    for response in await admin.describe_configs(resources):
        for code, message, _kind, name, entries in response.resources:
            if code:
                raise TopicMismatch(f"Kafka would not tell the settings of {name}: {message or f'error {code}'}")
            found[name] = {entry[0]: entry[1] for entry in entries}
    return found


def _faults(spec: TopicSpec, partitions: int, configs: Mapping[str, str]) -> list[str]:
    faults = []
    if partitions != spec.partitions:
        faults.append(f"{spec.name} has {partitions} partitions, the configuration says {spec.partitions}")
    faults += [
        f"{spec.name} has {key}={configs.get(key)}, it must be {spec.configs[key]}"
        for key in ("message.timestamp.type", "cleanup.policy")
        if configs.get(key) != spec.configs[key]
    ]
    size, least = int(configs.get("max.message.bytes", 0)), int(spec.configs["max.message.bytes"])
    if size < least:
        faults.append(f"{spec.name} takes messages of {size} bytes, it must take {least} (max.message.bytes)")
    return faults


class TopicFacts(NamedTuple):
    """A topic as it is."""

    partitions: int
    replication: int
    configs: Mapping[str, str]


class Mismatch(NamedTuple):
    """What is wrong with a topic, and the command or setting that mends it."""

    topic: str
    what: str
    remedy: str


AT_LEAST: Final = ("retention.ms", "min.insync.replicas", "max.message.bytes")
"""Settings of which more is as good; of retention -1 is more than all."""


async def describe_topics(config: KafkaConfig) -> dict[str, TopicFacts]:
    """Every topic of ours that exists. Raises BrokerAway or TopicMismatch."""
    names = [spec.name for spec in topic_specs(config)]
    try:
        async with asyncio.timeout(4 * config.request_timeout_ms / 1000), admin_client(config) as admin:
            there = {t["topic"]: t["partitions"] for t in await admin.describe_topics(None) if t["error_code"] == 0}
            found = [name for name in names if there.get(name)]
            configs = await _configs(admin, found) if found else {}
    except (KafkaError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise BrokerAway(f"no Kafka at {config.bootstrap_servers} to ask for topics: {reason}") from None
    return {
        name: TopicFacts(len(there[name]), min(len(p["replicas"]) for p in there[name]), configs[name])
        for name in found
    }


def mismatches(config: KafkaConfig, facts: Mapping[str, TopicFacts]) -> list[Mismatch]:
    """Where the topics are not what they must be; more retention, replicas or message size is no mismatch."""
    found: list[Mismatch] = []
    for spec in topic_specs(config):
        fact = facts.get(spec.name)
        if fact is None:
            found.append(Mismatch(spec.name, "is missing", "start any process of inferwatch: it makes its topics"))
            continue
        found += _partition_mismatch(config, spec, fact)
        if fact.replication < spec.replication:
            what = f"has replication {fact.replication}, it must be {spec.replication}"
            found.append(Mismatch(spec.name, what, "kafka-reassign-partitions.sh, with more replicas a partition"))
        for key, wanted in spec.configs.items():
            is_now = fact.configs.get(key, "")
            if not _suits(key, is_now, wanted):
                what = f"has {key}={is_now}, it must be {wanted}" + (" or more" if key in AT_LEAST else "")
                found.append(Mismatch(spec.name, what, _alter(config, spec.name, key, wanted)))
    return found


def _partition_mismatch(config: KafkaConfig, spec: TopicSpec, fact: TopicFacts) -> list[Mismatch]:
    if fact.partitions == spec.partitions:
        return []
    what = f"has {fact.partitions} partitions, the configuration says {spec.partitions}"
    name = spec.name.removeprefix(f"{config.topic_prefix}.")
    grow = name == "events" and fact.partitions < spec.partitions
    remedy = "inferwatch topics grow" if grow else f"set kafka.partitions.{name} = {fact.partitions}"
    return [Mismatch(spec.name, what, remedy)]


def _suits(key: str, is_now: str, wanted: str) -> bool:
    if key not in AT_LEAST:
        return is_now == wanted
    number = int(is_now or 0)
    return number >= int(wanted) or (key == "retention.ms" and number == -1)


def _alter(config: KafkaConfig, topic: str, key: str, value: str) -> str:
    login = "" if config.security_protocol == "PLAINTEXT" else " --command-config client.properties"
    return (
        f"kafka-configs.sh --bootstrap-server {config.bootstrap_servers}{login} --alter --entity-type topics "
        f"--entity-name {topic} --add-config {key}={value}"
    )


async def count_partitions(config: KafkaConfig) -> dict[str, int]:
    """Every topic there is, ours or not → its partitions. Raises BrokerAway."""
    try:
        async with asyncio.timeout(4 * config.request_timeout_ms / 1000), admin_client(config) as admin:
            return await _partition_counts(admin)
    except (KafkaError, OSError, TimeoutError) as error:
        raise BrokerAway(f"no Kafka at {config.bootstrap_servers} to ask for topics: {error}") from None


async def add_partitions(config: KafkaConfig, totals: Mapping[str, int]) -> None:
    """Gives topics so many partitions in all; one that has them already is left alone. Raises BrokerAway or
    TopicMismatch."""
    try:
        async with asyncio.timeout(4 * config.request_timeout_ms / 1000), admin_client(config) as admin:
            counts = await _partition_counts(admin)
            more = {name: NewPartitions(total) for name, total in totals.items() if counts.get(name, total) < total}
            answered = (await admin.create_partitions(more)).topic_errors if more else ()
            for name, code, message in answered:
                if code:
                    raise TopicMismatch(f"Kafka would not give {name} more partitions: {message or f'error {code}'}")
            while any([(await _partition_counts(admin))[name] < totals[name] for name in more]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # the controller knows a moment before the brokers do
    except (KafkaError, OSError, TimeoutError) as error:
        raise BrokerAway(f"no Kafka at {config.bootstrap_servers} to add partitions with: {error}") from None
