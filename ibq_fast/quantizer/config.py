"""What a quantizer is made from: QuantizerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ibq_fast.ops import checks

Kind = Literal["ibq", "vq"]
Commitment = Literal["reference", "paper"]
Similarity = Literal["dot", "euclidean", "cosine"]
Init = Literal["normal", "scaled", "features", "kmeans"]
ScaleKind = Literal["fixed", "inverse_sqrt_dim", "learned"]
EntropyReduce = Literal["device", "all"]

# Values of ``init`` that wait for features.
FROM_FEATURES = ("features", "kmeans")


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


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")
