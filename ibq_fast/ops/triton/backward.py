"""The backward operators on Triton: what is known of rows; ``gradients.py`` does the rest. Contracts in
``ibq_fast/ops``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import wrap_triton

from ibq_fast.ops.blocks import PEAK, bias_with_norms
from ibq_fast.ops.triton import plan
from ibq_fast.ops.triton.gradients import Gradients, Group
from ibq_fast.ops.triton.kernels.moments import MOMENTS, moments
from ibq_fast.ops.triton.launch import empty, operand, precision, sizes
from ibq_fast.ops.triton.live import Live

MOST_ENTROPY = math.log(2**31)  # of any row of codes


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
    live: Live | None = None,
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
    walk = None if live is None else live.walks(blocks.tile, over_codes=True)
    wrap_triton(moments)[(row_tiles * splits,)](
        z,
        codebook,
        c if bias is None else bias,
        c,
        center,
        row_entropy,
        sums,
        index,
        index if walk is None else walk,
        n,
        k,
        scale,
        1.0 / temperature,
        row_tiles,
        splits,
        each,
        **blocks.constants(
            D=d,
            BIAS=bias is not None,
            EVEN=k % blocks.tile.codes == 0,
            SKIP=walk is not None,
            PRECISION=precision(z),
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
    live = Live(tile_bound, z, codebook.shape[0])
    second, c = entropy_group(
        z, codebook, whole, scale, temperature, grad_row_entropy, grad_mean_prob, lse_tau, row_entropy, live
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
        live=live,
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
