"""Quantizers of feature maps: index backpropagation (IBQ) and, as its baseline, plain vector quantization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_fast.codebook_parallel import (
    CodebookShards,
    parallel_decode,
    parallel_index_backprop,
    parallel_search,
)
from ibq_fast.distributed import mean_over_all_rows
from ibq_fast.kmeans import first_random_rows, kmeans
from ibq_fast.ops import checks, codebook_search, index_backprop, straight_through_select
from ibq_fast.ops.entropy import entropy_of_mean
from ibq_fast.restart import count_idle, far_rows

Kind = Literal["ibq", "vq"]
Commitment = Literal["reference", "paper"]
Similarity = Literal["dot", "euclidean", "cosine"]
Init = Literal["normal", "scaled", "features", "kmeans"]
ScaleKind = Literal["fixed", "inverse_sqrt_dim", "learned"]
EntropyReduce = Literal["device", "all"]

_FROM_FEATURES = ("features", "kmeans")


class QuantizerOutput(NamedTuple):
    """What a quantizer returns.

    z_q: the selected codes in the layout and dtype of the input (float32 under autocast), with the
    straight-through gradient. indices: int64 [B, H, W] (the input's shape without its channels).
    quantization_loss, sample_entropy, codebook_entropy (nats), entropy_loss: 0-dim, float32 or wider.
    """

    z_q: Tensor
    indices: Tensor
    quantization_loss: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor
    entropy_loss: Tensor


@dataclass(frozen=True)
class QuantizerConfig:
    """Everything that :func:`build_quantizer` needs; the defaults are the published IBQ recipe.

    kind: "ibq", or "vq" for plain vector quantization (nearest code; of the fields below it reads the sizes,
        ``commitment_weight`` and ``init``).
    codebook_size, dim: K and D.
    commitment_weight, commitment: β and its place, see :class:`IndexBackpropQuantizer`.
    entropy_temperature: τ of the entropies' softmax(S/τ).
    sample_entropy_weight, codebook_entropy_weight: their weights in ``entropy_loss``; both 0 leaves them out.
    entropy_reduce: the rows whose mean p̄ the codebook entropy is of: those of each device ("device", as
        published), or in training those of all devices ("all"), whose gradient is that of one process with
        the whole batch. With few rows a device and many codes, "device" asks each small batch to use every
        code.
    similarity, logit_scale: how the logits S are formed.
    logit_scale_kind: the scale s of the logits is ``logit_scale`` ("fixed"), ``logit_scale``/√D
        ("inverse_sqrt_dim"), or learned from ``logit_scale`` on ("learned", IBQ only). 1/s is the temperature
        of the straight-through softmax; the entropies' softmax has S/τ, so τ/T beside s = 1/T keeps them as
        they were at s = 1.
    init: codes drawn from N(0, 1) ("normal"), N(0, 1/D) ("scaled"), features of the first training batch
        ("features"), or the centres of k-means over the features of the first ``init_batches`` training
        batches, fitted anew at each of them ("kmeans").
    restart_after: a code that no feature chose in this many training batches moves to a feature that is far
        from its own code (0: codes stay where gradients take them; IBQ only, whole codebooks only).
    """

    kind: Kind = "ibq"
    codebook_size: int = 16384
    dim: int = 256
    commitment_weight: float = 0.25
    commitment: Commitment = "reference"
    entropy_temperature: float = 0.01
    sample_entropy_weight: float = 1.0
    codebook_entropy_weight: float = 1.0
    similarity: Similarity = "dot"
    logit_scale: float = 1.0
    logit_scale_kind: ScaleKind = "fixed"
    init: Init = "normal"
    init_batches: int = 1
    entropy_reduce: EntropyReduce = "device"
    restart_after: int = 0

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, Kind)
        _one_of("commitment", self.commitment, Commitment)
        _one_of("similarity", self.similarity, Similarity)
        _one_of("init", self.init, Init)
        _one_of("logit_scale_kind", self.logit_scale_kind, ScaleKind)
        _one_of("entropy_reduce", self.entropy_reduce, EntropyReduce)
        for name in ("codebook_size", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        checks.positive("entropy_temperature", self.entropy_temperature)
        checks.positive("logit_scale", self.logit_scale)
        if self.kind == "vq" and self.logit_scale_kind != "fixed":
            raise ValueError(f"logit_scale_kind: expected fixed with kind vq, got {self.logit_scale_kind!r}")
        if self.init_batches < 1:
            raise ValueError(f"init_batches: expected at least 1, got {self.init_batches}")
        if self.restart_after < 0:
            raise ValueError(f"restart_after: expected 0 (never) or more, got {self.restart_after}")

    @property
    def learned_scalars(self) -> tuple[str, ...]:
        """Names, in a tokenizer, of weights and counters that only these settings add."""
        added = {"log_scale": self.logit_scale_kind == "learned", "idle": self.restart_after > 0}
        return tuple(f"quantizer.{name}" for name, present in added.items() if present)


def build_quantizer(config: QuantizerConfig) -> IndexBackpropQuantizer | VectorQuantizer:
    """The quantizer that ``config`` describes."""
    if config.kind == "vq":
        return VectorQuantizer(
            codebook_size=config.codebook_size,
            dim=config.dim,
            commitment_weight=config.commitment_weight,
            init=config.init,
            init_batches=config.init_batches,
        )
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "kind"}
    return IndexBackpropQuantizer(**fields)


class _CodebookQuantizer(nn.Module, ABC):
    """A codebook [K, D] with its initialisation, and the way from feature maps to rows and back.

    ``shards``: None, or which rows of the codebook ``codebook`` holds (:meth:`split_codebook`).
    """

    config: QuantizerConfig
    codebook: nn.Parameter
    initialized: Tensor
    log_scale: nn.Parameter | None
    shards: CodebookShards | None

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.shards = None
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.dim))
        nn.init.normal_(self.codebook, std=config.dim**-0.5 if config.init == "scaled" else 1.0)
        learned = config.logit_scale_kind == "learned"
        self.log_scale = nn.Parameter(torch.tensor(config.logit_scale).log()) if learned else None
        # The buffer goes into checkpoints; the attribute beside it is read without waiting for a device.
        self._awaits_features = config.init in _FROM_FEATURES
        self._gathered: list[Tensor] = []
        if self._awaits_features:
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def dim(self) -> int:
        return self.config.dim

    def extra_repr(self) -> str:
        c = self.config
        return f"codebook_size={c.codebook_size}, dim={c.dim}, similarity={c.similarity}, init={c.init}"

    @torch.no_grad()
    def encode(self, z: Tensor, channel_last: bool = False) -> Tensor:
        """Indices [B, H, W] of ``z`` [B, D, H, W], or [..., D] with ``channel_last``; no gradient.

        Raises ValueError like ``forward``.
        """
        rows, shape = self._rows(z, channel_last)
        rows, codebook = self._widen(rows)
        with _full_precision(z):
            vectors, codebook, scale, norm_weight = self._operands(rows, codebook)
            vectors, bias, norm_weight = self._learned_scale(vectors, codebook, norm_weight)
            bias = _norm_bias(codebook, norm_weight) if bias is None else bias
            if self.shards is None:
                indices = codebook_search(vectors, codebook, scale=scale, bias=bias, exact=True).indices
            else:
                indices = parallel_search(self.shards, vectors, codebook, scale=scale, bias=bias)
        return indices.view(shape)

    def decode(self, indices: Tensor, channel_last: bool = False) -> Tensor:
        """Codes [B, D, H, W] of ``indices`` [B, H, W], or [..., D] of [...] with ``channel_last``.

        Raises ValueError for a shape or dtype that does not fit, and (on the CPU) for an index out of range.
        """
        if indices.dim() != 3 and not channel_last:
            raise ValueError(f"indices: expected [B, H, W] integers, got {list(indices.shape)}")
        checks.code_indices(indices, self.codebook_size)
        codes = self._codes(self.codebook, indices.reshape(-1).to(torch.int64))
        codes = codes.view(*indices.shape, self.dim)
        return codes if channel_last else codes.movedim(-1, 1).contiguous()

    @torch.no_grad()
    def split_codebook(self, shards: CodebookShards) -> None:
        """Keep this process's rows of the codebook only, the first process's values of them.

        All processes call it together, before an optimizer is built; from then on they call ``forward``,
        ``backward``, ``encode``, ``decode``, ``logits`` and ``init_from_features`` together, each with
        features of its own. ``codebook`` becomes a new parameter [K_r, D], whose gradient is that of the
        *sum* of the processes' losses (see :func:`~ibq_fast.codebook_parallel.parallel_index_backprop`).
        Raises ValueError for plain vector quantization, restarts of idle codes, another codebook size and a
        second call.
        """
        if self.config.kind != "ibq":
            raise ValueError(f"codebook_parallel: expected a quantizer of kind ibq, got {self.config.kind!r}")
        if self.config.restart_after > 0:
            raise ValueError(
                f"restart_after: expected 0 with a split codebook, got {self.config.restart_after}"
            )
        if self.shards is not None:
            raise ValueError("codebook_parallel: expected a whole codebook, got one that is split already")
        if shards.codebook_size != self.codebook_size:
            raise ValueError(
                f"shards: expected a split of {self.codebook_size} codes, got {shards.codebook_size}"
            )
        own = shards.part(self.codebook.detach()).clone()
        first = torch.distributed.get_rank() == 0
        shards.hand_out(iter([self.codebook.detach()]) if first else None, own)
        self.shards = shards
        self.codebook = nn.Parameter(own, requires_grad=self.codebook.requires_grad)

    def join_codebook(self, whole: Tensor) -> None:
        """Take the ``whole`` codebook [K, D] instead of a shard; needs nothing of the other processes."""
        self.shards = None
        self.codebook = nn.Parameter(whole, requires_grad=self.codebook.requires_grad)

    @torch.compiler.disable
    @torch.no_grad()
    def init_from_features(self, z: Tensor, channel_last: bool = False) -> None:
        """Set the codes from features of ``z``; done by the first training forwards with init="features"
        (random features) and "kmeans" (centres of all features since the first such call).

        With fewer features than codes they are repeated with a little noise. In distributed training every
        process has to call it together; all get the same codes: of rank 0's features, or k-means over every
        process's. An empty ``z`` changes nothing.
        """
        rows = self._rows(z, channel_last)[0].detach().to(self.codebook.dtype)
        if rows.shape[0] == 0:
            return
        checks.finite("z", rows)
        if self.config.init == "kmeans":
            self._gathered.append(rows.clone())
            self.codebook.copy_(kmeans(torch.cat(self._gathered), self.codebook_size, shards=self.shards))
        else:
            self.codebook.copy_(first_random_rows(rows, self.codebook_size, self.shards))
        if self.config.init == "features" or len(self._gathered) == self.config.init_batches:
            self._gathered.clear()
            if self._awaits_features:
                self.initialized.fill_(True)
                self._awaits_features = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A codebook from a checkpoint without the buffer (another layout) is a trained one.
        if self.config.init in _FROM_FEATURES and f"{prefix}codebook" in state_dict:
            flag = state_dict.setdefault(f"{prefix}initialized", torch.ones((), dtype=torch.bool))
            self._awaits_features = not bool(flag)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _first_features(self, rows: Tensor) -> None:
        if self._awaits_features and self.training:
            self.init_from_features(rows, channel_last=True)

    def _rows(self, z: Tensor, channel_last: bool) -> tuple[Tensor, tuple[int, ...]]:
        """``z`` as rows [N, D], and the shape of its indices."""
        checks.floating("z", z)
        if channel_last:
            if z.dim() < 2 or z.shape[-1] != self.dim:
                raise ValueError(f"z: expected [..., {self.dim}] float, got {list(z.shape)}")
        else:
            if z.dim() != 4 or z.shape[1] != self.dim:
                raise ValueError(f"z: expected [B, {self.dim}, H, W] float, got {list(z.shape)}")
            z = z.movedim(1, -1)
        return z.reshape(-1, self.dim), tuple(z.shape[:-1])

    def _widen(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and codebook; in float32 under autocast, which chooses dtypes for layers and not for codes."""
        if _autocast(rows):
            return rows.float(), self.codebook.float()
        return rows, self.codebook

    @abstractmethod
    def _operands(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """(vectors, codes, scale, norm_weight): S = scale · vectors @ codes.T - norm_weight · |codes|²."""

    def _learned_scale(
        self, vectors: Tensor, codebook: Tensor, norm_weight: float
    ) -> tuple[Tensor, Tensor | None, float]:
        """(vectors, bias, norm_weight) with a learned s taken into the operands, which carry its gradient."""
        if self.log_scale is None:
            return vectors, None, norm_weight
        scale = self.log_scale.exp()
        norms = _norm_bias(codebook, norm_weight)
        return vectors * scale.to(vectors.dtype), None if norms is None else scale * norms, 0.0

    def _codes(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """The rows of the codebook as the quantizer gives them out."""
        if self.shards is not None:
            return parallel_decode(self.shards, codebook, indices)
        return codebook.index_select(0, indices)


class IndexBackpropQuantizer(_CodebookQuantizer):
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
        with _full_precision(z):
            features, codebook, scale, norm_weight = self._operands(rows, codebook)
            vectors, bias, norm_weight = self._learned_scale(features, codebook, norm_weight)
            z_q, codes, indices, sample, usage = self._step(vectors, codebook, scale, bias, norm_weight)
            c = self.config
            entropy = c.sample_entropy_weight * sample - c.codebook_entropy_weight * usage
            quantization = self._quantization_loss(features, z_q, codes)
        if self.config.restart_after > 0 and self.training:
            count_idle(self.idle, indices)
        return QuantizerOutput(
            _restore(z_q, shape, channel_last), indices.view(shape), quantization, sample, usage, entropy
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
            bias = _norm_bias(codebook, norm_weight) if bias is None else bias
            z_q, codes, indices = straight_through_select(vectors, codebook, scale=scale, bias=bias)
            return z_q, codes, indices, *_zeros(vectors)[:2]
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
        with _full_precision(z):
            vectors, codebook, scale, norm_weight = self._operands(rows.to(wide), self.codebook.to(wide))
            vectors, bias, norm_weight = self._learned_scale(vectors, codebook, norm_weight)
            bias = _norm_bias(codebook, norm_weight) if bias is None else bias
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
        to_codes = _mean_square(codes.detach(), rows)
        to_features = _mean_square(codes, rows.detach())
        through = _mean_square(z_q, rows)
        if self.config.commitment == "paper":
            return through + beta * to_codes + to_features
        return through + to_codes + beta * to_features


class VectorQuantizer(_CodebookQuantizer):
    """Plain vector quantization, the baseline: nearest code, straight-through copy of the gradient.

    ``quantization_loss`` is mean((e - sg[z])²) + β mean((sg[e] - z)²); only selected codes receive gradient.
    The entropies are zeros. Arguments as in :class:`QuantizerConfig`.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 16384,
        dim: int = 256,
        commitment_weight: float = 0.25,
        init: Init = "normal",
        init_batches: int = 1,
    ) -> None:
        super().__init__(
            QuantizerConfig(
                kind="vq",
                codebook_size=codebook_size,
                dim=dim,
                commitment_weight=commitment_weight,
                sample_entropy_weight=0.0,
                codebook_entropy_weight=0.0,
                similarity="euclidean",
                init=init,
                init_batches=init_batches,
            )
        )

    def forward(self, z: Tensor, channel_last: bool = False) -> QuantizerOutput:
        """Quantize ``z``; shapes and errors as in :meth:`IndexBackpropQuantizer.forward`."""
        rows, shape = self._rows(z, channel_last)
        self._first_features(rows)
        rows, codebook = self._widen(rows)
        with _full_precision(z):
            with torch.no_grad():
                vectors, table, scale, norm_weight = self._operands(rows, codebook)
                bias = _norm_bias(table, norm_weight)
                indices = codebook_search(vectors, table, scale=scale, bias=bias, exact=True).indices
            codes = self._codes(codebook, indices)
            z_q = rows + (codes - rows).detach()
            beta = self.config.commitment_weight
            loss = _mean_square(codes, rows.detach()) + beta * _mean_square(codes.detach(), rows)
        return QuantizerOutput(_restore(z_q, shape, channel_last), indices.view(shape), loss, *_zeros(rows))

    def _operands(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, float, float]:
        return rows, codebook, 2.0, 1.0


def _norm_bias(codebook: Tensor, weight: float) -> Tensor | None:
    """-weight · |E_j|² [K] in float32 or wider; the forward makes no second [K, D] tensor."""
    if weight == 0:
        return None
    dtype = torch.promote_types(codebook.dtype, torch.float32)
    return -weight * torch.linalg.vector_norm(codebook, dim=1, dtype=dtype).square()


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """mean((a - b)²) in float32 or wider; 0 for an empty batch."""
    difference = a - b
    dtype = torch.promote_types(difference.dtype, torch.float32)
    return difference.to(dtype).square().sum() / max(difference.numel(), 1)


def _zeros(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    return zero, zero.clone(), zero.clone()


def _restore(rows: Tensor, shape: tuple[int, ...], channel_last: bool) -> Tensor:
    z = rows.view(*shape, rows.shape[1])
    return z if channel_last else z.movedim(-1, 1).contiguous()


def _autocast(z: Tensor) -> bool:
    device_type = z.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _full_precision(z: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(z.device.type, enabled=False) if _autocast(z) else nullcontext()


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")
