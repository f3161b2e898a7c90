"""Classifier-free guidance, and how strong it is at each position of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "interval", "linear", "power-cosine")


@dataclass(frozen=True)
class Guidance:
    """Logits u + s (c - u) from the class's c and the null class's u (Ho, Salimans: Classifier-free diffusion
    guidance, arXiv 2207.12598), with a scale s_i of its own at each position i of n:

    - ``constant``: s_i = scale.
    - ``interval``: s_i = scale where start <= i/n < stop, else 1 (Kynkäänniemi et al.: Applying guidance in a
      limited interval, arXiv 2404.07724; there an interval of noise levels, here of positions).
    - ``linear``: s_i = 1 + (scale - 1) (i + 1)/n (Chang et al.: Muse, arXiv 2301.00704, section 2.7: guidance
      that grows linearly while an image is drawn; Li et al.: MAR, arXiv 2406.11838, in this form).
    - ``power-cosine``: s_i = 1 + (scale - 1) (1 - cos(π (i/n)^power))/2 (Gao et al.: MDT, arXiv 2303.14389;
      Yu et al.: RAR, arXiv 2411.00776, over the positions of an autoregressive model).

    Where s_i <= 1 the class's logits are used alone: a scale of at most 1 is no guidance at all, at half the
    cost. Raises ValueError naming the setting that is out of range.
    """

    scale: float
    schedule: str = "constant"
    start: float = 0.0
    """``interval`` alone: the share of the positions that comes before the guided ones."""
    stop: float = 1.0
    """``interval`` alone: the share of the positions at which guidance ends."""
    power: float = 1.0
    """``power-cosine`` alone: the larger, the later guidance sets in."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"cfg_scale: expected a finite number >= 0, got {self.scale}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"start, stop: expected 0 <= start < stop <= 1, got {self.start} and {self.stop}"
            )
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power: expected a finite number > 0, got {self.power}")
        if self.schedule != "interval" and (self.start, self.stop) != (0.0, 1.0):
            raise ValueError(f"start, stop: expected with the interval schedule, got {self.schedule!r}")
        if self.schedule != "power-cosine" and self.power != 1.0:
            raise ValueError(f"power: expected with the power-cosine schedule, got {self.schedule!r}")

    def scales(self, positions: int) -> list[float]:
        """s_i for every position i of ``positions``."""
        return [1 + (self.scale - 1) * self._share(i, positions) for i in range(positions)]

    def _share(self, i: int, n: int) -> float:
        if self.schedule == "interval":
            return 1.0 if self.start * n <= i < self.stop * n else 0.0
        if self.schedule == "linear":
            return (i + 1) / n
        if self.schedule == "power-cosine":
            return (1 - math.cos(math.pi * (i / n) ** self.power)) / 2
        return 1.0
