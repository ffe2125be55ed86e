"""Histograms with fixed logarithmic buckets: integers in, integers that add.

Eight buckets an octave, exact below 16, so a bucket is at most 12.5 % wide and a quantile is off by at most that.
The layout is that of HdrHistogram (G. Tene, hdrhistogram.org) with three significant bits. Values from 0 to 2**42;
larger ones are counted in the last bucket (in µs that is 51 days). Only integer arithmetic, so every machine agrees.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

Histogram = dict[int, int]
"""Bucket to count."""
VALUE_MAX: Final = 2**42 - 1
SUB_BITS: Final = 3


def bucket_of(value: int) -> int:
    """The bucket of a value; negative values count as 0."""
    if value < 16:
        return max(value, 0)
    value = min(value, VALUE_MAX)
    shift = value.bit_length() - SUB_BITS - 1
    return (shift << SUB_BITS) + (value >> shift)


def buckets_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """`bucket_of` of many values at once."""
    values = np.clip(values, 0, VALUE_MAX)
    bits = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    shift = np.maximum(bits - SUB_BITS - 1, 0)
    return np.where(values < 16, values, (shift << SUB_BITS) + (values >> shift))


def lower_edge(bucket: int) -> int:
    """The least value in the bucket; `lower_edge(bucket + 1)` is the first above it."""
    if bucket < 16:
        return bucket
    return ((bucket & 7) + 8) << ((bucket >> SUB_BITS) - 1)


def total(histogram: Histogram) -> int:
    """How many values."""
    return sum(histogram.values())


def halve(histogram: Histogram) -> Histogram:
    """Every count halved, rounded down, empty buckets dropped: how a baseline forgets in integers."""
    return {bucket: count >> 1 for bucket, count in histogram.items() if count > 1}


def quantile(weights: dict[int, float], share: float) -> float:
    """The value below which `share` of the weight lies, interpolated within its bucket; 0 for an empty histogram."""
    whole = math.fsum(weights.values())
    below = 0.0
    for bucket in sorted(weights):
        weight = weights[bucket]
        if weight > 0 and below + weight >= share * whole:
            low, high = lower_edge(bucket), lower_edge(bucket + 1)
            return low + (high - low) * max(share * whole - below, 0.0) / weight
        below += weight
    return 0.0


def share_above(weights: dict[int, float], value: float) -> float:
    """The share of the weight above `value`, interpolated within its bucket; 0 for an empty histogram."""
    bucket = bucket_of(int(value))
    low, high = lower_edge(bucket), lower_edge(bucket + 1)
    above = math.fsum(weight for other, weight in weights.items() if other > bucket)
    above += weights.get(bucket, 0.0) * min(max((high - value) / (high - low), 0.0), 1.0)
    whole = math.fsum(weights.values())
    return above / whole if whole else 0.0


def at_least(histogram: Histogram, bucket: int) -> int:
    """How many values lie in this bucket or above."""
    return sum(count for other, count in histogram.items() if other >= bucket)


def upper_tail(hits: float, trials: float, share: float) -> float:
    """ln of an upper bound on the chance of `hits` or more in `trials`, each with probability `share`.

    Chernoff: exp(-trials KL(hits / trials, share)); 0 (no evidence) where hits are not above expectation.
    Source: W. Hoeffding, "Probability inequalities for sums of bounded random variables", JASA 58, 1963, theorem 1.
    """
    if trials <= 0 or hits <= share * trials:
        return 0.0
    share = min(max(share, 1e-12), 1 - 1e-12)
    seen = min(hits / trials, 1.0)
    divergence = seen * math.log(seen / share)
    if seen < 1:
        divergence += (1 - seen) * math.log((1 - seen) / (1 - share))
    return -trials * divergence
