"""One step of a tokenizer's training: networks, quantizer, losses, discriminator, optimizers, average.

It is the training loop's own update under the published settings (configs/imagenet256_ibq_262144.yaml) at 64
pixels and 32 channels: three levels, so 16 x 16 tokens an image, N / 256 images a step. What differs between
the entries is the quantizer alone. Left out is LPIPS, whose weights are a download: the same work for all.

Nominal cost: 16·N·K·D for the quantizer (see :mod:`bench.quantizer_step`) and three times the forward pass of
encoder and decoder; the discriminator's and the optimizers' are left out.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import eager
from bench.cases import Case
from bench.machine import ROOT
from bench.noise_task import noise_task
from bench.suite import OURS, Entry, Suite, judge
from ibq_fast.ops import set_backend
from ibq_fast.quantizer import QuantizerOutput
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig
from ibq_fast.train.tokenizer import TokenizerTask

CONFIG = ROOT / "configs" / "imagenet256_ibq_262144.yaml"
SIDE, TOKENS = 64, 256
NETWORK: dict[str, Any] = {
    "resolution": SIDE,
    "base_channels": 32,
    "channel_multipliers": [1, 1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [16],
}
# Weights whose gradients are checked: what the quantizer's gradient reaches first and last, and the codes.
CHECKED = ("encoder.conv_in.weight", "quant_conv.weight", "quantizer.codebook", "decoder.conv_out.weight")
TERMS = (
    "reconstruction",
    "quantization",
    "sample_entropy",
    "codebook_entropy",
    "adversarial",
    "discriminator",
)


Call = Callable[[], dict[str, Tensor]]


class ReferenceFormula(nn.Module):
    """A tokenizer's quantizer by the published formula (:func:`bench.eager.quantize`), with N×K tensors."""

    def __init__(self, codebook: nn.Parameter) -> None:
        super().__init__()
        self.codebook = codebook

    def forward(self, z: Tensor) -> QuantizerOutput:
        batch, dim, height, width = z.shape
        out = eager.quantize(z.movedim(1, -1).reshape(-1, dim), self.codebook)
        return QuantizerOutput(
            out.z_q.view(batch, height, width, dim).movedim(-1, 1),
            out.indices.view(batch, height, width),
            out.quantization_loss,
            out.sample_entropy,
            out.codebook_entropy,
            out.sample_entropy - out.codebook_entropy,
        )


class Problem:
    """The settings of a case; the float64 truth of its first update and a float32 yardstick on first use."""

    def __init__(self, case: Case) -> None:
        self.images, self.codes = _images(case), case.k
        self._scratch = tempfile.TemporaryDirectory()  # of noise images, for as long as the problem lives
        self._overrides = [
            f"--data.batch_size={self.images}",
            f"--data.resolution={SIDE}",
            *(f"--model.{name}={value}" for name, value in NETWORK.items()),
            f"--model.quantizer.codebook_size={case.k}",
            f"--model.quantizer.dim={case.d}",
            "--run.mixed_precision=no",
            # The first update, which is checked, moves nothing: Adam's first step is the gradient's sign, and
            # one that flips by rounding would change the discriminator that the tokenizer's loss is about.
            "--optim.schedule.warmup_steps=1",
            "--optim.schedule.warmup_start=0",
        ]

    def task(self) -> TokenizerTask:
        """A training before its first update, always the same one."""
        scratch = Path(self._scratch.name)
        return noise_task(str(CONFIG), self._overrides, scratch, images=self.images, side=SIDE)

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        task = self.task()
        task.tokenizer.bare.double()
        assert task.critic is not None
        task.critic.bare.double()
        task.critic.bare.register_forward_pre_hook(lambda module, images: tuple(x.double() for x in images))
        return _update(task, 0, "composite") | _gradients(task)

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        task = self.task()
        return _update(task, 0, "composite") | _gradients(task)


def check(problem: Problem, entry: Entry[Problem], first: dict[str, Tensor]) -> None:
    """Loss terms and gradients of the first update by the error-ratio rule, the quantizer's terms with the
    floors that they have alone (bench/quantizer_step.py)."""
    eps = torch.finfo(torch.float32).eps
    range_of_entropy = math.log(problem.codes)
    floors = {
        "quantization": 8 * eps * problem.truth["quantization"].item(),
        "sample_entropy": 8 * eps * range_of_entropy,
        "codebook_entropy": 8 * eps * range_of_entropy,
    }
    judge(entry, first, problem.truth, problem.plain, floors)


def _images(case: Case) -> int:
    return -(-case.n // TOKENS)


def _update(task: TokenizerTask, step: int, backend: str | None = None) -> dict[str, Tensor]:
    """The update after ``step`` finished ones; the terms of its loss."""
    set_backend(backend)
    try:
        terms = task.update(step, 0.0)
    finally:
        set_backend(None)
    return {name: terms[name] for name in TERMS}


def _gradients(task: TokenizerTask) -> dict[str, Tensor]:
    """What the first update's gradients were: (1 - β₁) times them is what Adam keeps."""
    moments = task.tokenizer.state()["optimizer"]
    share = 1 - task.config.optim.betas[0]
    return {f"gradient of {name}": moments[name]["exp_avg"] / share for name in CHECKED}


def _entry(reference: bool = False, backend: str | None = None) -> Callable[[Problem], Call]:
    """A call is one update of a training; the first one allocated the optimizers' state and is checked."""

    def prepare(problem: Problem) -> Call:
        task = problem.task()
        if reference:
            tokenizer: Any = task.tokenizer.bare
            tokenizer.quantizer = ReferenceFormula(tokenizer.quantizer.codebook)
        first = _update(task, 0, backend) | _gradients(task)

        def call(images: Problem = problem) -> dict[str, Tensor]:  # whose folder lives as long as it does
            _update(task, 1, backend)
            return first

        return call

    return prepare


@functools.cache
def _network_flops(images: int) -> float:
    """Three times the forward pass of encoder and decoder: the backward pass has two products for each."""
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(**NETWORK))
        counter = FlopCounterMode(display=False)
        with counter:
            tokenizer.decode_features(tokenizer.features(torch.empty(images, 3, SIDE, SIDE)))
    return 3.0 * counter.get_total_flops()


SUITE: Suite[Problem] = Suite(
    kernel="training_step",
    problem=Problem,
    flops=lambda case: 8 * case.product + _network_flops(_images(case)),
    check=check,
    entries=(
        Entry(OURS, "float32", _entry()),
        Entry("eager", "float32", _entry(reference=True), nxk=12),
        Entry("chunked eager", "float32", _entry(backend="composite"), serves=lambda case: case.k <= 1 << 16),
    ),
)
