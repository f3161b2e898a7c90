"""The monitor of collapse, and the offline perceptual trunk."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ibq_fast.quantizer import IndexBackpropQuantizer, VectorQuantizer
from ibq_fast.train import TokenizerRun, read_metrics, train_tokenizer
from ibq_fast.train.collapse import CollapseMonitor
from ibq_fast.train.perceptual import TrunkDistance, build_perceptual

CPU = torch.device("cpu")


def features(scale: float) -> torch.Tensor:
    return scale * torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def test_figures_of_the_logits() -> None:
    torch.manual_seed(0)
    quantizer = IndexBackpropQuantizer(codebook_size=64, dim=8, logit_scale=0.5)
    z = features(1.0)
    figures = CollapseMonitor(quantizer).logit_figures(z)
    rows = z.movedim(1, -1).reshape(-1, 8)
    logits = 0.5 * rows @ quantizer.codebook.detach().T
    assert figures["logit_scale"] == 0.5
    assert figures["logit_spread"] == pytest.approx(float(logits.std(1, correction=0).mean()), rel=1e-5)
    assert figures["saturated"] == pytest.approx(float((logits.softmax(1).amax(1) > 0.99).float().mean()))
    assert CollapseMonitor(quantizer).logit_figures(features(1000.0))["saturated"] > 0.9
    assert CollapseMonitor(VectorQuantizer(codebook_size=64, dim=8)).logit_figures(z) == {}


def collapsed(size: int) -> torch.Tensor:
    counts = torch.zeros(size, dtype=torch.int64)
    counts[0] = 1000
    return counts


def test_it_warns_once_with_a_remedy(caplog: pytest.LogCaptureFixture) -> None:
    quantizer = IndexBackpropQuantizer(codebook_size=64, dim=8)
    monitor = CollapseMonitor(quantizer)
    assert monitor.look(torch.full((64,), 5), {}) is None
    with caplog.at_level(logging.WARNING):
        message = monitor.look(collapsed(64), monitor.logit_figures(features(100.0)))
    assert message is not None
    assert "codebook collapse: 1.6% of 64 codes in use over 1000 tokens" in message
    assert "lower model.quantizer.logit_scale, or set logit_scale_kind=inverse_sqrt_dim" in message
    assert message in caplog.text
    assert monitor.look(collapsed(64), {}) is None


def test_remedies_differ() -> None:
    flat = CollapseMonitor(IndexBackpropQuantizer(codebook_size=64, dim=8))
    message = flat.look(collapsed(64), flat.logit_figures(features(1e-3)))
    assert message is not None
    assert "similarity=euclidean with init=kmeans" in message
    plain = CollapseMonitor(VectorQuantizer(codebook_size=64, dim=8)).look(collapsed(64), {})
    assert plain is not None
    assert "model.quantizer.kind=ibq" in plain


def test_a_window_too_short_for_the_codebook_is_no_collapse() -> None:
    counts = torch.zeros(10_000, dtype=torch.int64)
    counts[:90] = 1  # nearly as many codes as tokens
    assert CollapseMonitor(VectorQuantizer(codebook_size=10_000, dim=2)).look(counts, {}) is None


def test_a_run_logs_it_and_warns_once(tokenizer_run: TokenizerRun, caplog: pytest.LogCaptureFixture) -> None:
    quantizer = replace(tokenizer_run.model.quantizer, codebook_size=64, logit_scale=1e4)
    run = replace(
        tokenizer_run,
        run=replace(tokenizer_run.run, usage_window=2, log_every=1),
        model=replace(tokenizer_run.model, quantizer=quantizer),
        optim=replace(tokenizer_run.optim, lr=1e-6),
    )
    with caplog.at_level(logging.WARNING):
        train_tokenizer(run)
    lines = read_metrics(Path(run.run.dir), "train")
    assert all(
        {"logit_scale", "logit_spread", "saturated", "utilisation", "perplexity"} <= set(x) for x in lines
    )
    assert lines[-1]["logit_scale"] == 1e4
    assert caplog.text.count("codebook collapse") <= 1


def test_trunk_distance_is_the_plain_formula() -> None:
    class Trunk(nn.Module):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [images, 2 * images[:, :2, ::2, ::2]]

    a, b = torch.rand(2, 2, 3, 4, 4)
    expected = torch.zeros(2)
    for x, y in zip(Trunk()(a), Trunk()(b), strict=True):
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        expected += (x - y).square().sum(1).mean((1, 2))
    torch.testing.assert_close(TrunkDistance(Trunk())(a, b), expected)


def test_efficientnet_without_its_packages_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"perceptual: expected the packages.*ibq_fast\[efficientnet\]"):
        build_perceptual("efficientnet_lite0", CPU)


def test_efficientnet_distance() -> None:
    """With the trunk's real weights where its packages are installed, which the development set does."""
    distance = build_perceptual("efficientnet_lite0", CPU)
    assert distance is not None
    assert not any(p.requires_grad for p in distance.train().parameters())
    assert not any(module.training for module in distance.modules())
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8) * 2 - 1, scale_factor=8, mode="bilinear")
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2).requires_grad_()
    noisy = image + 0.05 * torch.randn_like(image)
    values = distance(image, blurred)
    assert values.shape == (2,)
    assert torch.equal(distance(image, image), torch.zeros(2))
    assert (values > 0).all()
    assert (distance(image, noisy) < distance(image, image.flip(0))).all()
    values.sum().backward()
    assert blurred.grad is not None
    assert blurred.grad.abs().sum() > 0
    assert distance(image[:, :1], image[:, :1]).shape == (2,)
