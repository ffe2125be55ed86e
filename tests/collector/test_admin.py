"""Topics are made once, as the table says, and checked, on a real broker. More is in streams/test_topics_grow.py."""

import asyncio

import pytest

from collector.kafka import KafkaConfig, TopicMismatch, TopicSpec, changelog_spec, ensure_topics, topic_specs

APPEND_TIME = {"message.timestamp.type": "LogAppendTime", "unclean.leader.election.enable": "false"}


def _spec(config: KafkaConfig, name: str, *, partitions: int = 1, size: int = 262_144, **configs: str) -> TopicSpec:
    settings = APPEND_TIME | {"cleanup.policy": "delete", "max.message.bytes": str(size)} | configs
    return TopicSpec(f"{config.topic_prefix}.{name}", partitions, 1, settings)


@pytest.mark.kafka
async def test_topics_are_created_once_and_as_the_table_says(kafka_config: KafkaConfig) -> None:
    """The first call creates all topics; the second finds nothing to do or to complain about."""
    specs = topic_specs(kafka_config)
    counts = {spec.name: spec.partitions for spec in specs}
    assert await ensure_topics(kafka_config) == counts
    assert await ensure_topics(kafka_config) == counts


@pytest.mark.kafka
async def test_topics_created_by_several_processes_at_once(kafka_config: KafkaConfig) -> None:
    """Processes that start together all come through."""
    counts = {spec.name: spec.partitions for spec in topic_specs(kafka_config)}
    assert await asyncio.gather(*(ensure_topics(kafka_config) for _ in range(4))) == [counts] * 4


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("wrong", "partitions", "sentence"),
    [
        (
            {"message.timestamp.type": "CreateTime"},
            1,
            "{topic} has message.timestamp.type=CreateTime, it must be LogAppendTime",
        ),
        ({"cleanup.policy": "compact"}, 1, "{topic} has cleanup.policy=compact, it must be delete"),
        (
            {"max.message.bytes": "1000"},
            1,
            "{topic} takes messages of 1000 bytes, it must take 262144 (max.message.bytes)",
        ),
        ({}, 3, "{topic} has 3 partitions, the configuration says 1"),
    ],
)
async def test_a_topic_that_would_break_promises_is_refused(
    kafka_config: KafkaConfig, wrong: dict[str, str], partitions: int, sentence: str
) -> None:
    """An existing topic with another setting is left as it is and refused with one sentence."""
    wanted = _spec(kafka_config, "events")
    existing = TopicSpec(wanted.name, partitions, 1, dict(wanted.configs) | wrong)
    await ensure_topics(kafka_config, [existing])
    with pytest.raises(TopicMismatch) as error:
        await ensure_topics(kafka_config, [wanted])
    assert str(error.value) == sentence.format(topic=wanted.name)


@pytest.mark.kafka
async def test_production_topics_on_one_broker_are_refused(kafka_config: KafkaConfig) -> None:
    """Three replicas can't be had from one broker; the sentence names the setting."""
    with pytest.raises(TopicMismatch, match=r'scale = "dev"'):
        await ensure_topics(kafka_config.model_copy(update={"scale": "prod"}))


@pytest.mark.kafka
async def test_changelog_topic(kafka_config: KafkaConfig) -> None:
    """The topic behind a Faust table is created and checked like the others."""
    spec = changelog_spec(kafka_config, f"{kafka_config.topic_prefix}-stage1-changelog", 4)
    assert await ensure_topics(kafka_config, [spec]) == {spec.name: 4}
    assert await ensure_topics(kafka_config, [spec]) == {spec.name: 4}
