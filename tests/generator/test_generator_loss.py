"""The generator's loss is the cross-entropy of its logits, which it never has in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.generator import Generator
from ibq_fast.ops import available_backends, set_backend

Loss = Callable[[Generator, Tensor, Tensor], Tensor]


def ours(model: Generator, tokens: Tensor, classes: Tensor) -> Tensor:
    return model.loss(tokens, classes)


def from_logits(model: Generator, tokens: Tensor, classes: Tensor) -> Tensor:
    logits = model(tokens[:, :-1], classes).flatten(0, 1)
    return F.cross_entropy(
        logits.double() if logits.dtype == torch.float64 else logits.float(), tokens.flatten()
    )


def results(
    loss: Loss, model: Generator, tokens: Tensor, classes: Tensor, context: AbstractContextManager[None]
) -> dict[str, Tensor]:
    model.zero_grad()
    with context:
        value = loss(model, tokens, classes)
    value.backward()
    grads = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach().double(), **grads}


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    "settings", [{}, {"vocab_size": 1000}, {"token_dim": 24, "shared_adaln": True}], ids=str
)
def test_loss_and_gradients_are_those_of_the_logits(
    make_generator: Callable[..., Generator], settings: dict[str, object], mode: str, backend: str
) -> None:
    """Every parameter's gradient is as near the float64 truth as with F.cross_entropy in the same dtype."""
    model = make_generator(**settings)
    tokens = torch.randint(0, model.config.vocab_size, (5, 12), generator=torch.Generator().manual_seed(3))
    classes = torch.tensor([0, 1, 5, 2, 2])
    if mode == "bfloat16":
        model.bfloat16()
    context = torch.autocast("cpu", dtype=torch.bfloat16) if mode == "autocast" else nullcontext()
    set_backend(backend)
    try:
        fused = results(ours, model, tokens, classes, context)
    finally:
        set_backend(None)
    plain = results(from_logits, model, tokens, classes, context)
    truth = results(from_logits, model.double(), tokens, classes, nullcontext())
    assert fused.keys() == plain.keys() == truth.keys()
    eps = torch.finfo(torch.float32 if mode == "float32" else torch.bfloat16).eps
    for name, exact in truth.items():
        error, allowed = (
            (fused[name] - exact).norm(),
            2 * (plain[name] - exact).norm() + 4 * eps * exact.norm(),
        )
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_corrupted_context_changes_what_is_seen_and_not_what_is_predicted(
    make_generator: Callable[..., Generator],
) -> None:
    model = make_generator()
    tokens, classes = torch.randint(0, 50, (3, 12)), torch.tensor([0, 1, 5])
    inputs = (tokens[:, :-1] + 1) % 50
    expected = F.cross_entropy(model(inputs, classes).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model.loss(tokens, classes, inputs=inputs), expected)
    with pytest.raises(ValueError, match=r"tokens: expected values in \[0, 49\], got 50 to 50"):
        model.loss(tokens, classes, inputs=torch.full_like(inputs, 50))


K, WIDTH = 262144, 16
PROGRAM = f"""
import torch
from ibq_fast.generator import Generator, GeneratorConfig

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

def build(vocab_size):
    settings = GeneratorConfig(vocab_size=vocab_size, num_classes=2, depth=1, num_heads=2, width={WIDTH})
    return Generator(settings)

def step(model):
    model.loss(torch.randint(0, 64, (1, 256)), torch.tensor([0])).backward()

step(build(64))
model = build({K})
before = resident("VmRSS")
step(model)
print(resident("VmHWM") - before)
"""


def test_no_logits_in_memory() -> None:
    """256 x 262,144 logits are 268 MB, and eager code holds three of them; two gradients are 17 MB each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    extra = float(done.stdout)
    assert 2 * 4 * K * WIDTH / 2**20 <= extra < 80, f"{extra:.0f} MB"
