"""index_backprop: selection and both entropies of one training step, in one pass over the logits.

Contract. S = scale · z @ codebook.T + bias - norm_weight · |codebook|² [N, K]; Euclidean logits -s|z - e|²
are ``scale = 2 s, norm_weight = s`` up to a constant of each row, which no softmax sees. The outputs are
those of :mod:`ibq_fast.ops.select` (z_q, codes, indices, lse, readout) and of :mod:`ibq_fast.ops.entropy`
(row_entropy, mean_prob, lse_tau = lse of S/τ); the gradient is the sum of theirs, in one [K, D] tensor, and
the norms' share, -2 norm_weight · (column sums of dS) · codebook, is added to it where it stands.
tile_bound [2, tiles, blocks] float32 holds the greatest log-probability of each tile under P and under p
(empty where a backend keeps none); the backward skips tiles by it. candidates uint8 [bytes] holds, in the
backend's own form, what of S is left for the backward: tiles of it, and lists of the entries that count in
softmax(S/τ) (empty where a backend leaves nothing).

No memory grows with N×K: candidates end at 256 MB or at the size of the codebook's gradient if that is
larger. Cost in products of 2·N·K·D operations: forward 2, backward 3 where S fits into them, 2 and 4 where
lists do (a trained codebook), else 3 and 5, against 4 and 8 of the two operators apart; less where tiles are
negligible.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_fast.ops import backends, checks, cupy, entropy, native, select, triton
from ibq_fast.ops.blocks import bias_with_norms
from ibq_fast.ops.registration import Operator, no_second_derivative, overload, register, save_nothing

NAME = "index_backprop"
BACKWARD = "index_backprop_backward"


class IndexBackpropResult(NamedTuple):
    """z_q, codes [N, D], indices [N] of straight_through_select; the entropies (0-dim) and mean_prob [K]."""

    z_q: Tensor
    codes: Tensor
    indices: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor
    mean_prob: Tensor


def index_backprop(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float,
    scale: float = 1.0,
    bias: Tensor | None = None,
    norm_weight: float = 0.0,
    eps: float = 1e-5,
    backend: str | None = None,
) -> IndexBackpropResult:
    """``straight_through_select`` and ``codebook_entropy`` of the same logits, for the price of one.

    z [N, D], codebook [K, D] of one floating dtype, bias [K] or None. Raises ValueError like those two.
    """
    checks.operands(z, codebook, bias, scale)
    checks.positive("temperature", temperature)
    op = backends.select(NAME, z.device.type, z.dtype, backend)
    out = op(z, codebook, bias, float(scale), float(norm_weight), float(temperature))
    z_q, codes, indices, _, _, row_entropy, mean_prob, *_ = out
    summary = entropy.summarize(row_entropy, mean_prob, eps)
    return IndexBackpropResult(z_q, codes, indices, *summary)


def reference(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, norm_weight: float, temperature: float
) -> tuple[Tensor, ...]:
    """The formulas themselves, with [N, K] tensors in memory; differentiable by autograd."""
    bias = bias_with_norms(codebook, bias, norm_weight)
    selected = select.reference(z, codebook, bias, scale)
    statistics = entropy.reference(z, codebook, bias, scale, temperature)
    return *selected, *statistics, *_nothing_kept(z)


def composite(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, norm_weight: float, temperature: float
) -> tuple[Tensor, ...]:
    bias = bias_with_norms(codebook, bias, norm_weight)
    selected = select.composite(z, codebook, bias, scale)
    statistics = entropy.composite(z, codebook, bias, scale, temperature)
    return *selected, *statistics, *_nothing_kept(z)


def _nothing_kept(z: Tensor) -> tuple[Tensor, Tensor]:
    """tile_bound and candidates of a backend that keeps neither."""
    return z.new_empty((2, 0, 0), dtype=torch.float32), z.new_empty(0, dtype=torch.uint8)


def composite_backward(
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
    whole = bias_with_norms(codebook, bias, norm_weight)
    grads = select.composite_backward(grad_z_q, grad_codes, z, codebook, whole, scale, indices, lse, readout)
    others = entropy.composite_backward(
        grad_row_entropy, grad_mean_prob, z, codebook, whole, scale, temperature, lse_tau, row_entropy
    )
    grad_z, grad_codebook, grad_bias = (a.add_(b) for a, b in zip(grads, others, strict=True))
    if norm_weight != 0.0:
        grad_codebook.addcmul_(codebook, grad_bias.to(codebook.dtype).unsqueeze(1), value=-2.0 * norm_weight)
    return grad_z, grad_codebook, grad_bias if bias is not None else grad_bias.new_empty(0)


def fake(
    namespace: str,
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    scale: float,
    norm_weight: float,
    temperature: float,
) -> tuple[Tensor, ...]:
    selected = select.fake(namespace, z, codebook, bias, scale)
    statistics = entropy.fake(namespace, z, codebook, bias, scale, temperature)
    n, k = z.shape[0], codebook.shape[0]
    if namespace == triton.NAMESPACE:
        from ibq_fast.ops.triton import live

        bound = z.new_empty((2, *live.grid(z, k)), dtype=torch.float32)
        return *selected, *statistics, bound, z.new_empty(0, dtype=torch.uint8)
    if namespace not in (native.NAMESPACE, cupy.NAMESPACE):
        return *selected, *statistics, *_nothing_kept(z)
    device_type = z.device.type if namespace == native.NAMESPACE else "cuda"
    bound = z.new_empty((2, *native.tile_grid(n, k, device_type)), dtype=torch.float32)
    listed = native.candidate_bytes(n, k, z.shape[1]) if device_type == "cpu" else 0
    return *selected, *statistics, bound, z.new_empty(listed, dtype=torch.uint8)


def fake_backward(namespace: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return select.fake_gradients(args[4], args[5], args[6])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, bias, scale, norm_weight, temperature = inputs
    _, _, indices, lse, readout, row_entropy, _, *kept = output
    ctx.mark_non_differentiable(indices, lse, readout, *kept)
    ctx.set_materialize_grads(False)  # else autograd fills a zero for candidates too
    ctx.save_for_backward(z, codebook, bias, indices, lse, readout, row_entropy, *kept)
    ctx.scale, ctx.norm_weight, ctx.temperature = scale, norm_weight, temperature


def backward(namespace: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_z_q, grad_codes, _, _, _, grad_row_entropy, grad_mean_prob, *_ = grads
    z, codebook, bias, *saved = ctx.saved_tensors
    row_entropy = saved[3]
    grad_z, grad_codebook, grad_bias = overload(namespace, BACKWARD)(
        z.new_zeros(z.shape) if grad_z_q is None else grad_z_q.contiguous(),
        z.new_zeros(z.shape) if grad_codes is None else grad_codes.contiguous(),
        torch.zeros_like(row_entropy) if grad_row_entropy is None else grad_row_entropy.contiguous(),
        row_entropy.new_zeros(codebook.shape[0]) if grad_mean_prob is None else grad_mean_prob.contiguous(),
        z,
        codebook,
        bias,
        ctx.scale,
        ctx.norm_weight,
        ctx.temperature,
        *saved,
    )
    return grad_z, grad_codebook, None if bias is None else grad_bias, None, None, None


register(
    Operator(
        name=NAME,
        arguments="(Tensor z, Tensor codebook, Tensor? bias, float scale, float norm_weight,"
        " float temperature) -> (Tensor z_q, Tensor codes, Tensor indices, Tensor lse, Tensor readout,"
        " Tensor row_entropy, Tensor mean_prob, Tensor lse_tau, Tensor tile_bound, Tensor candidates)",
        composite=composite,
        fake=fake,
        setup_context=setup_context,
        backward=backward,
    )
)
register(
    Operator(
        name=BACKWARD,
        arguments="(Tensor grad_z_q, Tensor grad_codes, Tensor grad_row_entropy,"
        " Tensor grad_mean_prob, Tensor z, Tensor codebook, Tensor? bias, float scale, float norm_weight,"
        " float temperature, Tensor indices, Tensor lse, Tensor readout, Tensor row_entropy, Tensor lse_tau,"
        " Tensor tile_bound, Tensor candidates) -> (Tensor grad_z, Tensor grad_codebook, Tensor grad_bias)",
        composite=composite_backward,
        fake=fake_backward,
        setup_context=save_nothing,
        backward=no_second_derivative,
    )
)
backends.add(NAME, backends.FLOATS, also=(BACKWARD,))
