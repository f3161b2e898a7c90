"""Which runs each claim needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.claims.methods import METHODS, Method, ours
from bench.claims.training import Budget
from ibq_fast.tokenizer import LossConfig

SEEDS = (0, 1, 2)
DIM = 32  # where D is not what varies
SHORT = Budget(steps=400, measured=(400,))
LONG = Budget(steps=800, measured=(100, 200, 400, 600, 800))

_LOGITS = {"ibq_dot": {}, "ibq_euclidean": {"similarity": "euclidean", "init": "features"}}
_CHANGES = {
    "no_quantization": ("without the quantization loss", {}, LossConfig(quantization_weight=0.0)),
    "paper": ("β where the paper's text has it", {"commitment": "paper"}, None),
    "no_sample_entropy": ("without the sample entropy", {"sample_entropy_weight": 0.0}, None),
    "no_codebook_entropy": ("without the codebook entropy", {"codebook_entropy_weight": 0.0}, None),
    "no_entropy": (
        "without both entropies",
        {"sample_entropy_weight": 0.0, "codebook_entropy_weight": 0.0},
        None,
    ),
}
VARIANTS: dict[str, Method] = {
    f"{name}-{change}": Method(f"{METHODS[name].title}, {title}", ours(losses, **logits, **options))
    for name, logits in _LOGITS.items()
    for change, (title, options, losses) in _CHANGES.items()
}
ALL = METHODS | VARIANTS


@dataclass(frozen=True)
class Case:
    """One run: the claim that asks for it, and what decides its outcome."""

    claim: str
    method: str
    codes: int
    dim: int
    seed: int


@dataclass(frozen=True)
class Claim:
    """A question, and the runs that only it needs: methods × codes × dims × SEEDS under ``budget``."""

    title: str
    methods: tuple[str, ...]
    codes: tuple[int, ...]
    dims: tuple[int, ...]
    budget: Budget


CLAIMS: dict[str, Claim] = {
    # K = 4,096 is claim d's run at the step where these end: the same run so far.
    "a": Claim(
        "utilisation and reconstruction as K grows",
        tuple(METHODS),
        tuple(2**i for i in (8, 10, 14, 16)),
        (DIM,),
        SHORT,
    ),
    # D = 32 is the run of claim a; what has no codes of D dimensions has no D to vary.
    "b": Claim(
        "the same as D grows",
        tuple(name for name, method in METHODS.items() if method.sized),
        (2**10,),
        (8, 128, 256),
        SHORT,
    ),
    # All terms together are the runs of claim a.
    "c": Claim("the effect of each loss term", tuple(VARIANTS), (2**10,), (DIM,), SHORT),
    "d": Claim("usage over training time", tuple(METHODS), (2**12,), (DIM,), LONG),
}


def cases(claim: str) -> Iterator[Case]:
    """The runs of ``claim``, small codebooks first."""
    wanted = CLAIMS[claim]
    for codes in wanted.codes:
        for dim in wanted.dims:
            for method in wanted.methods:
                for seed in SEEDS:
                    yield Case(claim, method, codes, dim, seed)
