"""What is measured on a GPU: for each group its sizes, problem, implementations, operations and check.

bfloat16 operands throughout. Each implementation's result is held against float64 before it is timed, by the
checks of the CPU's benchmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import cross_entropy as ce
from bench import eager, quantizer_step, sampling, search
from bench.cases import Case, features_and_codes, hidden_and_head, upstream_gradient
from bench.gpu import decode
from bench.gpu.table import CEILING
from bench.suite import OURS, Entry
from ibq_fast import ops
from ibq_fast.ops import backends
from ibq_fast.quantizer import IndexBackpropQuantizer

DTYPE = torch.bfloat16
CHUNKED = "chunked eager"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Implementation:
    """provider: its name in the table. prepare: from the problem, the call. nxk: bytes of N×K memory it needs
    per element at its peak. compiled: whether its first call compiles for long. only: sizes N at which it is
    worth running, None for all. check: whether its result is held against float64."""

    provider: str
    prepare: Callable[[Any], Call]
    nxk: float = 0.0
    compiled: bool = False
    only: tuple[int, ...] | None = None
    check: bool = True

    def refusal(self, case: Case, free_bytes: int, compiled: bool) -> str | None:
        """Why it is not measured at a case ("": no reason to be told), or None. compiled: the kind wanted."""
        if self.compiled != compiled:
            return ""
        if self.only is not None and case.n not in self.only:
            return "left out at this size"
        needed = self.nxk * case.n * case.k
        if needed > 0.9 * free_bytes:
            return f"needs about {needed / 1e9:.0f} GB, {free_bytes / 1e9:.0f} GB are free"
        return None


@dataclass(frozen=True)
class Group:
    """cases: sizes and regimes. flops: dense operations of a case. verify(problem, entry, result) raises
    AssertionError. images: whether a call makes the case's N images, long calls that are timed but once."""

    name: str
    cases: tuple[Case, ...]
    problem: Callable[[Case, str], Any]
    flops: Callable[[Case], float]
    verify: Callable[[Any, Entry[Any], Any], None]
    implementations: Callable[[str], list[Implementation]]
    images: bool = False


def our_backends(op: str, device: str) -> list[str]:
    """Backends that serve ``op`` on the device."""
    return [row.name for row in backends._TABLE[op] if row.refusal(device, DTYPE) is None]


def provider(backend: str) -> str:
    return CHUNKED if backend == "composite" else f"{OURS} {backend}"


# --- search and log-sum-exp -------------------------------------------------------------------------------


class SearchProblem(search.Problem):
    """z, codebook on the device; truths on first use."""

    def __init__(self, case: Case, device: str) -> None:
        self.z, self.codebook = (t.to(device) for t in features_and_codes(case))
        self.bias = -self.codebook.square().sum(dim=1)


def _search_ours(backend: str, problem: SearchProblem) -> Call:
    z, codebook = problem.operands("bfloat16")
    return lambda: search.Found(*ops.codebook_search(z, codebook, with_lse=True, backend=backend))


def _search_eager(z: Tensor, codebook: Tensor) -> search.Found:
    logits = z @ codebook.T
    best, indices = logits.max(dim=1)
    return search.Found(indices, best, torch.logsumexp(logits.float(), dim=1))


def _search_plain(compiled: bool, problem: SearchProblem) -> Call:
    z, codebook = problem.operands("bfloat16")
    function = torch.compile(_search_eager, dynamic=False) if compiled else _search_eager
    return lambda: function(z, codebook)


def _matmul(problem: SearchProblem) -> Call:
    z, codebook = problem.operands("bfloat16")
    return lambda: z @ codebook.T


def _search_implementations(device: str) -> list[Implementation]:
    found = [
        Implementation(provider(name), functools.partial(_search_ours, name))
        for name in our_backends("codebook_search", device)
    ]
    return [
        *found,
        Implementation(CEILING, _matmul, nxk=2, check=False),
        Implementation("eager", functools.partial(_search_plain, False), nxk=12),
        Implementation(
            "torch.compile", functools.partial(_search_plain, True), nxk=6, compiled=True, only=(64, 1024)
        ),
    ]


# --- the training step, entropies included ----------------------------------------------------------------


class StepProblem(quantizer_step.Problem):
    """z, codebook and the upstream gradient on the device; truths on first use."""

    def __init__(self, case: Case, device: str) -> None:
        self.z, self.codebook = (t.to(device) for t in features_and_codes(case))
        self.upstream = upstream_gradient(case).to(device)


