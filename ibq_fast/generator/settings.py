"""How images are drawn: the settings of one request, and those published with the four sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ibq_fast.generator.guidance import Guidance


@dataclass(frozen=True)
class SamplingSettings:
    """Guidance and restriction of the distribution that tokens are drawn from.

    Logits are guided, divided by ``temperature``, cut to the ``top_k`` largest (0: all, 1: greedy, the
    argmax) and then to the smallest set of codes with a probability of ``top_p``: see
    :func:`ibq_fast.ops.choose_tokens`. Raises ValueError naming the setting that is out of range.
    """

    guidance: Guidance | None = None
    """None samples the class's distribution alone, at half the cost."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature: expected a finite number > 0 (top_k=1 is greedy), got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or not 0 <= self.top_k < 2**63:
            raise ValueError(f"top_k: expected an integer in [0, 2^63), got {self.top_k!r}")

    def guidance_scales(self, positions: int) -> list[float]:
        """The guidance scale at every position, cut off after the last that guides: [] without guidance."""
        scales = self.guidance.scales(positions) if self.guidance else []
        while scales and scales[-1] <= 1:
            scales.pop()
        return scales


# The published implementation's scripts/evaluation/sample_gpu.sh: what its figures for 256 x 256 ImageNet
# were sampled with (50 images a class, its seed 42; FID 2.88, 2.45, 2.14 and 2.05 by its docs/IBQ.md).
PRESETS = {
    "B": SamplingSettings(Guidance(2.25), temperature=1.1),
    "L": SamplingSettings(Guidance(2.0), temperature=1.0),
    "XL": SamplingSettings(Guidance(2.35), temperature=1.15),
    "XXL": SamplingSettings(Guidance(2.85), temperature=1.2),
}
"""Settings by published size: all codes (top_k 0, top_p 1), constant guidance."""
