"""What the snapshots of both engines have in common: their version, and whose they are."""

from typing import Final, Protocol

SNAPSHOT_VERSION: Final = 1


class BadSnapshot(ValueError):
    """The bytes are no snapshot of this engine: another version, partition, or damaged."""


class Layout(Protocol):
    """The head of every snapshot."""

    version: int
    partition: int
    partitions: int


def check(state: Layout, partition: int, partitions: int) -> None:
    """Raises `BadSnapshot` where `state` is not of this version and partition."""
    if state.version != SNAPSHOT_VERSION:
        raise BadSnapshot(
            f"snapshot version {state.version}, wanted {SNAPSHOT_VERSION}: rebuild the state from the log"
        )
    if (state.partition, state.partitions) != (partition, partitions):
        raise BadSnapshot(
            f"snapshot of partition {state.partition} of {state.partitions}, wanted {partition} of {partitions}"
        )
