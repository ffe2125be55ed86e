"""All detectors, in order of name. A new one is added here and nowhere else."""

from detectors import block_rate, campaign, coverage, latency, probing, token_length, volume
from detectors.config import DetectConfig
from detectors.detector import Card, Detector


def detectors() -> tuple[Detector, ...]:
    """Every detector there is."""
    return (
        block_rate.DETECTOR,
        campaign.DETECTOR,
        coverage.DETECTOR,
        latency.DETECTOR,
        probing.DETECTOR,
        token_length.DETECTOR,
        volume.DETECTOR,
    )


def enabled(config: DetectConfig) -> list[Detector]:
    """Those that the config has switched on."""
    return [detector for detector in detectors() if config.enabled and detector.enabled(config)]


def cards() -> dict[str, Card]:
    """Name to card, of all."""
    return {detector.card.name: detector.card for detector in detectors()}
