"""Whole guided images on the GPU: our decoder with and without CUDA graphs, and the plain sampler.

bfloat16, greedy, the published base model with random weights. An image takes 256 positions of both rows; the
plain sampler (bench/plain_sampler.py) runs under the same PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import plain_sampler, sampling
from bench.cases import Case
from bench.sampling import GUIDANCE, Sampled
from ibq_fast.generator.decoder import Decoder
from ibq_fast.generator.graph import GraphedSteps

Call = Callable[[], Sampled]


class Problem(sampling.Problem):
    """The model in bfloat16 and the classes on the device."""

    def __init__(self, case: Case, device: str) -> None:
        with torch.device(device):
            super().__init__(case)
        self.model = self.model.to(torch.bfloat16)


def ours(graphs: bool, problem: Problem) -> Call:
    """Samples every position; ``graphs`` replays CUDA graphs."""
    model, classes = problem.model, problem.classes
    rows = torch.cat((classes, torch.full_like(classes, model.null_class)))
    decoder = Decoder(model, len(rows), backend="composite")
    decoder.graphs = GraphedSteps(decoder) if graphs else None

    @torch.no_grad()
    def call() -> Sampled:
        decoder.admit(torch.arange(len(rows)), rows)
        tokens = classes.new_zeros(len(classes), model.config.num_tokens)
        for position in range(tokens.shape[1]):
            fed = tokens[:, max(position - 1, 0)].repeat(2)
            hidden = decoder.advance(fed, torch.full((len(rows),), position))
            conditional, unconditional = hidden.chunk(2)
            logits = decoder.logits(torch.lerp(unconditional, conditional, GUIDANCE))
            tokens[:, position] = logits.argmax(dim=-1)
        return Sampled(tokens, logits)

    return call


def plain(problem: Problem) -> Call:
    """The plain sampler, every position."""
    total, device = problem.model.config.num_tokens, problem.classes.device

    def call() -> Sampled:
        with torch.device(device):
            return Sampled(*plain_sampler.sample(problem.model, problem.classes, GUIDANCE, total))

    return call
