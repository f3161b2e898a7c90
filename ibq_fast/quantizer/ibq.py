"""Index backpropagation: the quantizer whose whole codebook is trained end to end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.codebook_parallel import parallel_index_backprop
from ibq_fast.distributed import mean_over_all_rows
from ibq_fast.ops import index_backprop, straight_through_select
from ibq_fast.ops.entropy import entropy_of_mean
from ibq_fast.quantizer.codebook import (
    CodebookQuantizer,
    QuantizerOutput,
    full_precision,
    mean_square,
    no_entropies,
    norm_bias,
    restore,
)
from ibq_fast.quantizer.config import Commitment, EntropyReduce, Init, QuantizerConfig, ScaleKind, Similarity
from ibq_fast.restart import count_idle, far_rows


class IndexBackpropQuantizer(CodebookQuantizer):
    """Index backpropagation quantization (arXiv 2412.02692): every code receives gradient.

    The one-hot of the best code under logits S carries the gradient of softmax(S). Logits of feature z and
    code E:

    - similarity="dot": S = s z·E, the published recipe,
    - similarity="euclidean": S = s (2 z·E - |E|²), whose best code is the nearest one,
    - similarity="cosine": S = s z·E of both normalised; the codes given out are normalised too, and the
      losses compare them with the normalised features,

    with s = :attr:`logit_scale`. ``quantization_loss`` is mean((z_q - z)²) + mean((sg[e] - z)²) + β mean((e -
    sg[z])²) with commitment="reference"; commitment="paper" puts β on the middle term instead.
    ``entropy_loss`` is ``sample_entropy_weight`` · sample entropy - ``codebook_entropy_weight`` · codebook
    entropy at ``entropy_temperature``; with both weights 0 the entropies are not computed and come as zeros.
    With entropy_reduce="all" every process of a distributed run has to call ``forward`` in training mode
    together.

    Arguments: the fields of :class:`QuantizerConfig` but ``kind``, which also checks them (ValueError).
    ``codebook`` [K, D] is the parameter; with restart_after, ``idle`` int64 [K] counts the training batches
    since a code was last chosen. Under autocast it computes in float32; otherwise features and
    codebook must have one dtype (float32, bfloat16, float16 or float64).
    """

    idle: Tensor

    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        dim: int = 256,
        commitment_weight: float = 0.25,
        commitment: Commitment = "reference",
        entropy_temperature: float = 0.01,
        sample_entropy_weight: float = 1.0,
        codebook_entropy_weight: float = 1.0,
        similarity: Similarity = "dot",
        logit_scale: float = 1.0,
        logit_scale_kind: ScaleKind = "fixed",
        init: Init = "normal",
        init_batches: int = 1,
        entropy_reduce: EntropyReduce = "device",
        restart_after: int = 0,
    ) -> None:
        super().__init__(
            QuantizerConfig(
                kind="ibq",
                codebook_size=codebook_size,
                dim=dim,
                commitment_weight=commitment_weight,
                commitment=commitment,
                entropy_temperature=entropy_temperature,
                sample_entropy_weight=sample_entropy_weight,
                codebook_entropy_weight=codebook_entropy_weight,
                similarity=similarity,
                logit_scale=logit_scale,
                logit_scale_kind=logit_scale_kind,
                init=init,
                init_batches=init_batches,
                entropy_reduce=entropy_reduce,
                restart_after=restart_after,
            )
        )
        if restart_after > 0:  # training batches since a code was last chosen
            self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64))

    def forward(self, z: Tensor, channel_last: bool = False) -> QuantizerOutput:
        """Quantize ``z`` [B, D, H, W], or [..., D] with ``channel_last``; an empty batch is allowed.

        Raises ValueError for a shape or dtype that does not fit, and (on the CPU) for a NaN or infinity.
        """
        rows, shape = self._rows(z, channel_last)
        self._first_features(rows)
        if self.config.restart_after > 0 and self.training:
            self._restart(rows)
        rows, codebook = self._widen(rows)
        with full_precision(z):
            features, codebook, scale, norm_weight = self._operands(rows, codebook)
            vectors, bias, norm_weight = self._learned_scale(features, codebook, norm_weight)
            z_q, codes, indices, sample, usage = self._step(vectors, codebook, scale, bias, norm_weight)
            c = self.config
            entropy = c.sample_entropy_weight * sample - c.codebook_entropy_weight * usage
            quantization = self._quantization_loss(features, z_q, codes)
        if self.config.restart_after > 0 and self.training:
            count_idle(self.idle, indices)
        return QuantizerOutput(
            restore(z_q, shape, channel_last), indices.view(shape), quantization, sample, usage, entropy
        )

    @torch.compiler.disable
    @torch.no_grad()
    def _restart(self, rows: Tensor) -> None:
        """Move codes that have been idle for too long to features [N, D] that are far from their codes."""
        if not rows.shape[0]:
            return
        dead = (self.idle >= self.config.restart_after).nonzero().squeeze(1)[: rows.shape[0]]
        if not dead.numel():
            return
        rows = rows.detach().to(self.codebook.dtype)
        nearest = self.encode(rows, channel_last=True)
        features = self._operands(rows, self.codebook)[0]
        distances = (features - self._codes(self.codebook, nearest)).float().square().sum(1)
        self.codebook.index_copy_(0, dead, far_rows(rows, distances, dead.numel()))
        self.idle[dead] = 0

    def _step(
        self, vectors: Tensor, codebook: Tensor, scale: float, bias: Tensor | None, norm_weight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z_q, codes, indices, sample entropy, codebook entropy of the operands' logits."""
        c = self.config
        entropies = c.sample_entropy_weight != 0 or c.codebook_entropy_weight != 0
        over_all_rows = c.entropy_reduce == "all" and self.training
        if self.shards is not None:
            return parallel_index_backprop(
                self.shards,
                vectors,
                codebook,
                temperature=c.entropy_temperature if entropies else None,
                scale=scale,
                bias=bias,
                norm_weight=norm_weight,
                over_all_rows=over_all_rows,
            )
        if not entropies:
            bias = norm_bias(codebook, norm_weight) if bias is None else bias
            z_q, codes, indices = straight_through_select(vectors, codebook, scale=scale, bias=bias)
            return z_q, codes, indices, *no_entropies(vectors)[:2]
        z_q, codes, indices, sample, usage, mean_prob = index_backprop(
            vectors,
            codebook,
            temperature=c.entropy_temperature,
            scale=scale,
            bias=bias,
            norm_weight=norm_weight,
        )
        if over_all_rows:
            usage = entropy_of_mean(mean_over_all_rows(mean_prob, vectors.shape[0]))
        return z_q, codes, indices, sample, usage

    @property
    def logit_scale(self) -> float:
        """s as it stands now (a learned one waits for its device)."""
        c = self.config
        if self.log_scale is not None:
            return float(self.log_scale.detach().exp())
        return c.logit_scale * c.dim**-0.5 if c.logit_scale_kind == "inverse_sqrt_dim" else c.logit_scale

    @torch.no_grad()
    def logits(self, z: Tensor, channel_last: bool = False) -> Tensor:
        """S [N, K] of all features in ``z``, in float32 or wider, to be looked at: keep N small."""
        rows = self._rows(z, channel_last)[0]
        wide = torch.promote_types(rows.dtype, torch.float32)
        with full_precision(z):
            vectors, codebook, scale, norm_weight = self._operands(rows.to(wide), self.codebook.to(wide))
            vectors, bias, norm_weight = self._learned_scale(vectors, codebook, norm_weight)
            bias = norm_bias(codebook, norm_weight) if bias is None else bias
            if self.shards is not None:
                counts = self.shards.counts(len(vectors))
                vectors = self.shards.gather(vectors, counts)
            scores = scale * (vectors @ codebook.T)
            scores = scores if bias is None else scores + bias
            if self.shards is None:
                return scores
            return self.shards.columns(scores, counts)

    def _operands(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, float, float]:
        scale = 1.0 if self.log_scale is not None else self.logit_scale
        if self.config.similarity == "euclidean":
            return rows, codebook, 2.0 * scale, scale
        if self.config.similarity == "cosine":
            return F.normalize(rows, dim=1), F.normalize(codebook, dim=1), scale, 0.0
        return rows, codebook, scale, 0.0

    def _codes(self, codebook: Tensor, indices: Tensor) -> Tensor:
        codes = super()._codes(codebook, indices)
        return F.normalize(codes, dim=1) if self.config.similarity == "cosine" else codes

    def _quantization_loss(self, rows: Tensor, z_q: Tensor, codes: Tensor) -> Tensor:
        # `codes` and not an indexing of the codebook: its gradient joins the operator's own [K, D] gradient.
        beta = self.config.commitment_weight
        to_codes = mean_square(codes.detach(), rows)
        to_features = mean_square(codes, rows.detach())
        through = mean_square(z_q, rows)
        if self.config.commitment == "paper":
            return through + beta * to_codes + to_features
        return through + to_codes + beta * to_features
