"""Bad arguments: the argument, what was expected, what came."""

from __future__ import annotations

import pytest
import torch

from ibq_fast.ops import (
    backends,
    code_histogram,
    codebook_entropy,
    codebook_search,
    straight_through_select,
)

Z, E = torch.zeros(4, 3), torch.zeros(5, 3)
NAN = torch.tensor([[0.0, float("nan"), float("inf")]])
META = torch.zeros(5, 3, device="meta")

OPERANDS = {
    "z: expected \\[N, D\\] float, got \\[4, 3, 1\\]": (Z.unsqueeze(2), E, {}),
    "codebook: expected \\[K, D\\] float, got \\[5\\]": (Z, torch.zeros(5), {}),
    "z: expected \\[N, 3\\] to fit the codebook, got \\[4, 2\\]": (Z[:, :2], E, {}),
    "z: expected float32, bfloat16, float16 or float64, got torch.int64": (Z.long(), E, {}),
    "codebook: expected float32, bfloat16, float16 or float64, got torch.int32": (Z, E.int(), {}),
    "codebook: expected torch.float32 like z, got torch.bfloat16": (Z, E.bfloat16(), {}),
    "codebook: expected device cpu like z, got meta": (Z, META, {}),
    "codebook: expected at least one code and one dimension, got \\[0, 3\\]": (Z, E[:0], {}),
    "codebook: expected at least one code and one dimension, got \\[5, 0\\]": (Z[:, :0], E[:, :0], {}),
    "bias: expected \\[5\\], one number a code, got \\[4\\]": (Z, E, {"bias": torch.zeros(4)}),
    "bias: expected torch.float32 with z of torch.bfloat16, got torch.bfloat16": (
        Z.bfloat16(),
        E.bfloat16(),
        {"bias": torch.zeros(5).bfloat16()},
    ),
    "bias: expected device cpu like z, got meta": (Z, E, {"bias": META[:, 0]}),
    "scale: expected a finite number, got nan": (Z, E, {"scale": float("nan")}),
    "z: expected finite values, got 2 NaN or infinite of 3": (NAN, E, {}),
    f"backend: expected one of {', '.join(backends.NAMES)}, got 'fast'": (Z, E, {"backend": "fast"}),
}


@pytest.mark.parametrize("message", OPERANDS)
@pytest.mark.parametrize(
    "function",
    [codebook_search, straight_through_select, lambda *a, **k: codebook_entropy(*a, temperature=0.1, **k)],
    ids=["search", "select", "entropy"],
)
def test_operands(function, message) -> None:
    z, codebook, options = OPERANDS[message]
    with pytest.raises(ValueError, match=message):
        function(z, codebook, **options)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature(temperature) -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive finite number, got"):
        codebook_entropy(Z, E, temperature=temperature)


@pytest.mark.parametrize(
    ("indices", "size", "message"),
    [
        (torch.zeros(3), 4, "indices: expected integers, got torch.float32"),
        (torch.tensor([0, 4]), 4, "indices: expected values in \\[0, 4\\), got 0 to 4"),
        (torch.tensor([-1]), 4, "indices: expected values in \\[0, 4\\), got -1 to -1"),
        (torch.tensor([0]), 0, "codebook_size: expected at least 1, got 0"),
    ],
)
def test_histogram(indices, size, message, backend) -> None:
    with pytest.raises(ValueError, match=message):
        code_histogram(indices, size, backend=backend)
