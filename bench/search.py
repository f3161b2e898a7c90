"""The search: argmax (and log-sum-exp) over codes. Nominal cost 2·N·K·D."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import truth
from bench.cases import Case, features_and_codes
from bench.suite import OURS, Entry, Suite
from ibq_fast.ops import codebook_search

Call = Callable[[], "Found"]


class Found(NamedTuple):
    """indices [N], and where the entry gives them max [N] and lse [N]."""

    indices: Tensor
    max: Tensor | None = None
    lse: Tensor | None = None


class Problem:
    """z, codebook in both dtypes, and the truths by kind of logits."""

    def __init__(self, case: Case) -> None:
        self.z, self.codebook = features_and_codes(case)
        self.bias = -self.codebook.square().sum(dim=1)

    def operands(self, dtype: str) -> tuple[Tensor, Tensor]:
        return self.z.to(getattr(torch, dtype)), self.codebook.to(getattr(torch, dtype))

    @functools.cached_property
    def dot(self) -> truth.Scores:
        return truth.scores(self.z, self.codebook, torch.float64, None, 1.0)

    @functools.cached_property
    def euclidean(self) -> truth.Scores:
        return truth.scores(self.z, self.codebook, torch.float64, self.bias, 2.0)

    @functools.cached_property
    def rounding(self) -> float:
        """Bound on the error of a float32 logit, D · eps · |z| |E|, doubled for Euclidean's second term."""
        norms = self.z.norm(dim=1).max() * self.codebook.norm(dim=1).max()
        return 2 * self.z.shape[1] * torch.finfo(torch.float32).eps * norms.item()


def check(problem: Problem, entry: Entry[Problem], found: Found) -> None:
    """The logit of every chosen code is the largest, up to rounding; max and lse are right."""
    euclidean = "euclidean" in entry.mode
    exact = problem.euclidean if euclidean else problem.dot
    codes = problem.codebook[found.indices].double()
    chosen = (problem.z.double() * codes).sum(dim=1)
    if euclidean:
        chosen = 2 * chosen - codes.square().sum(dim=1)
    bound = (4 if euclidean else 1) * problem.rounding
    if entry.provider != OURS:
        # oneDNN and others round bfloat16 logits when they store them.
        bound += 2 * torch.finfo(getattr(torch, entry.dtype)).eps * exact.best.abs().max().item()
    gap = (exact.best - chosen).max().item()
    assert gap <= bound, f"{entry.name}: a chosen logit is {gap:.3e} below the best, allowed {bound:.3e}"
    for name, value, right in (("max", found.max, exact.best), ("lse", found.lse, exact.lse)):
        if value is not None:
            error = (value.double() - right).abs().max().item()
            # A few spacings of float32 at the value itself, which tell where logits are small.
            allowed = bound + 8 * torch.finfo(torch.float32).eps * right.abs().max().item()
            assert error <= allowed, f"{entry.name}: {name}: error {error:.3e}, allowed {allowed:.3e}"
    if entry.mode == "exact":
        plain = codebook_search(problem.z, problem.codebook).indices
        differing = int((plain != found.indices).sum())
        assert differing == 0, f"{entry.name}: {differing} indices differ from float32's"


def _ours(dtype: str, with_lse: bool = False, backend: str | None = None, **mode: Any) -> Any:
    def prepare(problem: Problem) -> Call:
        z, codebook = problem.operands(dtype)

        def call() -> Found:
            return Found(*codebook_search(z, codebook, with_lse=with_lse, backend=backend, **mode))

        return call

    return prepare


def _ours_euclidean(problem: Problem) -> Call:
    return lambda: Found(*codebook_search(problem.z, problem.codebook, scale=2.0, bias=problem.bias))


def _matmul(dtype: str, argmax: bool) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Any]:
        z, codebook = problem.operands(dtype)
        if argmax:
            return lambda: Found(*reversed((z @ codebook.T).max(dim=1)))
        return lambda: z @ codebook.T

    return prepare


def _compiled(problem: Problem) -> Call:
    search = torch.compile(lambda z, codebook: (z @ codebook.T).argmax(dim=1), dynamic=False)
    return lambda: Found(search(problem.z, problem.codebook))


def _faiss(problem: Problem) -> Call:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(problem.z.shape[1])
    index.add(problem.codebook.numpy())
    queries = problem.z.numpy()

    def call() -> Found:
        best, indices = index.search(queries, 1)
        return Found(torch.from_numpy(indices[:, 0]), torch.from_numpy(best[:, 0]))

    return call


def _vector_quantize_pytorch(problem: Problem) -> Call:
    from vector_quantize_pytorch import VectorQuantize

    k, d = problem.codebook.shape
    quantizer = VectorQuantize(dim=d, codebook_size=k).eval()
    quantizer.codebook = problem.codebook
    rows = problem.z.unsqueeze(0)

    def call() -> Found:
        with torch.no_grad():
            return Found(quantizer(rows)[1].squeeze(0))

    return call


def _check_any(problem: Problem, entry: Entry[Problem], result: Any) -> None:
    if isinstance(result, Tensor):  # the bare product: what its argmax would have been
        best, indices = result.max(dim=1)
        result = Found(indices, best)
    check(problem, entry, result)


def _needs(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed (pip install 'ibq_fast[bench]')"
    return None


def _wide(case: Case) -> bool:
    return case.d >= 256


_NO_EXACT = (
    None
    if "exact" in inspect.signature(codebook_search).parameters
    else "codebook_search has no exact mode in this version"
)

SUITE: Suite[Problem] = Suite(
    kernel="search",
    problem=Problem,
    flops=lambda case: case.product,
    check=_check_any,
    entries=(
        Entry(OURS, "float32", _ours("float32")),
        Entry(OURS, "float32 lse", _ours("float32", with_lse=True), serves=_wide),
        Entry(OURS, "float32 euclidean", _ours_euclidean, serves=_wide),
        Entry(OURS, "bfloat16", _ours("bfloat16"), dtype="bfloat16"),
        Entry(OURS, "exact", _ours("float32", exact=True), missing=_NO_EXACT),
        Entry("chunked eager", "float32", _ours("float32", backend="composite")),
        Entry("matmul", "float32", _matmul("float32", argmax=False), nxk=1),
        Entry("matmul", "bfloat16", _matmul("bfloat16", argmax=False), dtype="bfloat16", nxk=1),
        Entry("matmul+argmax", "float32", _matmul("float32", argmax=True), nxk=1),
        Entry("matmul+argmax", "bfloat16", _matmul("bfloat16", argmax=True), dtype="bfloat16", nxk=1),
        Entry("torch.compile", "float32", _compiled, nxk=1, compiles=True),
        Entry("faiss IndexFlatIP", "float32", _faiss, missing=_needs("faiss")),
        # Euclidean; it stores the distances, their square roots and a one-hot of int64.
        Entry(
            "vector-quantize-pytorch",
            "float32 euclidean",
            _vector_quantize_pytorch,
            nxk=8,
            missing=_needs("vector_quantize_pytorch"),
            serves=lambda case: _wide(case) and case.k <= 1 << 16,
        ),
    ),
)
