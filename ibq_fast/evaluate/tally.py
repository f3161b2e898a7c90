"""What was measured over a part of a set's images; parts add up to the whole in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ibq_fast.evaluate.moments import Moments

BLOCK = 64  # images; the unit that processes share out and an interrupted evaluation repeats


class Tally:
    """Measurements of ``images`` images.

    done: bool [blocks], the blocks of ``BLOCK`` images it holds. seen: bool [N], the images that could be
    read. values: float64 [N] by name, a figure of each image, NaN where not seen; sums: tensors that add up;
    moments: of features. The values cost 8 bytes an image and figure, nothing else grows with the set.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.done = torch.zeros(-(-images // BLOCK), dtype=torch.bool)
        self.seen = torch.zeros(images, dtype=torch.bool)
        self.values: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.moments: dict[str, Moments] = {}
        self.unreadable: list[tuple[str, str]] = []

    def put(self, name: str, indices: Tensor, values: Tensor) -> None:
        """A figure of images ``indices`` [B]: [B] of any floating dtype."""
        if name not in self.values:
            self.values[name] = torch.full((self.images,), float("nan"), dtype=torch.float64)
        self.values[name][indices] = values.cpu().double()

    def add(self, name: str, amount: Tensor) -> None:
        """Add to a sum."""
        amount = amount.cpu()
        self.sums[name] = self.sums[name] + amount if name in self.sums else amount.clone()

    def features(self, name: str, features: Tensor) -> None:
        """Take up feature vectors [B, D]."""
        self.moments.setdefault(name, Moments(features.shape[1])).update(features)

    def mean(self, name: str, most: float | None = None) -> float:
        """The mean of a figure over the images seen, in the order of the set, each at most ``most``; NaN for
        none."""
        values = self.values[name][self.seen]
        return float((values if most is None else values.clamp_max(most)).mean())

    def merge(self, other: Tally) -> None:
        """Take in what ``other`` measured. Raises ValueError when both have measured a block."""
        if other.images != self.images or bool((self.done & other.done).any()):
            raise ValueError("other: expected other blocks of the same set")
        self.done |= other.done
        self.seen |= other.seen
        for name, values in other.values.items():
            if name in self.values:
                self.values[name] = torch.where(other.seen, values, self.values[name])
            else:
                self.values[name] = values
        for name, amount in other.sums.items():
            self.add(name, amount)
        for name, moments in other.moments.items():
            self.moments.setdefault(name, Moments(len(moments.centre))).merge(moments)
        self.unreadable = sorted([*self.unreadable, *other.unreadable])

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "images": self.images,
            "done": self.done,
            "seen": self.seen,
            "values": dict(self.values),
            "sums": dict(self.sums),
            "moments": {name: moments.state_dict() for name, moments in self.moments.items()},
            "unreadable": [list(item) for item in self.unreadable],
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Tally:
        """The tally that ``state`` was taken of."""
        tally = Tally(state["images"])
        tally.done, tally.seen = state["done"], state["seen"]
        tally.values, tally.sums = dict(state["values"]), dict(state["sums"])
        for name, saved in state["moments"].items():
            tally.moments[name] = Moments(len(saved["centre"]))
            tally.moments[name].load_state_dict(saved)
        tally.unreadable = [(name, reason) for name, reason in state["unreadable"]]
        return tally
