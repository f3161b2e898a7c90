"""Decoding as CUDA graphs do it, their replay replaced by plain calls: buffers, masks, prefixes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ibq_fast.generator import Generator, graph
from ibq_fast.generator.decoder import Decoder
from ibq_fast.generator.graph import GraphedSteps

CLASSES = torch.tensor([0, 3, 5, 1])


def pair(model: Generator, precision: str | None = None) -> tuple[Decoder, Decoder, GraphedSteps]:
    """Two decoders with the same rows, and the graphed steps of the second."""
    plain, other = (Decoder(model, 4, precision=precision, backend="composite") for _ in range(2))
    for decoder in (plain, other):
        decoder.admit(torch.arange(4), CLASSES)
    return plain, other, GraphedSteps(other)


@pytest.mark.parametrize("precision", ["float64", "float32", "int8"])
@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 1, "width": 60, "num_heads": 3, "token_dim": 7}])
def test_equals_the_step(
    make_generator: Callable[..., Generator], settings: dict[str, int], precision: str, monkeypatch
) -> None:
    """Rows at positions of their own, some idle, one admitted anew; prefixes of several lengths."""
    monkeypatch.setattr(graph, "BUCKET", 4)
    model = make_generator(**settings)
    plain, other, steps = pair(model, precision)
    starts = torch.tensor([0, 3, 0, 1])  # when each row joins
    total = model.config.num_tokens
    generator = torch.Generator().manual_seed(0)
    for time in range(total):
        positions = torch.where(starts > time, -1, time - starts)
        if time >= 2:
            positions[2] = -1 if time == 2 else time - 1  # it pauses once
        tokens = torch.randint(0, 50, (4,), generator=generator)
        expected = plain.step(plain.inputs(tokens, positions), positions)
        got = steps(tokens, positions)
        scale = expected.abs().max()
        assert (got - expected).abs().max() <= (1e-12 if precision == "float64" else 1e-5) * scale
        assert not got[positions < 0].any()
        if time == 4:
            starts[0] = 5
            for decoder in (plain, other):
                decoder.admit(torch.tensor([0]), torch.tensor([2]))
    assert {length for _, length in steps._captured} == {
        min(4 * n, total) for n in range(1, -(-total // 4) + 1)
    }


def test_fewer_rows_have_graphs_of_their_own(make_generator: Callable[..., Generator]) -> None:
    plain, _other, steps = pair(make_generator())
    for rows in (4, 2, 4):
        positions = torch.zeros(rows, dtype=torch.int64)
        expected = plain.step(plain.inputs(positions, positions), positions)
        assert torch.allclose(steps(positions, positions), expected, atol=1e-6)
    assert {rows for rows, _ in steps._captured} == {2, 4}


def test_a_result_outlives_the_next_step(make_generator: Callable[..., Generator]) -> None:
    _, _other, steps = pair(make_generator())
    first = steps(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    kept = first.clone()
    steps(torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64))
    assert torch.equal(first, kept)


def test_positions_past_the_last_are_refused(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    _, _other, steps = pair(model)
    total = model.config.num_tokens
    with pytest.raises(ValueError, match=f"positions: expected values below {total}, got {total}"):
        steps(torch.zeros(1, dtype=torch.int64), torch.tensor([total]))


def test_graphs_are_for_a_gpu_with_a_committed_result(
    make_generator: Callable[..., Generator], monkeypatch
) -> None:
    decoder = Decoder(make_generator(), 1)
    assert decoder.graphs is None
    monkeypatch.setenv(graph.ENVIRONMENT_VARIABLE, "on")
    assert not graph.wanted(decoder)  # there is nothing to capture on a CPU
    decoder.device = torch.device("cuda")
    assert graph.wanted(decoder)
    monkeypatch.setenv(graph.ENVIRONMENT_VARIABLE, "off")
    assert not graph.wanted(decoder)
    monkeypatch.delenv(graph.ENVIRONMENT_VARIABLE)
    monkeypatch.setattr(graph.proof, "doubt", lambda *subject: "no committed result")
    assert not graph.wanted(decoder)
    monkeypatch.setattr(graph.proof, "doubt", lambda *subject: None)
    assert graph.wanted(decoder)
    monkeypatch.setenv(graph.ENVIRONMENT_VARIABLE, "sometimes")
    with pytest.raises(ValueError, match="IBQ_FAST_DECODE_GRAPHS: expected on or off, got 'sometimes'"):
        graph.wanted(decoder)
