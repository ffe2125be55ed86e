"""Opens a server process's auditor from its configuration: keys, guards, publisher, in this order.

What can be wrong on this host is found before Kafka is asked. Every failure is an exception with one sentence.
"""

import asyncio
from functools import partial

import structlog

from collector.auditor import Auditor
from collector.config import CollectorConfig
from collector.doors import open_identity
from collector.guards.stack import GuardStack
from collector.judging import JudgingThreads
from collector.kafka import KafkaConfig, wait_for_broker
from collector.publisher import Publisher
from collector.weights import Model

log = structlog.get_logger(__name__)


def check(kafka: KafkaConfig, config: CollectorConfig) -> None:
    """Find in a second what would stop the collector minutes later, when the model has been loaded.

    Raises KeyProblem, GuardRefused or BrokerAway.
    """
    open_identity(config.identity, config.gate.tenant)
    GuardStack(config.guards).close()
    config.guards.media_guard()
    asyncio.run(wait_for_broker(kafka, config.publisher.start_timeout_ms / 1000))


def open_auditor(kafka: KafkaConfig, config: CollectorConfig, model: Model, *, config_digest: str = "") -> Auditor:
    """The auditor, its publisher started: dead boots' journals are settled and all lanes are open.

    Raises KeyProblem, GuardRefused, BrokerAway, TopicMismatch, ClockApart or OSError.
    """
    identity = open_identity(config.identity, config.gate.tenant)
    guards, media_guard = GuardStack(config.guards), config.guards.media_guard()
    publisher = Publisher(
        kafka,
        config.publisher,
        config.journal,
        collector_id=config.collector_id,
        model_version=model.version,
        evidence=config.evidence,
        config_digest=config_digest,
    )
    publisher.start()
    log.info(
        "the collector is open", model_version=model.version, guards=guards.versions, tenants=len(identity.tenants)
    )
    guards.watch(partial(publisher.change, key=""))
    identity.watch(partial(publisher.change, key=""), config.identity.reload_s)
    return Auditor(
        publisher,
        guards,
        identity,
        config.gate,
        model_version=model.version,
        weights_digest=model.digest,
        threads=JudgingThreads(config.guards.workers, config.guards.waiting_max, config.guards.wait_ms_max / 1000),
        canary_s=config.guards.canary_s,
        media_guard=media_guard,
    )
