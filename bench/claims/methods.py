"""The quantizers that are compared, behind one protocol: features -> z_q, indices, loss.

Ours come from ibq_fast's public API with the loss weights of its tokenizers; the others are
vector-quantize-pytorch's, with what their papers or its documentation recommend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ibq_fast.quantizer import QuantizerConfig, build_quantizer
from ibq_fast.tokenizer import LossConfig

# Levels whose product is near K, as the FSQ paper's table recommends them (arXiv 2309.15505, section 4.1).
FSQ_LEVELS = {
    2**8: (8, 6, 5),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}


class Quantized(NamedTuple):
    """z_q like the features [B, D, h, w], with gradient; indices int64 [B, h, w]; loss 0-dim, weighted."""

    z_q: Tensor
    indices: Tensor
    loss: Tensor


class Ours(nn.Module):
    """A quantizer of ibq_fast, its losses weighted."""

    def __init__(self, config: QuantizerConfig, losses: LossConfig) -> None:
        super().__init__()
        self.quantizer, self.losses = build_quantizer(config), losses
        self.size = config.codebook_size

    def forward(self, z: Tensor) -> Quantized:
        out = self.quantizer(z)
        loss = self.losses.quantization_weight * out.quantization_loss
        return Quantized(out.z_q, out.indices, loss + self.losses.entropy_weight * out.entropy_loss)


class Peer(nn.Module):
    """A quantizer of vector-quantize-pytorch: it returns z_q, indices and, where it has one, its loss."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.size = int(quantizer.codebook_size)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Quantized:
        z_q, indices, *losses = self.quantizer(z)
        return Quantized(z_q, indices.long(), sum((loss.sum() for loss in losses), z.new_zeros(())))


Build = Callable[[int, int, int], nn.Module]


@dataclass(frozen=True)
class Method:
    """A quantizer as the plots name it.

    build: (K, D, rows of a training batch) -> module with :class:`Quantized` as its output and ``size``, the
        number of codes it really has.
    sized: whether its codes have D dimensions; else D is only where two linear layers lead from and to.
    """

    title: str
    build: Build
    sized: bool = True


def ours(losses: LossConfig | None = None, **quantizer: Any) -> Build:
    """Builder of ``QuantizerConfig(**quantizer)`` at a K and D."""

    def build(codes: int, dim: int, rows: int) -> nn.Module:
        return Ours(QuantizerConfig(codebook_size=codes, dim=dim, **quantizer), losses or LossConfig())

    return build


def _vq_ema(codes: int, dim: int, rows: int) -> nn.Module:
    return _ema(codes, dim, dead_below=0.0)


def _vq_ema_restart(codes: int, dim: int, rows: int) -> nn.Module:
    return _ema(codes, dim, dead_below=min(2.0, 0.1 * rows / codes))


def _ema(codes: int, dim: int, dead_below: float) -> nn.Module:
    # decay and commitment of VQ-VAE-2 (arXiv 1906.00446); first codes by the library's k-means.
    from vector_quantize_pytorch import VectorQuantize

    return Peer(
        VectorQuantize(
            dim=dim,
            codebook_size=codes,
            decay=0.99,
            commitment_weight=0.25,
            kmeans_init=True,
            threshold_ema_dead_code=dead_below,
            rotation_trick=False,
            accept_image_fmap=True,
        )
    )


def _simvq(codes: int, dim: int, rows: int) -> nn.Module:
    from vector_quantize_pytorch import SimVQ

    return Peer(SimVQ(dim=dim, codebook_size=codes, channel_first=True))


def _lfq(codes: int, dim: int, rows: int) -> nn.Module:
    from vector_quantize_pytorch import LFQ

    return Peer(
        LFQ(
            dim=dim,
            codebook_size=codes,
            entropy_loss_weight=0.1,
            diversity_gamma=1.0,
            commitment_loss_weight=0.25,
            channel_first=True,
        )
    )


def _fsq(codes: int, dim: int, rows: int) -> nn.Module:
    from vector_quantize_pytorch import FSQ

    return Peer(FSQ(levels=list(FSQ_LEVELS[codes]), dim=dim))


# configs/quickstart_tokenizer.yaml with its weights divided by 16, what its pixel losses 4 · L1 + 64 · MSE
# are worth in gradient at an error of 0.1: so that the pixels' weight is 1, as with every method here.
_QUICKSTART = LossConfig(quantization_weight=1 / 16, entropy_weight=0.8 / 16)
_SHARPER = {"similarity": "euclidean", "init": "features", "logit_scale": 4.0, "entropy_temperature": 0.04}

METHODS: dict[str, Method] = {
    "ibq_dot": Method("IBQ, dot product", ours()),
    "ibq_euclidean": Method("IBQ, Euclidean", ours(similarity="euclidean", init="features")),
    "ibq_recipe": Method("IBQ, Euclidean, quick start's weights", ours(_QUICKSTART, **_SHARPER)),
    "vq": Method("VQ", ours(kind="vq", init="features")),
    "vq_ema": Method("VQ, EMA update", _vq_ema),
    "vq_ema_restart": Method("VQ, EMA update, dead codes replaced", _vq_ema_restart),
    "simvq": Method("SimVQ", _simvq),
    "lfq": Method("LFQ", _lfq, sized=False),
    "fsq": Method("FSQ", _fsq, sized=False),
}
