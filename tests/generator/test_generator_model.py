"""The transformer: causality, class dropout, variants, initialisation, own format, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ibq_fast.generator import Generator, GeneratorConfig

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1},
    {"shared_adaln": True},
    {"token_dim": 24},
    {"depth": 1, "num_heads": 1, "width": 20, "mlp_hidden": 7, "grid": (1, 5)},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_logit_depends_on_its_class_and_on_tokens_before_it(
    make_generator: Callable[..., Generator], settings: dict[str, Any]
) -> None:
    model = make_generator(**settings)
    length = model.config.num_tokens - 1
    tokens = torch.randint(0, 50, (1, length))
    classes = torch.tensor([2])
    logits = model(tokens, classes)
    assert logits.shape == (1, length + 1, 50)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 50
    moved = (model(changed, classes) - logits).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [position > 2 for position in range(length + 1)]
    assert bool(((model(tokens, classes + 1) - logits).abs().amax(-1) > 1e-4).all())


def test_a_prefix_gives_the_same_logits_and_may_be_empty(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    tokens, classes = torch.randint(0, 50, (2, 11)), torch.tensor([0, 5])
    logits = model(tokens, classes)
    for length in (0, 1, 5):
        assert_close(model(tokens[:, :length], classes), logits[:, : length + 1], rtol=1e-5, atol=1e-5)
    assert model(tokens[:0], classes[:0]).shape == (0, 12, 50)


def test_loss_is_the_mean_cross_entropy_and_takes_grids(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    tokens, classes = torch.randint(0, 50, (3, 12)), torch.tensor([0, 1, 5])
    log_p = model(tokens[:, :-1], classes).log_softmax(-1).gather(-1, tokens[..., None])
    assert_close(model.loss(tokens, classes), -log_p.mean())
    assert_close(model.loss(tokens.view(3, 3, 4), classes), -log_p.mean())


def test_class_dropout_replaces_classes_by_the_null_class_while_training(
    make_generator: Callable[..., Generator],
) -> None:
    silent = {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}
    model = make_generator(class_dropout=0.3, **silent)
    rows = 2000
    tokens, classes = torch.zeros(rows, 0, dtype=torch.long), torch.full((rows,), 2)
    kept, null = model(tokens[:1], classes[:1]), model(tokens[:1], torch.tensor([5]))
    assert_close(model(tokens, classes), kept.expand(rows, -1, -1))
    logits = model.train()(tokens, classes)
    dropped = (logits - null).abs().amax((1, 2)) < 1e-4
    assert_close(logits[~dropped], kept.expand(int((~dropped).sum()), -1, -1))
    assert abs(float(dropped.float().mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / rows)


def test_a_fresh_model_says_nothing_and_learns_in_its_head_first() -> None:
    model = Generator(
        GeneratorConfig(vocab_size=50, num_classes=5, grid=(3, 4), depth=1, num_heads=2, width=16)
    )
    tokens, classes = torch.randint(0, 50, (2, 12)), torch.tensor([0, 1])
    loss = model.loss(tokens, classes)
    assert_close(loss.item(), math.log(50))
    loss.backward()
    assert model.head.weight.grad is not None
    assert float(model.head.weight.grad.abs().max()) > 0


def test_gradients_reach_every_parameter(make_generator: Callable[..., Generator]) -> None:
    for settings in VARIANTS[:5]:
        model = make_generator(**settings)
        model.loss(torch.randint(0, 50, (4, 12)), torch.tensor([0, 1, 2, 5])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


@torch.no_grad()
def test_mixed_precision_stays_close(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    tokens, classes = torch.randint(0, 50, (2, 11)), torch.tensor([0, 1])
    exact = model(tokens, classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens, classes)
    scale = exact.abs().max()
    assert float((mixed - exact).abs().max() / scale) < 0.05
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low.rotary.table.dtype == torch.float32
    assert float((low(tokens, classes) - exact).abs().max() / scale) < 0.05


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_save_and_load(
    make_generator: Callable[..., Generator], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_generator(**settings)
    loaded = Generator.from_pretrained(model.save_pretrained(tmp_path / "generator"))
    assert loaded.config == model.config
    assert not loaded.training
    tokens, classes = torch.randint(0, 50, (2, 3)), torch.tensor([0, 5])
    assert torch.equal(loaded(tokens, classes), model(tokens, classes))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("tokens", "classes", "message"),
    [
        (zeros(2, 12), zeros(2), "tokens: expected fewer than 12 per image"),
        (zeros(2, 3, 4), zeros(2), r"tokens: expected \[B, L\] with B = 2"),
        (zeros(3, 4), zeros(2), r"tokens: expected \[B, L\] with B = 2"),
        (zeros(2, 3) + 50, zeros(2), r"tokens: expected values in \[0, 49\], got 50 to 50"),
        (zeros(2, 3) - 1, zeros(2), r"tokens: expected values in \[0, 49\], got -1 to -1"),
        (zeros(2, 3).float(), zeros(2), "tokens: expected an integer tensor, got torch.float32"),
        (zeros(2, 3), zeros(2, 1), r"class_ids: expected \[B\], got \[2, 1\]"),
        (zeros(2, 3), zeros(2) + 6, r"class_ids: expected values in \[0, 5\], got 6 to 6"),
        (zeros(2, 3), zeros(2).bool(), "class_ids: expected an integer tensor, got torch.bool"),
    ],
)
def test_bad_input_is_refused(
    make_generator: Callable[..., Generator], tokens: torch.Tensor, classes: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator()(tokens, classes)


def test_loss_refuses_what_is_no_whole_image(make_generator: Callable[..., Generator]) -> None:
    with pytest.raises(ValueError, match=r"tokens: expected \[B, 12\] or \[B, 3, 4\], got \[2, 11\]"):
        make_generator().loss(zeros(2, 11), zeros(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30, "num_heads": 4}, "num_heads: expected width / num_heads to be a multiple of 4"),
        ({"width": 32, "num_heads": 16}, "num_heads: expected width / num_heads to be a multiple of 4"),
        ({"width": 32, "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads: expected a divisor"),
        ({"vocab_size": 0}, "vocab_size: expected a positive integer, got 0"),
        ({"grid": (4,)}, "grid: expected"),
        ({"grid": (4, -1)}, "grid: expected a positive integer"),
        ({"class_dropout": 1.0}, "class_dropout: expected a probability"),
        ({"gate_bias": math.nan}, "gate_bias: expected a finite number"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**settings)
