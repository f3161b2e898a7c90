"""The quantizer against the published implementation: values, losses and the eight gradients.

The truth is the float64 run of the goldens, ``eager`` the published code's float32 run.
"""

from __future__ import annotations

import pytest
import torch

from ibq_fast.ops import available_backends, backends, set_backend
from ibq_fast.quantizer import IndexBackpropQuantizer

CASES = ["small", "odd", "flat", "peaked"]
TERMS = ["output", "quant", "sample_entropy", "codebook_entropy"]


@pytest.fixture(params=available_backends())
def backend(request, monkeypatch) -> str:
    monkeypatch.setattr(backends, "_forced_here", None)
    set_backend(request.param)
    return request.param


def run(case):
    """(quantizer, z, output) of a golden case."""
    size, dim = case["codebook"].shape
    quantizer = IndexBackpropQuantizer(
        codebook_size=size,
        dim=dim,
        commitment_weight=case["beta"],
        entropy_temperature=case["temperature"],
    )
    quantizer.load_state_dict({"codebook": case["codebook"]})
    z = case["z"].clone().requires_grad_()
    return quantizer, z, quantizer(z)


@pytest.mark.parametrize("name", CASES)
def test_indices_and_codes(name, golden, backend) -> None:
    case = golden(f"quantizer_{name}.pt")
    quantizer, z, out = run(case)
    assert torch.equal(out.indices.flatten(), case["f64"]["indices"])
    assert out.indices.shape == (z.shape[0], *z.shape[2:])
    assert torch.equal(out.z_q, quantizer.decode(out.indices))
    torch.testing.assert_close(out.z_q, case["z_q"])
    assert torch.equal(quantizer.encode(z), out.indices)


@pytest.mark.parametrize("name", CASES)
def test_losses(name, golden, backend, error_ratio) -> None:
    case = golden(f"quantizer_{name}.pt")
    _, _, out = run(case)
    truth = case["f64"]
    error_ratio("quant", out.quantization_loss, case["quant_loss"], truth["quant_loss"])
    for term in ("sample_entropy", "codebook_entropy"):
        error_ratio(term, getattr(out, term), case[term], truth[term])
    entropy = truth["sample_entropy"] - truth["codebook_entropy"]
    floor = torch.finfo(torch.float32).eps * truth["codebook_entropy"].abs().item()
    error_ratio("entropy", out.entropy_loss, case["entropy_loss"], entropy, floor)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, term, golden, backend, error_ratio) -> None:
    """Where the truth is exactly 0 (the entropies of ``peaked``) the floor is 0 too: ours has to be 0."""
    case = golden(f"quantizer_{name}.pt")
    quantizer, z, out = run(case)
    value = {
        "output": (out.z_q * case["cotangent"]).sum(),
        "quant": out.quantization_loss,
        "sample_entropy": out.sample_entropy,
        "codebook_entropy": out.codebook_entropy,
    }[term]
    grads = torch.autograd.grad(value, (z, quantizer.codebook))
    for operand, grad in zip(("z", "codebook"), grads, strict=True):
        eager, truth = case["grads"][term][operand], case["f64"]["grads"][term][operand]
        error_ratio(f"gradient of {term} by {operand}", grad, eager, truth)
