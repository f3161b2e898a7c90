"""choose_tokens: one draw per row from the softmax of filtered, scaled logits.

Contract. logits [B, V] float32, V ≥ 1; for each row temperature > 0 and top_p in (0, 1] (float32 [B]),
top_k ≥ 0, seed, image in [0, 2^63) and position in [0, 2^32) (int64 [B]). With x = logits / temperature,
rounded to float32, the result is int64 [B]:

    token = argmax of x + noise over the codes kept by filter_logits(x, top_k, top_p), ties to the lowest,

with the Gumbel noise of :func:`ibq_fast.ops.philox.gumbel`, a function of seed, image, position and code.
That is a draw from softmax(filter(x)) (Gumbel 1954; Maddison, Tarlow, Minka: A* sampling, 2014), and it
depends on nothing else in the batch. top_k = 1 is the argmax of the logits. A row with a NaN or a positive
infinity in x, or without a finite x, gives -1.

Probabilities, their sums, noise and scores are float64 (float32 on devices without it): two backends differ
only where two scores, or top_p and a sum, are within that rounding.

``filtered`` False promises that no row has a top_k or top_p; a backend that cannot look at the rows without
waiting for its device then skips the filter. The native kernel looks.

The native kernel neither sorts nor takes more than about log V logarithms (kernels/cpu/choice.h). Nothing is
differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibq_fast.ops import backends
from ibq_fast.ops.filtering import filter_logits, widest
from ibq_fast.ops.philox import gumbel
from ibq_fast.ops.registration import Operator, no_second_derivative, register

NAME = "choose_tokens"
_CHUNK = 1 << 22  # codes whose noise the composite forms at a time


def choose_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    image: Tensor,
    position: Tensor,
    filtered: bool = True,
    backend: str | None = None,
) -> Tensor:
    """One token per row of ``logits`` float [B, V]: int64 [B]; see the module.

    ``temperature`` and ``top_p`` are float32 [B]; ``top_k``, ``seed``, ``image`` and ``position`` int64 [B].
    Values are not looked at (a device would have to be waited for). Raises ValueError for shapes, dtypes or
    devices that do not fit, and for a forced backend that cannot serve the call.
    """
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(f"logits: expected float [B, V], V ≥ 1, got {logits.dtype} {list(logits.shape)}")
    rows = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int64),
        "top_p": (top_p, torch.float32),
        "seed": (seed, torch.int64),
        "image": (image, torch.int64),
        "position": (position, torch.int64),
    }
    for name, (tensor, dtype) in rows.items():
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} [{logits.shape[0]}], one a row, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != logits.device:
            raise ValueError(f"{name}: expected device {logits.device} like logits, got {tensor.device}")
    op = backends.select(NAME, logits.device.type, torch.float32, backend)
    return op(logits.float(), temperature, top_k, top_p, seed, image, position, filtered)


def reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    image: Tensor,
    position: Tensor,
    filtered: bool,
) -> Tensor:
    """The definition itself."""
    x = logits / temperature.unsqueeze(1)
    kept = filter_logits(x, top_k, top_p) if filtered else x
    wide = widest(logits.device)
    scores = kept.to(wide) + gumbel(seed, image, position, logits.shape[1], wide)
    token = torch.where(top_k == 1, logits.argmax(dim=1), scores.argmax(dim=1))
    top = torch.where(top_k == 1, logits.amax(dim=1), x.amax(dim=1))
    return token.masked_fill(~torch.isfinite(top), -1)


def composite(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    image: Tensor,
    position: Tensor,
    filtered: bool,
) -> Tensor:
    rows = max(1, _CHUNK // logits.shape[1])
    per_row = (logits, temperature, top_k, top_p, seed, image, position)
    chunks = zip(*(tensor.split(rows) for tensor in per_row), strict=True)
    return torch.cat([reference(*(*chunk, filtered)) for chunk in chunks])


def fake(
    namespace: str,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    image: Tensor,
    position: Tensor,
    filtered: bool,
) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


register(
    Operator(
        name=NAME,
        arguments="(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor image,"
        " Tensor position, bool filtered) -> Tensor",
        composite=composite,
        fake=fake,
        setup_context=setup_context,
        backward=no_second_derivative,
    )
)
backends.add(NAME, backends.FLOATS, names=("native", "composite"))
