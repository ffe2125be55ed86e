"""The two stages of detection, without Kafka or Faust: events to rollups, rollups to findings.

Guarantees. (a) The same partition log gives the same rollups, and these the same findings, byte for byte, whatever the
batches, snapshots and restores. (b) The same events over other partitions, or interleaved otherwise, give the same
findings but for offsets, as long as no event was late, no table was full, and lanes had no holes of their own.

Delivery: `snapshot` holds the last offset applied and everything not yet taken, so reading again from an older offset
changes nothing (`observe` answers "replayed"). What a crash loses: nothing, if outputs were acknowledged before the
snapshot was kept and reading goes on from its offset.
"""

from detectors.partition import PartitionEngine
from detectors.snapshot import BadSnapshot
from detectors.tenant import PartitionMismatch, TenantEngine

__all__ = ["BadSnapshot", "PartitionEngine", "PartitionMismatch", "TenantEngine"]
