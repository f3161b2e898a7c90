"""The generator's step as CUDA graphs: against the step without them, and whole greedy images."""

from __future__ import annotations

import pytest
import torch

from ibq_fast.generator import Generator, GeneratorConfig
from ibq_fast.generator.decoder import Decoder
from ibq_fast.generator.graph import GraphedSteps

ROWS = 6


def model_on(device, dtype: torch.dtype) -> Generator:
    torch.manual_seed(0)
    config = GeneratorConfig(
        vocab_size=500, num_classes=10, grid=(10, 16), depth=3, num_heads=4, width=256, gate_bias=0.3
    )
    model = Generator(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.to(device.name, dtype)


@pytest.mark.ops("generator_step")
@torch.no_grad()
def test_graphs_equal_the_step(subject, device, error_ratio) -> None:
    """Rows that join at different times, over all lengths of the cache that graphs are captured for."""
    model = model_on(device, subject.dtype)
    plain, other = (Decoder(model, ROWS, backend="composite") for _ in range(2))
    exact = Decoder(model.to(torch.float32), ROWS, precision="float32", backend="composite")
    model.to(subject.dtype)
    steps = GraphedSteps(other)
    for decoder in (plain, other, exact):
        decoder.admit(torch.arange(ROWS), torch.arange(ROWS))
    starts = torch.tensor([0, 3, 0, 70, 0, 1])
    for time in range(model.config.num_tokens):
        positions = torch.where(starts > time, -1, time - starts)
        tokens = (torch.arange(ROWS) * 7 + time * 31).to(device.name) % 500
        outs = [
            steps(tokens, positions),
            *(d.step(d.inputs(tokens, positions), positions) for d in (plain, exact)),
        ]
        found, eager, truth = (out.double().cpu() for out in outs)
        floor = (1e-5 if subject.dtype == torch.float32 else 2.0**-6) * truth.abs().max().item()
        error_ratio(f"position {time}", found, eager, truth, floor)
        assert not outs[0][(positions < 0).to(device.name)].any()


@pytest.mark.ops("generator_step")
@torch.no_grad()
def test_the_host_never_waits_for_a_replay(subject, device) -> None:
    model = model_on(device, subject.dtype)
    decoder = Decoder(model, ROWS, backend="composite")
    steps = GraphedSteps(decoder)
    decoder.admit(torch.arange(ROWS), torch.arange(ROWS))
    tokens = torch.zeros(ROWS, dtype=torch.int64, device=device.name)
    steps(tokens, torch.zeros(ROWS, dtype=torch.int64))
    device.wait()
    with device.forbid_waiting():
        for position in range(1, 60):
            steps(tokens, torch.full((ROWS,), position))
