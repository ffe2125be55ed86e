"""Topics as they are and as they must be: made where they are missing, checked, told, and given more partitions."""

import asyncio
from collections.abc import Mapping, Sequence

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
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
