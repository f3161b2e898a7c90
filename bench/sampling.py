"""Whole guided images from the generator: decoding with the native step against the plain sampler.

A case is N images at once (2·N rows) of the published base model (width 1024; other widths: two blocks, for
trying it out). Nominal cost per image: 2 operations a row and parameter that a step multiplies (adaLN left
out: it depends on the class alone), for every position. Greedy, so that results can be compared token by
token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench import machine, plain_sampler
from bench.cases import Case
from bench.suite import OURS, Entry, Metric, Suite, judge
from ibq_fast.generator import Generator, GeneratorConfig
from ibq_fast.ops.skinny_linear import quantize_rows

GUIDANCE = 2.25
BASE_WIDTH = 1024


class Sampled(NamedTuple):
    """tokens int64 [N, positions] and the last position's guided logits [N, K]."""

    tokens: Tensor
    logits: Tensor


def config(case: Case) -> GeneratorConfig:
    """The base model, or two blocks over a 2 x 3 grid."""
    if case.d == BASE_WIDTH:
        return GeneratorConfig(vocab_size=case.k, gate_bias=0.3)
    return GeneratorConfig(
        vocab_size=case.k, num_classes=10, grid=(2, 3), depth=2, num_heads=4, width=case.d, gate_bias=0.3
    )


def weights_per_step(case: Case) -> int:
    """Parameters that a step multiplies: blocks and head."""
    c = config(case)
    block = (c.num_heads + 2 * c.kv_heads) * c.head_dim + c.width + 3 * c.hidden
    return c.depth * c.width * block + c.vocab_size * c.width


def step_bytes(case: Case, mode: str) -> float:
    """Bytes that a step has to read: weights once, and half of a full cache, its mean over an image."""
    c = config(case)
    element = {"float32": 4, "bfloat16": 2, "int8": 1}[mode]
    cache = 2 * c.depth * 2 * case.n * c.kv_heads * c.head_dim * c.num_tokens / 2
    return element * weights_per_step(case) + (4 if mode == "int8" else element) * cache


class Problem:
    """A model with random weights and the classes to sample; what a precision makes of it, on demand."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.model = Generator(config(case)).eval().requires_grad_(False)
        torch.nn.init.normal_(self.model.head.weight, std=0.05)
        torch.nn.init.normal_(self.model.token_embedding.weight, std=0.5)
        self.classes = torch.arange(case.n) % self.model.config.num_classes

    @functools.cached_property
    def bfloat16(self) -> Generator:
        return copy.deepcopy(self.model).to(torch.bfloat16)

    def in_precision(self, mode: str) -> Generator:
        """A copy in eager code's dtype; int8: float32 with the weights that int8 stands for."""
        if mode != "int8":
            return copy.deepcopy(self.model).to(getattr(torch, mode))
        other = copy.deepcopy(self.model)
        parts = [part for block in other.layers() for part in (block.attention, block.mlp)]
        for weight in [other.head.weight, *(p for part in parts for p in part.parameters())]:
            quantized, scale = quantize_rows(weight)
            weight.copy_(quantized * scale.unsqueeze(1))
        return other

    def last_logits(self, model: Generator, tokens: Tensor) -> Tensor:
        """Guided logits after all but the last of ``tokens``, by the model's own forward."""
        null = torch.full_like(self.classes, model.null_class)
        conditional, unconditional = (
            model.head(model._hidden(tokens[:, :-1], classes)[:, -1]).double()
            for classes in (self.classes, null)
        )
        return unconditional + GUIDANCE * (conditional - unconditional)


@torch.no_grad()
def check(problem: Problem, entry: Entry[Problem], result: Sampled) -> None:
    """The last logits, given the tokens before, by the error-ratio rule: a mistake anywhere reaches them
    through the cache. The last token has to be their argmax."""
    eager = problem.in_precision(entry.mode)
    plain = problem.last_logits(eager, result.tokens)
    truth = problem.last_logits(eager.double(), result.tokens)
    judge(entry, {"logits": result.logits}, {"logits": truth}, {"logits": plain}, {"logits": 0.0})
    assert torch.equal(result.tokens[:, -1], result.logits.argmax(dim=-1)), f"{entry.name}: not greedy"


def _ours(precision: str) -> Callable[[Problem], Callable[[], Sampled]]:
    def prepare(problem: Problem) -> Callable[[], Sampled]:
        model, classes = problem.model, problem.classes
        rows = torch.cat((classes, torch.full_like(classes, model.null_class)))
        total = model.config.num_tokens
        kept: dict[str, object] = {}

        @torch.no_grad()
        def call() -> Sampled:
            decoder = kept.setdefault("decoder", model.decoder(len(rows), precision))
            decoder.admit(torch.arange(len(rows)), rows)
            tokens = torch.zeros(len(classes), total, dtype=torch.int64)
            for position in range(total):
                positions = torch.full((len(rows),), position)
                fed = tokens[:, max(position - 1, 0)].repeat(2)
                conditional, unconditional = decoder.step(decoder.inputs(fed, positions), positions).chunk(2)
                logits = decoder.logits(torch.lerp(unconditional, conditional, GUIDANCE))
                tokens[:, position] = logits.argmax(dim=-1)
            return Sampled(tokens, logits)

        return call

    return prepare


def _plain(mode: str) -> Callable[[Problem], Callable[[], Sampled]]:
    def prepare(problem: Problem) -> Callable[[], Sampled]:
        model = problem.model if mode == "float32" else problem.bfloat16
        total = model.config.num_tokens
        return lambda: Sampled(*plain_sampler.sample(model, problem.classes, GUIDANCE, total))

    return prepare


def metrics(case: Case, entry: Entry[Problem], seconds: list[float]) -> list[Metric]:
    """What a sampler is judged by, beside its time."""
    positions = config(case).num_tokens
    found = [
        Metric("step", [1e3 * value / positions for value in seconds], "ms"),
        Metric("tokens", [case.n * positions / value for value in seconds], "tokens/s"),
    ]
    if entry.provider == OURS:
        rates = [step_bytes(case, entry.mode) * positions / value / 1e9 for value in seconds]
        share = [100 * rate / machine.read_bandwidth() for rate in rates]
        found += [Metric("read", rates, "GB/s"), Metric("share of read bandwidth", share, "%")]
    return found


SUITE: Suite[Problem] = Suite(
    kernel="sampling",
    problem=Problem,
    flops=lambda case: 2.0 * 2 * case.n * weights_per_step(case) * config(case).num_tokens,
    check=check,
    metrics=metrics,
    entries=(
        Entry(OURS, "float32", _ours("float32")),
        Entry(OURS, "bfloat16", _ours("bf16"), dtype="bfloat16"),
        Entry(OURS, "int8", _ours("int8")),
        Entry("plain sampler", "float32", _plain("float32")),
        Entry("plain sampler", "bfloat16", _plain("bfloat16"), dtype="bfloat16"),
    ),
)
