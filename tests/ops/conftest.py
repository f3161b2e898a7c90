"""Operands, truth and rounding floors for the tests of the operators."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ibq_fast.ops import available_backends, blocks

# Hypothesis calls a test many times within one fixture: these block sizes hold for all of its examples.
BLOCK_ROWS, BLOCK_ELEMENTS = 8, 8 * 24


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows × 24 codes in the composite backend."""
    monkeypatch.setitem(blocks.BLOCK_ROWS, "cpu", BLOCK_ROWS)
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", BLOCK_ELEMENTS)


@dataclass(frozen=True)
class Operands:
    """z [N, D], codebook [K, D], bias [K] or None, scale; and the incoming gradients of the operators."""

    z: Tensor
    codebook: Tensor
    bias: Tensor | None
    scale: float
    grad_z_q: Tensor
    grad_codes: Tensor
    grad_rows: Tensor
    grad_mean: Tensor

    def to(self, dtype: torch.dtype) -> Operands:
        """The same values in another dtype; statistics and bias in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return replace(
            self,
            z=self.z.to(dtype),
            codebook=self.codebook.to(dtype),
            bias=None if self.bias is None else self.bias.to(wide),
            grad_z_q=self.grad_z_q.to(dtype),
            grad_codes=self.grad_codes.to(dtype),
            grad_rows=self.grad_rows.to(wide),
            grad_mean=self.grad_mean.to(wide),
        )

    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fresh leaves (z, codebook, bias) that require gradients."""
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        return self.z.detach().clone().requires_grad_(), self.codebook.detach().clone().requires_grad_(), bias

    @property
    def magnitude(self) -> Tensor:
        """Σ_d |scale z_d E_d| + |bias| [N, K], by which the rounding of S is bounded."""
        wide = self.to(torch.float64)
        s = abs(self.scale) * (wide.z.abs() @ wide.codebook.abs().T)
        return s if wide.bias is None else s + wide.bias.abs()


def make_operands(
    n: int,
    k: int,
    d: int,
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    scale: float = 1.0,
    bias: bool = False,
    seed: int = 0,
) -> Operands:
    """Random operands whose values are exact in ``dtype``; ``spread`` is the deviation of the codes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    operands = Operands(
        z=normal(n, d),
        codebook=normal(k, d) * spread,
        bias=normal(k) if bias else None,
        scale=scale,
        grad_z_q=normal(n, d),
        grad_codes=normal(n, d),
        grad_rows=normal(n),
        grad_mean=normal(k),
    )
    return operands.to(dtype)


@pytest.fixture(scope="session")
def operands():
    return make_operands


def logit_floor(x: Operands) -> float:
    """Spacing of float32 at the largest sum of magnitudes behind a logit."""
    return torch.finfo(torch.float32).eps * x.magnitude.max().item() if x.z.numel() else 0.0


def gradient_floors(x: Operands, grad_s_magnitude: Tensor, tau: float = 1.0) -> tuple[float, float, float]:
    """Rounding floors of the gradients of z, codebook and bias, from magnitudes of the terms of dS [N, K].

    A relative error of p is the absolute one of S/τ; the terms are then summed against |codebook| and |z|.
    Half precision rounds the result besides.
    """
    wide = x.to(torch.float64)
    eps = torch.finfo(torch.float32).eps * (1 + x.magnitude / tau)
    half = 0.0 if x.z.dtype in (torch.float32, torch.float64) else torch.finfo(x.z.dtype).eps
    ds = grad_s_magnitude * (eps + half)
    scale = abs(x.scale)
    dz, de = scale * ds @ wide.codebook.abs(), scale * ds.T @ wide.z.abs()
    return _largest(dz), _largest(de), _largest(ds.sum(dim=0))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@pytest.fixture(scope="session")
def floors():
    class Floors:
        logits = staticmethod(logit_floor)
        gradients = staticmethod(gradient_floors)

    return Floors
