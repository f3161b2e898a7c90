"""One training step of the quantizer: forward and backward with quantization loss and both entropies.

Nominal cost 16·N·K·D, the eight products of the dense fused algorithm: S, P·E and S for the mean of p
forward; S, g·Eᵀ, dS·E, dSᵀ·z and S for the row constants backward. An implementation that skips what cannot
count may exceed the peak in these units: ours keeps logits in a bounded buffer
and forms five where they fit, six where only the entries that count in p do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import eager, truth
from bench.cases import Case, features_and_codes, upstream_gradient
from bench.suite import OURS, Entry, Suite, judge
from ibq_fast.ops import set_backend
from ibq_fast.quantizer import IndexBackpropQuantizer


class Step(NamedTuple):
    """What a step gives: the forward's statistics and both gradients."""

    out: eager.Quantized
    grad_z: Tensor
    grad_codebook: Tensor


Call = Callable[[], Step]


class Problem:
    """z, codebook and the gradient that arrives at z_q; the truth and its yardstick on first use."""

    def __init__(self, case: Case) -> None:
        self.z, self.codebook = features_and_codes(case)
        self.upstream = upstream_gradient(case)

    @functools.cached_property
    def truth(self) -> tuple[dict[str, Tensor], truth.Sample]:
        return truth.quantizer_step(self.z, self.codebook, self.upstream, torch.float64)

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        return truth.quantizer_step(self.z, self.codebook, self.upstream, torch.float32, self.truth[1])[0]


def check(problem: Problem, entry: Entry[Problem], step: Step) -> None:
    """Losses and sampled gradients by the error-ratio rule.

    Gradients of codes that no row selects are the small ones: what float32 cannot tell apart in the whole
    gradient is ignored there. Entropies are right up to a few roundings of their range, log K.
    """
    exact, where = problem.truth
    got = {
        "quantization loss": step.out.quantization_loss,
        "sample entropy": step.out.sample_entropy,
        "codebook entropy": step.out.codebook_entropy,
        "gradient of z": step.grad_z[where.rows],
        "gradient of selected codes": step.grad_codebook[where.selected],
        "gradient of other codes": step.grad_codebook[where.others],
    }
    eps = torch.finfo(torch.float32).eps
    range_of_entropy = torch.tensor(float(len(problem.codebook))).log().item()
    whole = exact["gradient of selected codes"].norm().item()
    floors = {
        "quantization loss": 8 * eps * exact["quantization loss"].item(),
        "sample entropy": 8 * eps * range_of_entropy,
        "codebook entropy": 8 * eps * range_of_entropy,
        "gradient of other codes": 0.5 * eps * whole,
    }
    judge(entry, {name: value.detach() for name, value in got.items()}, exact, problem.plain, floors)


def _ours(dtype: str, backend: str | None = None) -> Callable[[Problem], Call]:
    """The public module, as a training loop calls it."""

    def prepare(problem: Problem) -> Call:
        k, d = problem.codebook.shape
        quantizer = IndexBackpropQuantizer(codebook_size=k, dim=d).to(getattr(torch, dtype))
        with torch.no_grad():
            quantizer.codebook.copy_(problem.codebook)
        z = problem.z.to(getattr(torch, dtype), copy=True).requires_grad_()
        upstream = problem.upstream.to(z.dtype)

        def call() -> Step:
            z.grad = quantizer.codebook.grad = None
            set_backend(backend)
            try:
                out = quantizer(z, channel_last=True)
                through = (out.z_q * upstream).sum()
                (through + out.quantization_loss + out.entropy_loss).backward()
            finally:
                set_backend(None)
            kept = eager.Quantized(
                out.z_q, out.indices, out.quantization_loss, out.sample_entropy, out.codebook_entropy
            )
            return _result(kept, z, quantizer.codebook)

        return call

    return prepare


def _eager(compiled: bool) -> Callable[[Problem], Call]:
    def prepare(problem: Problem) -> Call:
        quantize = torch.compile(eager.quantize, dynamic=False) if compiled else eager.quantize
        z = problem.z.clone().requires_grad_()
        codebook = problem.codebook.clone().requires_grad_()

        def call() -> Step:
            z.grad = codebook.grad = None
            out = quantize(z, codebook)
            eager.objective(out, problem.upstream).backward()
            return _result(out, z, codebook)

        return call

    return prepare


def _result(out: eager.Quantized, z: Tensor, codebook: Tensor) -> Step:
    assert z.grad is not None
    assert codebook.grad is not None
    return Step(eager.Quantized(*(value.detach() for value in out)), z.grad, codebook.grad)


def _small_or_typical(case: Case) -> bool:
    """These take ten seconds and more a call at the largest size; one regime tells how long."""
    return case.k <= 1 << 16 or case.regime == "training-like"


SUITE: Suite[Problem] = Suite(
    kernel="quantizer_step",
    problem=Problem,
    flops=lambda case: 8 * case.product,
    check=check,
    entries=(
        Entry(OURS, "float32", _ours("float32")),
        Entry(OURS, "bfloat16", _ours("bfloat16"), dtype="bfloat16"),
        Entry("eager", "float32", _eager(compiled=False), nxk=12),
        Entry(
            "torch.compile", "float32", _eager(compiled=True), nxk=10, compiles=True, serves=_small_or_typical
        ),
        Entry("chunked eager", "float32", _ours("float32", backend="composite"), serves=_small_or_typical),
    ),
)
