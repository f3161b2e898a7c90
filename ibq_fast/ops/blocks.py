"""What the composite operators share: blocks of rows × codes, their logits, online softmax state; and the
norms of codes as a bias, which the Triton operators take from here.

No tensor here is larger than a block (:data:`BLOCK_ELEMENTS`), N×D or K×D. Loops run over codes outside and
rows inside, so that a block of a low-precision codebook is widened once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one rows × codes block by device type. On a CPU the elementwise passes over a block should find
# it in the cache; elsewhere launch overhead asks for larger blocks. A backward holds about four blocks.
# An NPU (32 or 64 GiB) gets twice a GPU's block, 128 MiB in float32, since its launches cost more; a guess.
BLOCK_ELEMENTS = {"cpu": 1 << 17, "npu": 1 << 25}
DEFAULT_BLOCK_ELEMENTS = 1 << 24
BLOCK_ROWS = {"cpu": 128, "npu": 4096}
DEFAULT_BLOCK_ROWS = 4096

# exp(-FAR) is 0 in float32 and float64 alike: differences of logits are cut there, so that a logit of minus
# infinity (a code masked by its bias) gives 0 and never 0 · ∞.
FAR = 1.0e4

# A probability above this is the only large one of its row, whatever float32 rounding did to it.
PEAK = 0.75


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bias_with_norms(codebook: Tensor, bias: Tensor | None, norm_weight: float) -> Tensor | None:
    """bias - norm_weight · |codebook|² [K] in the statistics dtype; the bias itself for a weight of 0."""
    if norm_weight == 0.0:
        return bias
    dtype = statistics_dtype(codebook.dtype)
    norms = torch.linalg.vector_norm(codebook, dim=1, dtype=dtype).square() * -norm_weight
    return norms if bias is None else norms + bias


def slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


class Blocks:
    """Iterates over the blocks of S = scale · z @ codebook.T + bias, formed in the statistics dtype.

    z [N, D], codebook [K, D] of one floating dtype, bias [K] or None.
    """

    def __init__(self, z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float) -> None:
        self.dtype = statistics_dtype(z.dtype)
        self.z = z.detach().to(self.dtype)
        self.codebook = codebook.detach()
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.scale = float(scale)
        self.n, self.k = z.shape[0], codebook.shape[0]
        device = z.device.type
        self.rows = max(1, min(self.n, BLOCK_ROWS.get(device, DEFAULT_BLOCK_ROWS)))
        self.codes = max(1, BLOCK_ELEMENTS.get(device, DEFAULT_BLOCK_ELEMENTS) // self.rows)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yields (rows, codes, the block's logits, its widened codes); the logits may be overwritten."""
        for codes in slices(self.k, self.codes):
            block = self.codebook[codes].to(self.dtype)
            bias = None if self.bias is None else self.bias[codes]
            for rows in slices(self.n, self.rows):
                z = self.z[rows]
                if bias is None:
                    logits = torch.mm(z, block.T)
                    if self.scale != 1.0:
                        logits.mul_(self.scale)
                else:
                    logits = torch.addmm(bias, z, block.T, alpha=self.scale)
                yield rows, codes, logits, block

    def new_rows(self, value: float = 0.0) -> Tensor:
        return self.z.new_full((self.n,), value)


class RunningMaximum:
    """Largest logit of each row and its lowest index, over blocks of ascending codes."""

    def __init__(self, blocks: Blocks) -> None:
        self.value = blocks.new_rows(float("-inf"))
        self.index = torch.zeros(blocks.n, dtype=torch.int64, device=blocks.z.device)

    def update(self, rows: slice, codes: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take a block in; (shift, growth): the new maximum made finite, and new minus old, cut at FAR."""
        value, position = logits.max(dim=1)
        old = self.value[rows]
        self.index[rows] = torch.where(value > old, position + codes.start, self.index[rows])
        new = torch.maximum(value, old)
        shift = new.clamp_min(torch.finfo(new.dtype).min)
        growth = (shift - old).clamp_max(FAR)
        self.value[rows] = new
        return shift, growth

    def indices(self) -> Tensor:
        """Index of the maximum; 0 in a row that holds a NaN."""
        return self.index.masked_fill(self.value.isnan(), 0)


class Winners:
    """Codes that have a row nearly whole, left out of its dS, and the sum of the row's other entries.

    Rows of dS sum to zero. Where one probability is close to 1 its entry of dS is a difference of nearly
    equal numbers, lost to rounding; it is minus the sum of the others.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.rest = blocks.new_rows()
        self.code = torch.full((blocks.n,), -1, dtype=torch.int64, device=blocks.z.device)

    def leave_out(self, rows: slice, codes: slice, p: Tensor, grad: Tensor) -> None:
        """Zero the winners' entries of a block of dS. p: its probabilities; grad: its dS."""
        value, position = p.max(dim=1)
        known = self.code[rows]
        found = (value > PEAK) & (known < 0)
        self.code[rows] = torch.where(found, position + codes.start, known)
        column = position.unsqueeze(1)
        grad.scatter_(1, column, grad.gather(1, column).masked_fill_(found.unsqueeze(1), 0.0))
        self.rest[rows] += grad.sum(dim=1)


class LogitGradient:
    """Accumulates the gradients of z, codebook and bias from blocks of dS."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.grad_z = torch.zeros_like(blocks.z, memory_format=torch.contiguous_format)
        self.grad_codebook = blocks.z.new_zeros(blocks.codebook.shape)
        self.grad_bias = blocks.z.new_zeros(0 if blocks.bias is None else blocks.k)
        self.winners = Winners(blocks)

    def add(self, rows: slice, codes: slice, p: Tensor, grad: Tensor, block: Tensor) -> None:
        """p: the block's probabilities; grad: its dS (overwritten); block: its widened codes."""
        self.winners.leave_out(rows, codes, p, grad)
        self.accumulate(rows, codes, grad, block)

    def accumulate(self, rows: slice, codes: slice, grad: Tensor, block: Tensor) -> None:
        """Take in a block of dS as it stands."""
        scale = self.blocks.scale
        self.grad_z[rows].addmm_(grad, block, alpha=scale)
        self.grad_codebook[codes].addmm_(grad.T, self.blocks.z[rows], alpha=scale)
        if self.grad_bias.numel():
            self.grad_bias[codes] += grad.sum(dim=0)

    def finish(self) -> None:
        """Add the entries that :meth:`add` left out."""
        self.settle(self.winners, self.winners.rest)

    def settle(self, winners: Winners, rest: Tensor) -> None:
        """Add the entries that ``winners`` left out; ``rest`` [N]: the sums of all other entries."""
        amount = torch.where(winners.code < 0, torch.zeros_like(rest), -rest)
        index = winners.code.clamp_min(0)
        step = (self.blocks.scale * amount).unsqueeze(1)
        self.grad_z.addcmul_(step, self.blocks.codebook.index_select(0, index).to(self.blocks.dtype))
        self.grad_codebook.index_add_(0, index, step * self.blocks.z)
        if self.grad_bias.numel():
            self.grad_bias.index_add_(0, index, amount)
