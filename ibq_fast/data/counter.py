"""Counter-based random numbers: each draw is a pure function of (seed, epoch, index, draw).

A stateful generator would have to be saved, and replayed up to the step where a run resumes; with workers its
order of use is a race. Here the augmentation of image 17 in epoch 3 is the same number whoever asks, and
whenever. The function is splitmix64's finaliser applied once per word of the key: ours, so that neither a
numpy nor a torch release changes a run.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What a draw decides. Values are part of what makes a run repeatable: append, never renumber.
SHUFFLE: Final = 0
FLIP: Final = 1
CROP: Final = (2, 3, 4, 5)
SHARD: Final = 6
REPLACE: Final = 16  # and the following ones, one per attempt

_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def random_bits(seed: int, epoch: int, index: ArrayLike, draw: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits per element of ``index`` and ``draw`` (non-negative integers, broadcast together)."""
    start = np.array([seed & _MASK], np.uint64)
    bits = _mix(_mix(start) ^ np.uint64(epoch))
    bits = _mix(bits ^ np.atleast_1d(np.asarray(index, np.uint64)))
    return _mix(bits ^ np.atleast_1d(np.asarray(draw, np.uint64)))


def uniform(seed: int, epoch: int, index: ArrayLike, draw: ArrayLike) -> NDArray[np.float64]:
    """As ``random_bits``, but float64 in [0, 1), 53 bits fine."""
    return (random_bits(seed, epoch, index, draw) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """A random order of ``range(size)``, int64 [size]."""
    return np.argsort(random_bits(seed, epoch, np.arange(size), SHUFFLE), kind="stable")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(_STEP)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
