"""A codebook as a module: its first codes, its shards, and the way from feature maps to rows and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibq_fast.codebook_parallel import CodebookShards, parallel_decode, parallel_search
from ibq_fast.kmeans import first_random_rows, kmeans
from ibq_fast.ops import checks, codebook_search
from ibq_fast.quantizer.config import FROM_FEATURES, QuantizerConfig


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


class CodebookQuantizer(nn.Module, ABC):
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
        self._awaits_features = config.init in FROM_FEATURES
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
        with full_precision(z):
            vectors, codebook, scale, norm_weight = self._operands(rows, codebook)
            vectors, bias, norm_weight = self._learned_scale(vectors, codebook, norm_weight)
            bias = norm_bias(codebook, norm_weight) if bias is None else bias
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
        if self.config.init in FROM_FEATURES and f"{prefix}codebook" in state_dict:
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
        if autocast(rows):
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
        norms = norm_bias(codebook, norm_weight)
        return vectors * scale.to(vectors.dtype), None if norms is None else scale * norms, 0.0

    def _codes(self, codebook: Tensor, indices: Tensor) -> Tensor:
        """The rows of the codebook as the quantizer gives them out."""
        if self.shards is not None:
            return parallel_decode(self.shards, codebook, indices)
        return codebook.index_select(0, indices)


def norm_bias(codebook: Tensor, weight: float) -> Tensor | None:
    """-weight · |E_j|² [K] in float32 or wider; the forward makes no second [K, D] tensor."""
    if weight == 0:
        return None
    dtype = torch.promote_types(codebook.dtype, torch.float32)
    return -weight * torch.linalg.vector_norm(codebook, dim=1, dtype=dtype).square()


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """mean((a - b)²) in float32 or wider; 0 for an empty batch."""
    difference = a - b
    dtype = torch.promote_types(difference.dtype, torch.float32)
    return difference.to(dtype).square().sum() / max(difference.numel(), 1)


def no_entropies(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in the places of sample entropy, codebook entropy and their loss."""
    zero = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    return zero, zero.clone(), zero.clone()


def restore(rows: Tensor, shape: tuple[int, ...], channel_last: bool) -> Tensor:
    """Rows [N, D] in the layout of the features they belong to, whose indices have ``shape``."""
    z = rows.view(*shape, rows.shape[1])
    return z if channel_last else z.movedim(-1, 1).contiguous()


def autocast(z: Tensor) -> bool:
    """Whether autocast is on where ``z`` is."""
    device_type = z.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def full_precision(z: Tensor) -> AbstractContextManager[Any]:
    """Without autocast where ``z`` is."""
    return torch.autocast(z.device.type, enabled=False) if autocast(z) else nullcontext()
