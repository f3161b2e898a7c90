"""The networks that a protocol asks for, as far as they can be had, and what each figure of theirs is
called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ibq_fast.evaluate.protocols import Protocol
from ibq_fast.evaluate.streaming import rank, wait_for_all
from ibq_fast.evaluate.trunks import (
    FeatureTrunk,
    Lpips,
    TrunkName,
    UnavailableError,
    Weights,
    build_lpips,
    build_trunk,
)

N = TypeVar("N")


@dataclass
class Networks:
    """``trunks`` and ``lpips`` by name; ``missing``: why others are not there."""

    trunks: dict[str, FeatureTrunk] = field(default_factory=dict)
    lpips: dict[str, Lpips] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def record(self, side: int) -> dict[str, Any]:
        """Each network's weights by hash and how images of ``side`` pixels reach it."""
        found: dict[str, Any] = {}
        for name, trunk in self.trunks.items():
            found[name] = {"sha256": trunk.sha256, "input": trunk.describe(side)}
        for name, distance in self.lpips.items():
            found[name] = {"sha256": distance.sha256}
        return found

    def preparation(self, protocol: Protocol, trunk: str) -> dict[str, Any]:
        """What ``trunk``'s statistics of a set depend on beside its images."""
        side = protocol.resolution or 0
        return {
            "prepared": {"resolution": side, "resize": protocol.resize, "crop": protocol.crop},
            "trunk": {"name": trunk, **self.record(side)[trunk]},
        }

    def unpublished(self) -> list[str]:
        """Those whose weights are not the ones that their names stand for."""
        both: dict[str, FeatureTrunk | Lpips] = {**self.trunks, **self.lpips}
        return [name for name, network in both.items() if not network.published]


def build_networks(protocol: Protocol, weights: Weights, device: torch.device, *, lpips: bool) -> Networks:
    """All that can be had. Downloads, where they are allowed, are the main process's."""
    if rank() > 0:
        wait_for_all()
    found = Networks()

    def attempt(name: str, build: Callable[[], N], into: dict[str, N]) -> None:
        try:
            into[name] = build()
        except UnavailableError as error:
            found.missing[name] = str(error)

    for trunk in protocol.trunks:
        attempt(trunk, lambda t=trunk: _trunk(t, protocol, weights, device), found.trunks)  # type: ignore[misc]
    for net in protocol.lpips if lpips else ():
        attempt(f"lpips_{net}", lambda n=net: build_lpips(n, weights, device), found.lpips)  # type: ignore[misc]
    if rank() == 0:
        wait_for_all()
    return found


def figure_name(figure: str, trunk: TrunkName | str, *, reconstruction: bool = False) -> str:
    """What a trunk's ``figure`` ("frechet", "spatial_frechet", "class_score", "precision", "recall") is
    called: only Inception's are FID, sFID and the Inception Score."""
    if trunk != "inception":
        return f"{figure}_{trunk}"
    names = {"frechet": "rfid" if reconstruction else "gfid", "spatial_frechet": "sfid"}
    return names.get(figure, figure.replace("class_score", "inception_score"))


def _trunk(name: TrunkName, protocol: Protocol, weights: Weights, device: torch.device) -> FeatureTrunk:
    return build_trunk(name, weights, device, inception_input=protocol.inception_input)
