"""The backward operators on Triton: what is known of rows, then the two halves. Contracts in
``ibq_fast/ops``.

The rows' half gives dz and the entries of dS that peaks take (``logit_gradient``), the codes' half dE and
dbias. Both form S again, so that nothing is added from two programs: 6 products of 2·N·K·D for a selection,
5 for the entropies (one for ``moments``), 7 for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import wrap_triton

from ibq_fast.ops.blocks import PEAK, bias_with_norms
from ibq_fast.ops.triton import plan
from ibq_fast.ops.triton.kernels.code_gradient import code_gradient
from ibq_fast.ops.triton.kernels.finish_gradients import finish_code_gradient, finish_row_gradient
from ibq_fast.ops.triton.kernels.logit_gradient import ROW_SLOTS
from ibq_fast.ops.triton.kernels.moments import MOMENTS, moments
from ibq_fast.ops.triton.kernels.row_gradient import row_gradient
from ibq_fast.ops.triton.launch import empty, operand, precision, sizes

FINISH_ROWS = 16
FINISH_COLUMNS = 256
MOST_ENTROPY = math.log(2**31)  # of any row of codes


@dataclass
class Group:
    """One source of dS. peak [N] int32: the code that a row's probability nearly all lies on, or -1; bound:
    gives a bound of |dS| [N], which only float16 needs; rows: its slots of what is known of a row."""

    peak: Tensor
    bound: Callable[[], Tensor]
    rows: tuple[Tensor, ...]


@dataclass
class Gradients:
    """What a backward is asked for. first: the selection's or the loss's part; second: the entropies'."""

    z: Tensor
    codebook: Tensor
    bias: Tensor | None
    scale: float
    first: Group | None = None
    second: Group | None = None
    grad_z_q: Tensor | None = None
    grad_codes: Tensor | None = None
    indices: Tensor | None = None
    targets: Tensor | None = None
    label_smoothing: float = 0.0
    temperature: float = 1.0
    c: Tensor | None = None
    norm_weight: float = 0.0

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_z, grad_codebook, sums of dS over rows [K] float32); N ≥ 1."""
        n = self.z.shape[0]
        one = self.z.new_ones(n, dtype=torch.float32)
        first = self.first.rows if self.first else (one, one)
        second = self.second.rows if self.second else (one,) * 5
        none = torch.full_like(one, -1, dtype=torch.int32)
        peaks = torch.stack([group.peak if group else none for group in (self.first, self.second)])
        boost = self._boost(one)
        data = torch.stack((*first, *second, one, one, boost))
        assert data.shape[0] == ROW_SLOTS.value
        part_z, rest = self._rows(data, peaks)
        data[7:9] = torch.where(peaks >= 0, -rest, 0.0)
        grad_z = self._finish_rows(part_z, data, peaks)
        del part_z
        least = boost.min().reshape(1)
        part_e, part_bias = self._codes(data, peaks, least)
        grad_bias = part_bias.sum(dim=0)
        return grad_z, self._finish_codes(part_e, least, grad_bias), grad_bias

    def _boost(self, one: Tensor) -> Tensor:
        """Powers of two that bring dS of float16 operands to 2^15 at the most: unscaled, the entries of a
        flat row over many codes would fall below 2^-24, the least that float16 holds."""
        if self.z.dtype != torch.float16:
            return one
        bound = sum(group.bound() for group in (self.first, self.second) if group)
        assert isinstance(bound, Tensor)
        return torch.exp2(torch.floor(15 - torch.log2(bound.clamp(2.0**-60, 2.0**60))))

    def _named(self, kernel: str) -> str:
        """The kernel's entry in the table of tiles."""
        return kernel if self.targets is None else f"loss_{kernel}"

    def _flags(self) -> dict[str, bool]:
        return {
            "SELECT": self.grad_z_q is not None,
            "ENTROPY": self.second is not None,
            "TARGET": self.targets is not None,
        }

    def _numbers(self) -> tuple[float, float, float, float]:
        """scale, 1/τ, and of the target distribution the target's own part and everyone's share."""
        e = self.label_smoothing
        return self.scale, 1.0 / self.temperature, 1.0 - e, e / self.codebook.shape[0]

    def _rows(self, data: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
        n, k, d = sizes(self.z, self.codebook)
        blocks = plan.blocks(self._named("row_gradient"), self.z)
        row_tiles = plan.ceil_div(n, blocks.tile.rows)
        splits, each = plan.splits(
            plan.ceil_div(k, blocks.tile.codes),
            row_tiles * blocks.chunks,
            blocks.tile.per_unit,
            self.z.device,
        )
        part_z, rest = empty(self.z, splits, n, d), self.z.new_zeros((splits, 2, n), dtype=torch.float32)
        wrap_triton(row_gradient)[(row_tiles * splits * blocks.chunks,)](
            self.z,
            self.codebook,
            data if self.bias is None else self.bias,
            self.z if self.grad_z_q is None else self.grad_z_q,
            peaks if self.targets is None else self.targets,
            data,
            peaks,
            data if self.c is None else self.c,
            part_z,
            rest,
            n,
            k,
            *self._numbers(),
            row_tiles,
            splits,
            each,
            **blocks.constants(
                D=d,
                OUT=blocks.out,
                BIAS=self.bias is not None,
                EVEN=k % blocks.tile.codes == 0,
                PRECISION=precision(self.z),
                **self._flags(),
            ),
        )
        return part_z, rest.sum(dim=0)

    def _finish_rows(self, part_z: Tensor, data: Tensor, peaks: Tensor) -> Tensor:
        splits, (n, _, d) = part_z.shape[0], sizes(self.z, self.codebook)
        grad_z = torch.empty_like(self.z)
        tiles = plan.ceil_div(n, FINISH_ROWS)
        columns = min(FINISH_COLUMNS, plan.power_of_two(d))
        wrap_triton(finish_row_gradient)[(tiles * plan.ceil_div(d, columns),)](
            part_z,
            data,
            peaks,
            self.codebook,
            grad_z,
            n,
            self.scale,
            tiles,
            splits,
            D=d,
            ROWS=FINISH_ROWS,
            OUT=columns,
            FIRST=self.first is not None,
            ENTROPY=self.second is not None,
        )
        return grad_z

    def _codes(self, data: Tensor, peaks: Tensor, boost: Tensor) -> tuple[Tensor, Tensor]:
        n, k, d = sizes(self.z, self.codebook)
        blocks = plan.blocks(self._named("code_gradient"), self.z)
        code_tiles = plan.ceil_div(k, blocks.tile.codes)
        splits, each = plan.splits(
            plan.ceil_div(n, blocks.tile.rows),
            code_tiles * blocks.chunks,
            blocks.tile.per_unit,
            self.z.device,
        )
        part_e, part_bias = empty(self.z, splits, k, d), empty(self.z, splits, k)
        wrap_triton(code_gradient)[(code_tiles * splits * blocks.chunks,)](
            self.z,
            self.codebook,
            data if self.bias is None else self.bias,
            self.z if self.grad_z_q is None else self.grad_z_q,
            peaks if self.targets is None else self.targets,
            data,
            peaks,
            data if self.c is None else self.c,
            boost,
            part_e,
            part_bias,
            n,
            k,
            *self._numbers(),
            code_tiles,
            splits,
            each,
            **blocks.constants(
                D=d, OUT=blocks.out, BIAS=self.bias is not None, PRECISION=precision(self.z), **self._flags()
            ),
        )
        return part_e, part_bias

    def _finish_codes(self, part_e: Tensor, boost: Tensor, grad_bias: Tensor) -> Tensor:
        splits, (_, k, d) = part_e.shape[0], sizes(self.z, self.codebook)
        grad_codebook = torch.empty_like(self.codebook)
        hits = self.indices is not None
        if self.indices is not None:
            ordered, order = self.indices.sort(stable=True)
            starts = torch.searchsorted(ordered, torch.arange(k + 1, device=ordered.device))
        else:
            order = starts = grad_bias
        tiles = plan.ceil_div(k, FINISH_ROWS)
        columns = min(FINISH_COLUMNS, plan.power_of_two(d))
        wrap_triton(finish_code_gradient)[(tiles * plan.ceil_div(d, columns),)](
            part_e,
            boost,
            grad_bias,
            self.codebook,
            order,
            starts,
            order if self.indices is None else self.indices,
            part_e if self.grad_z_q is None else self.grad_z_q,
            part_e if self.grad_codes is None else self.grad_codes,
            grad_codebook,
            k,
            self.scale,
            self.norm_weight,
            tiles,
            splits,
            D=d,
            CODES=FINISH_ROWS,
            ROWS=FINISH_ROWS,
            OUT=columns,
            HITS=hits,
            NORMS=self.norm_weight != 0.0,
        )
        return grad_codebook


def select_group(
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    grad_z_q: Tensor,
    indices: Tensor,
    lse: Tensor,
    readout: Tensor,
) -> Group:
    """The selection's part: dS = P (g·E - δ), δ = g·o."""
    g = grad_z_q.to(torch.float32)

    def bound() -> Tensor:
        longest = torch.linalg.vector_norm(codebook, dim=1, dtype=torch.float32).max()
        return 2 * torch.linalg.vector_norm(g, dim=1) * longest

    return Group(_peak(z, codebook, bias, scale, indices, lse), bound, (lse, (g * readout).sum(dim=1)))


def entropy_group(
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    temperature: float,
    grad_row_entropy: Tensor,
    grad_mean_prob: Tensor,
    lse: Tensor,
    row_entropy: Tensor,
) -> tuple[Group, Tensor]:
    """The entropies' part, and c/(τ N) less its mean, which changes nothing but the rounding."""
    n, k, d = sizes(z, codebook)
    c = (grad_mean_prob - grad_mean_prob.mean()) / (n * temperature)
    # Exponents are taken about the mean of their row, lse - H: in flat rows lse would swamp them, in peaked
    # rows both are large. What rounding made of it is measured and taken out.
    center = (lse - row_entropy) * temperature
    blocks = plan.blocks("moments", z)
    row_tiles = plan.ceil_div(n, blocks.tile.rows)
    splits, each = plan.splits(plan.ceil_div(k, blocks.tile.codes), row_tiles, blocks.tile.per_unit, z.device)
    sums, index = empty(z, splits, MOMENTS.value, n), empty(z, splits, n, dtype=torch.int32)
    wrap_triton(moments)[(row_tiles * splits,)](
        z,
        codebook,
        c if bias is None else bias,
        c,
        center,
        row_entropy,
        sums,
        index,
        n,
        k,
        scale,
        1.0 / temperature,
        row_tiles,
        each,
        **blocks.constants(
            D=d, BIAS=bias is not None, EVEN=k % blocks.tile.codes == 0, PRECISION=precision(z)
        ),
    )
    total, sum_c, sum_y, _ = sums.sum(dim=0)
    log_total = row_entropy + total.log()
    best, where = sums[:, 3].max(dim=0)
    chosen = index.gather(0, where.unsqueeze(0)).squeeze(0)
    sure = (best - center) / temperature - log_total > math.log(PEAK)
    slope = grad_row_entropy / temperature

    def bound() -> Tensor:
        return slope.abs() * (1 + MOST_ENTROPY) + 2 * c.abs().max()

    rows = (center, log_total, sum_y / total, slope, sum_c / total)
    return Group(torch.where(sure, chosen, -1).to(torch.int32), bound, rows), c


def straight_through_select_backward(
    grad_z_q: Tensor,
    grad_codes: Tensor,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    indices: Tensor,
    lse: Tensor,
    readout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook, grad_z_q, grad_codes = (operand(x) for x in (z, codebook, grad_z_q, grad_codes))
    if z.shape[0] == 0:
        return _nothing(z, codebook, bias)
    bias = None if bias is None else bias.contiguous()
    grads = Gradients(
        z,
        codebook,
        bias,
        scale,
        first=select_group(z, codebook, bias, scale, grad_z_q, indices, lse, readout),
        grad_z_q=grad_z_q,
        grad_codes=grad_codes,
        indices=indices,
    )
    return _with_bias(grads.compute(), bias)


def softmax_statistics_backward(
    grad_row_entropy: Tensor,
    grad_mean_prob: Tensor,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    temperature: float,
    lse: Tensor,
    row_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook = operand(z), operand(codebook)
    if z.shape[0] == 0:
        return _nothing(z, codebook, bias)
    bias = None if bias is None else bias.contiguous()
    group, c = entropy_group(
        z, codebook, bias, scale, temperature, grad_row_entropy, grad_mean_prob, lse, row_entropy
    )
    grads = Gradients(z, codebook, bias, scale, second=group, temperature=temperature, c=c)
    return _with_bias(grads.compute(), bias)


def index_backprop_backward(
    grad_z_q: Tensor,
    grad_codes: Tensor,
    grad_row_entropy: Tensor,
    grad_mean_prob: Tensor,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    norm_weight: float,
    temperature: float,
    indices: Tensor,
    lse: Tensor,
    readout: Tensor,
    row_entropy: Tensor,
    lse_tau: Tensor,
    tile_bound: Tensor,
    candidates: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook, grad_z_q, grad_codes = (operand(x) for x in (z, codebook, grad_z_q, grad_codes))
    if z.shape[0] == 0:
        return _nothing(z, codebook, bias)
    whole = bias_with_norms(codebook, bias, norm_weight)
    whole = None if whole is None else whole.contiguous()
    second, c = entropy_group(
        z, codebook, whole, scale, temperature, grad_row_entropy, grad_mean_prob, lse_tau, row_entropy
    )
    grads = Gradients(
        z,
        codebook,
        whole,
        scale,
        first=select_group(z, codebook, whole, scale, grad_z_q, indices, lse, readout),
        second=second,
        grad_z_q=grad_z_q,
        grad_codes=grad_codes,
        indices=indices,
        temperature=temperature,
        c=c,
        norm_weight=norm_weight,
    )
    return _with_bias(grads.compute(), bias)


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = operand(hidden), operand(head)
    if hidden.shape[0] == 0:
        return _nothing(hidden, head, bias)
    bias = None if bias is None else bias.contiguous()
    counts = targets != ignore_index
    named = torch.where(counts, targets, 0)
    peak = torch.where(counts, _peak(hidden, head, bias, 1.0, named, lse), -1)
    weight = torch.where(counts, grad_loss, 0.0)
    # An infinite lse makes every probability of a row that does not count 0.
    rows = (torch.where(counts, lse, float("inf")), weight)
    grads = Gradients(
        hidden,
        head,
        bias,
        1.0,
        first=Group(peak.to(torch.int32), weight.abs, rows),
        targets=named,
        label_smoothing=label_smoothing,
    )
    return _with_bias(grads.compute(), bias)


def _peak(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, indices: Tensor, lse: Tensor
) -> Tensor:
    """indices where their probability is above PEAK, -1 elsewhere; [N] int32."""
    own = (z.to(torch.float32) * codebook.index_select(0, indices).to(torch.float32)).sum(dim=1) * scale
    own = own if bias is None else own + bias.index_select(0, indices)
    return torch.where(torch.exp(own - lse) > PEAK, indices, -1).to(torch.int32)


def _with_bias(grads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return grads if bias is not None else (grads[0], grads[1], grads[2].new_empty(0))


def _nothing(z: Tensor, codebook: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    size = 0 if bias is None else codebook.shape[0]
    return torch.empty_like(z), torch.zeros_like(codebook), z.new_zeros(size, dtype=torch.float32)
