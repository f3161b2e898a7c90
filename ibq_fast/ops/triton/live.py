"""Tiles that a backward need not form: bounds from the forward, and the lists of tiles that remain.

The forward's last sweep knows every row's log-sum-exps. From ``BOUNDED_FROM`` codes on it leaves the greatest
log-probability of each of its tiles, under P and under p (tile_bound [2, row tiles, code tiles]). A tile
whose bounds are both negligible (docs/architecture.md, "What may be skipped") adds nothing to a gradient.

The kernels of the backward walk lists of the other tiles instead of testing each: a loop without a branch is
one that Triton pipelines. Lists are made on the device, without waiting for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ibq_fast.ops import skipping
from ibq_fast.ops.triton import plan

BOUNDED_FROM = 8192
KERNEL = "column_means"  # whose tiles the bounds are about
# Where Triton (3.7) does not compile that kernel with bounds: nothing is skipped there.
UNBOUNDED = ("sm_100",)


def grid(z: Tensor, k: Any) -> tuple[Any, Any]:
    """Row tiles and code tiles of tile_bound for z [N, D] and K codes; zeros where there are no bounds."""
    if k < BOUNDED_FROM or plan.architecture(z.device) in UNBOUNDED:
        return 0, 0
    tile = plan.blocks(KERNEL, z).tile
    return plan.ceil_div(z.shape[0], tile.rows), plan.ceil_div(k, tile.codes)


class Live:
    """Which tiles of a call matter, by ``bound`` from the forward [2, row tiles, code tiles]; all where it is
    empty."""

    def __init__(self, bound: Tensor, z: Tensor, k: int) -> None:
        tolerance = skipping.skip_tolerance()
        self.skips = bound.shape[1] > 0 and tolerance > 0
        if not self.skips:
            return
        gap = math.log(k) - math.log(tolerance)
        tile = plan.blocks(KERNEL, z).tile
        self.rows, self.codes = tile.rows, tile.codes
        self.n, self.k = z.shape[0], k
        self.map = ~(bound < -gap).all(dim=0)  # NaN is live

    def walks(self, tile: plan.Tile, over_codes: bool) -> Tensor | None:
        """For kernels with the tile given: int32 [tiles owned, 1 + tiles walked], for each tile of rows (or,
        ``over_codes`` False, of codes) the number of live tiles and then these, in order. None: walk all."""
        if not self.skips:
            return None
        live = _resized(self.map, self.rows, tile.rows, plan.ceil_div(self.n, tile.rows))
        live = _resized(live.T, self.codes, tile.codes, plan.ceil_div(self.k, tile.codes))
        live = live.T if over_codes else live
        order = (~live).to(torch.int8).argsort(dim=1, stable=True)
        return torch.cat((live.sum(dim=1, keepdim=True), order), dim=1).to(torch.int32)


def _resized(live: Tensor, old: int, new: int, count: Any) -> Tensor:
    """Rows of a map of tiles ``old`` high as ``count`` rows of tiles ``new`` high; both are powers of two."""
    if new <= old:
        return live.repeat_interleave(old // new, dim=0)[:count]
    missing = count * (new // old) - live.shape[0]
    whole = torch.cat((live, live.new_zeros((missing, live.shape[1]))))
    return whole.unflatten(0, (count, new // old)).any(dim=1)
