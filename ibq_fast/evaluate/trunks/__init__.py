"""Networks whose features images are compared by, each under its own name.

What has to be downloaded, or cannot be imported, raises :class:`UnavailableError`; an evaluation then goes on
without the figures that need it and reports why.
"""

from ibq_fast.evaluate.trunks.base import Features, FeatureTrunk, TrunkName, build_trunk
from ibq_fast.evaluate.trunks.lpips import Lpips, LpipsName, build_lpips
from ibq_fast.evaluate.trunks.weights import UnavailableError, Weights, sha256_of

__all__ = [
    "FeatureTrunk",
    "Features",
    "Lpips",
    "LpipsName",
    "TrunkName",
    "UnavailableError",
    "Weights",
    "build_lpips",
    "build_trunk",
    "sha256_of",
]
