"""generator_step: one token per sequence through all blocks of the generator, against its key-value cache.

Contract. Of R rows that a cache holds, the first M ≤ R take part; row m stands at sequence position
``positions[m]`` (int64 [M]; negative: the row idles, its result is zero and its cache stays as it is).

- x [M, width] float32 (float64 with float64 weights): the inputs of those positions,
- weights: four per block, ``qkv [(H + 2 KV)·D, width], out [width, H·D], gate_up [2·hidden, width], down
  [width, hidden]``, row-major, all float32, bfloat16, float16, float64 (composite alone) or int8; scales:
  as many float32 vectors, one number per row of a weight, with int8 weights; empty otherwise,
- modulation [6·depth + 2, R, width] of the dtype of x: per block :data:`MODULATION_ORDER`, norm weights
  folded in; then scale and shift of the last norm,
- cache [depth, 2, R, KV, T, D], float32 with float32 and int8 weights, else the dtype of the weights: keys,
  turned, and values; the step writes position ``positions[m]`` of row m and reads what precedes it,
- rotary float32 [2, ≥ T, 1, D], see ``ibq_fast/generator/rotary.py``.

Returns the hidden vectors [M, width] after the last norm, in the dtype of x. Not differentiable.

On the native backend (CPU) the whole step is one parallel region: see ``kernels/cpu/decode.h`` for what it
computes in which precision. A row's result depends neither on the other rows nor on the number of threads,
bit for bit. The composite backend computes in the dtype of the weights (int8: float32), as the model's
forward does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.ops import backends
from ibq_fast.ops.registration import Operator, register
from ibq_fast.ops.skinny_linear import DTYPES, grouped

NAME = "generator_step"
MODULATION_ORDER = (
    "attention_scale",
    "attention_shift",
    "attention_gate",
    "mlp_scale",
    "mlp_shift",
    "mlp_gate",
)


def generator_step(
    x: Tensor,
    positions: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    modulation: Tensor,
    cache: Tensor,
    rotary: Tensor,
    num_heads: int,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """The step; arguments as in the module. ``positions`` on the CPU spares an accelerator a wait.

    Raises ValueError for positions out of range and a forced backend that cannot serve the call.
    """
    if positions.shape != x.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"positions: expected int64 [{x.shape[0]}], got {positions.dtype} {list(positions.shape)}"
        )
    if x.ndim != 2 or x.shape[0] > cache.shape[2] or x.shape[1] != modulation.shape[2]:
        raise ValueError(
            f"x: expected [M, {modulation.shape[2]}] with M up to {cache.shape[2]}, got {list(x.shape)}"
        )
    if x.dtype != modulation.dtype:
        raise ValueError(f"x: expected {modulation.dtype}, got {x.dtype}")
    if positions.is_cpu and positions.numel() and int(positions.max()) >= cache.shape[4]:
        raise ValueError(f"positions: expected values below {cache.shape[4]}, got {int(positions.max())}")
    op = backends.select(NAME, x.device.type, weights[0].dtype, backend)
    return op(x.contiguous(), positions, weights, scales, modulation, cache, rotary, num_heads, eps)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """x / rms(x) * scale + shift over the last dimension."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], None, eps), scale)


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Turn the channel pairs of x [..., L, heads, head_dim] by ``factors`` [2, L, 1, head_dim]; x's dtype."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * factors[0], swapped, factors[1]).to(x.dtype)


def attend(q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
    """softmax(q keysᵀ / sqrt(head_dim)) values: q [B, H, G, D], keys, values [B, H, T, D]; ``valid`` [B, 1,
    1, T] says which positions of a row exist, None that all do.

    On the CPU the last float32 bits of the fused kernel depend on which thread works on a row, hence on the
    size of the batch; two plain products have no such dependence and sample equally fast (within 3 %).
    """
    if valid is None and not (q.is_cpu and q.dtype == torch.float32):
        return F.scaled_dot_product_attention(q, keys, values)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, keys.transpose(-1, -2))
    if valid is None:
        return torch.matmul(scores.softmax(dim=-1), values)
    weights = scores.masked_fill_(~valid, -torch.inf).softmax(dim=-1)
    return torch.matmul(weights, values.masked_fill(~valid.transpose(-1, -2), 0.0))


def composite(
    x: Tensor,
    positions: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    modulation: Tensor,
    cache: Tensor,
    rotary: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    rows, width = x.shape
    places = positions.tolist()
    longest = max(places, default=-1) + 1
    if longest == 0:
        return torch.zeros_like(x)
    kv_heads, head_dim = cache.shape[3], cache.shape[5]
    at = positions.to(x.device)
    active = (at >= 0).nonzero().squeeze(1) if min(places) < 0 else torch.arange(rows, device=x.device)
    together = min(places) == longest - 1
    reached = torch.arange(longest, device=x.device) <= at.unsqueeze(1)
    valid = None if together else reached.view(rows, 1, 1, longest)
    at = at.clamp(min=0)
    factors = rotary[:, at]
    h = x.to(cache.dtype)
    parts = modulation[:, :rows].to(h.dtype)
    for layer, (keys, values) in enumerate(cache.unbind(0)):
        qkv, out, gate_up, down = (
            (weight, scales[4 * layer + i] if scales else None)
            for i, weight in enumerate(weights[4 * layer : 4 * layer + 4])
        )
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = parts[6 * layer : 6 * layer + 6]
        heads = grouped(modulated_norm(h, scale_1, shift_1, eps), *qkv).view(rows, -1, head_dim)
        qk, v = heads.split((num_heads + kv_heads, kv_heads), dim=1)
        q, k = rotate(qk, factors).split((num_heads, kv_heads), dim=1)
        keys[active, :, at[active]] = k[active]
        values[active, :, at[active]] = v[active]
        attended = attend(
            q.unflatten(1, (kv_heads, -1)), keys[:rows, :, :longest], values[:rows, :, :longest], valid
        )
        h = torch.addcmul(h, grouped(attended.reshape(rows, width), *out), gate_1)
        gate, up = grouped(modulated_norm(h, scale_2, shift_2, eps), *gate_up).chunk(2, dim=-1)
        h = torch.addcmul(h, grouped(F.silu(gate) * up, *down), gate_2)
    hidden = modulated_norm(h, parts[-2], parts[-1], eps).to(x.dtype)
    if min(places) < 0:
        hidden = hidden.masked_fill((positions < 0).to(x.device).unsqueeze(1), 0.0)
    return hidden


def fake(
    namespace: str,
    x: Tensor,
    positions: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    modulation: Tensor,
    cache: Tensor,
    rotary: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    return torch.empty_like(x)


register(
    Operator(
        name=NAME,
        arguments="(Tensor x, Tensor positions, Tensor[] weights, Tensor[] scales, Tensor modulation,"
        " Tensor(a!) cache, Tensor rotary, int num_heads, float eps) -> Tensor",
        composite=composite,
        fake=fake,
    )
)
backends.add(NAME, DTYPES, names=("native", "composite"))