def _step_ours(backend: str, problem: StepProblem) -> Call:
    k, d = problem.codebook.shape
    quantizer = IndexBackpropQuantizer(codebook_size=k, dim=d).to(problem.z.device, DTYPE)
    with torch.no_grad():
        quantizer.codebook.copy_(problem.codebook)
    z, upstream = problem.z.to(DTYPE).requires_grad_(), problem.upstream.to(DTYPE)

    def call() -> quantizer_step.Step:
        z.grad = quantizer.codebook.grad = None
        ops.set_backend(backend)
        try:
            out = quantizer(z, channel_last=True)
            ((out.z_q * upstream).sum() + out.quantization_loss + out.entropy_loss).backward()
        finally:
            ops.set_backend(None)
        kept = eager.Quantized(
            out.z_q, out.indices, out.quantization_loss, out.sample_entropy, out.codebook_entropy
        )
        return quantizer_step._result(kept, z, quantizer.codebook)

    return call


def _step_plain(compiled: bool, problem: StepProblem) -> Call:
    quantize = torch.compile(eager.quantize, dynamic=False) if compiled else eager.quantize
    z, codebook = (t.to(DTYPE, copy=True).requires_grad_() for t in (problem.z, problem.codebook))
    upstream = problem.upstream.to(DTYPE)

    def call() -> quantizer_step.Step:
        z.grad = codebook.grad = None
        out = quantize(z, codebook)
        eager.objective(out, upstream).backward()
        return quantizer_step._result(out, z, codebook)

    return call


def _step_implementations(device: str) -> list[Implementation]:
    found = [
        Implementation(provider(name), functools.partial(_step_ours, name))
        for name in our_backends("index_backprop", device)
    ]
    # Plain bfloat16 divides logits by 0.01 in bfloat16; its gradients are not held against float64.
    compiled = functools.partial(_step_plain, True)
    return [
        *found,
        Implementation("eager", functools.partial(_step_plain, False), nxk=30, check=False),
        Implementation("torch.compile", compiled, nxk=24, compiled=True, only=(64, 1024), check=False),
    ]


# --- the generator's loss ---------------------------------------------------------------------------------


class LossProblem(ce.Problem):
    """hidden, head and targets on the device; truths on first use."""

    def __init__(self, case: Case, device: str) -> None:
        self.hidden, self.head, self.targets = (t.to(device) for t in hidden_and_head(case))


def _fused(backend: str) -> Callable[..., Tensor]:
    return functools.partial(ops.linear_cross_entropy, backend=backend)


def _loss(function: Callable[..., Tensor], problem: LossProblem) -> Call:
    return ce._entry(function, "bfloat16")(problem)


def _loss_implementations(device: str) -> list[Implementation]:
    found = [
        Implementation(provider(name), functools.partial(_loss, _fused(name)))
        for name in our_backends("linear_cross_entropy", device)
    ]
    compiled = torch.compile(eager.cross_entropy, dynamic=False)
    found += [
        Implementation("eager", functools.partial(_loss, eager.cross_entropy), nxk=10, check=False),
        Implementation(
            "torch.compile", functools.partial(_loss, compiled), nxk=8, compiled=True, check=False
        ),
    ]
    if ce._NO_TORCH is None:
        found.append(
            Implementation("F.linear_cross_entropy", functools.partial(_loss, ce._torch_chunked), check=False)
        )
    return found


# --- sampling images --------------------------------------------------------------------------------------


def _decode_implementations(device: str) -> list[Implementation]:
    return [
        Implementation(f"{OURS} graphs", functools.partial(decode.ours, True)),
        Implementation(f"{OURS} composite", functools.partial(decode.ours, False)),
        Implementation("plain sampler", decode.plain, check=False),
    ]


def groups(tiny: bool) -> dict[str, Group]:
    """The groups by name, at full size or so small that a CPU runs them in seconds."""
    k, d, c = (512, 32, 48) if tiny else (262144, 256, 1024)
    rows = (64,) if tiny else (16384, 1024)
    cases = tuple(Case(n, k, d, regime) for n in rows for regime in ("uniform", "peaked"))
    step = Group(
        "step",
        cases,
        StepProblem,
        lambda case: 8 * case.product,
        quantizer_step.check,
        _step_implementations,
    )
    loss = Group(
        "cross_entropy",
        (Case(64 if tiny else 4096, k, c),),
        LossProblem,
        lambda case: 3 * case.product,
        ce.check,
        _loss_implementations,
    )
    found = Group(
        "search", cases, SearchProblem, lambda case: case.product, search.check, _search_implementations
    )
    codes, width = (50, 32) if tiny else (16384, sampling.BASE_WIDTH)
    images = Group(
        "decode",
        tuple(Case(n, codes, width) for n in ((2,) if tiny else (1, 50))),
        decode.Problem,
        sampling.SUITE.flops,
        sampling.check,
        _decode_implementations,
        images=True,
    )
    return {group.name: group for group in (found, step, loss, images)}
