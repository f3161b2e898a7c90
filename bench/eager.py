"""The published formulas in plain PyTorch, with every N×K tensor they name: the peers to be faster than."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.25
TEMPERATURE = 0.01
EPSILON = 1e-5


class Quantized(NamedTuple):
    """A quantizer's forward: z_q [N, D], indices [N], and three 0-dim statistics."""

    z_q: Tensor
    indices: Tensor
    quantization_loss: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor


def quantize(z: Tensor, codebook: Tensor) -> Quantized:
    """Index backpropagation quantization of ``z`` [N, D] by ``codebook`` [K, D] as its authors wrote it down.

    The one-hot [N, K] multiplies the codebook twice (straight-through, and hard for the losses), and both
    entropies come from softmax and log-softmax of the logits over the temperature.
    """
    logits = z @ codebook.T
    soft = torch.softmax(logits, dim=1)
    indices = soft.argmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, indices.unsqueeze(1), 1.0)
    z_q = (hard - soft.detach() + soft) @ codebook
    code = hard @ codebook
    loss = (
        (z_q - z).square().mean()
        + (code.detach() - z).square().mean()
        + BETA * (code - z.detach()).square().mean()
    )
    tempered = logits / TEMPERATURE
    p, log_p = torch.softmax(tempered, dim=1), torch.log_softmax(tempered, dim=1)
    mean = p.mean(dim=0)
    sample = -(p * log_p).sum(dim=1).mean()
    usage = -(mean * torch.log(mean + EPSILON)).sum()
    return Quantized(z_q, indices, loss, sample, usage)


def objective(out: Quantized, upstream: Tensor) -> Tensor:
    """The loss whose backward is timed: a decoder's gradient on z_q, the quantization loss, the entropies."""
    through = (out.z_q * upstream).sum()
    return through + out.quantization_loss + out.sample_entropy - out.codebook_entropy


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The generator's loss: mean cross-entropy of the logits hidden @ head.T."""
    return F.cross_entropy(F.linear(hidden, head), targets)
