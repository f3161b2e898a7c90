"""The losses against the plain formulas."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ibq_fast.tokenizer import LossConfig, PatchDiscriminator, TokenizerLoss
from ibq_fast.tokenizer.losses import (
    hinge_discriminator_loss,
    lecam_regularizer,
    nonsaturating_generator_loss,
    vanilla_discriminator_loss,
)


class Quantized(NamedTuple):
    quantization_loss: Tensor
    sample_entropy: Tensor
    codebook_entropy: Tensor
    entropy_loss: Tensor


class Output(NamedTuple):
    reconstruction: Tensor
    quantizer: Quantized


class Case(NamedTuple):
    images: Tensor
    output: Any
    last_layer: nn.Parameter
    discriminator: PatchDiscriminator


@pytest.fixture
def case() -> Case:
    """A one-layer "decoder" stands in for the tokenizer."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, 1, 1))
    quantized = Quantized(*(torch.tensor(value, requires_grad=True) for value in (2.0, 0.5, 3.0, -2.5)))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction = torch.tanh(nn.functional.conv2d(torch.randn(2, 4, 32, 32), weight))
    return Case(images, Output(reconstruction, quantized), weight, PatchDiscriminator(base_channels=4))


def test_discriminator_losses_are_the_plain_formulas() -> None:
    real, fake = torch.randn(2, 3, 1, 4, 4).double() * 2
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    vanilla = -0.5 * (real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), hinge)
    torch.testing.assert_close(vanilla_discriminator_loss(real, fake), vanilla)


def test_generator_loss_is_per_image() -> None:
    fake = torch.randn(3, 1, 4, 4).double() * 3
    plain = torch.stack([-image.mean().sigmoid().log() for image in fake]).mean()
    torch.testing.assert_close(nonsaturating_generator_loss(fake), plain)


def test_lecam_pulls_towards_the_other_sides_average() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])
    # relu(real - 0.5) = [1.5, 0]; relu(1 - fake) = [4, 0.5]
    assert lecam_regularizer(real, fake, torch.tensor(1.0), torch.tensor(0.5)).item() == pytest.approx(
        1.5**2 / 2 + (4**2 + 0.5**2) / 2
    )


def test_without_a_discriminator(case: Case) -> None:
    config = LossConfig(reconstruction_weight=2.0, quantization_weight=0.5, entropy_weight=0.1)
    loss = TokenizerLoss(config)(case.images, case.output)
    pixels = (case.images - case.output.reconstruction).abs().mean()
    torch.testing.assert_close(loss.total, 2 * pixels + 0.5 * 2.0 + 0.1 * -2.5)
    assert loss.terms["perceptual"] == 0
    assert loss.terms["adversarial"] == 0
    assert all(term.ndim == 0 and not term.requires_grad for term in loss.terms.values())


def test_squared_error(case: Case) -> None:
    terms = TokenizerLoss(LossConfig(squared_weight=3.0))(case.images, case.output).terms
    squares = (case.images - case.output.reconstruction).square().mean().detach()
    torch.testing.assert_close(terms["squared"], squares)
    torch.testing.assert_close(terms["nll"], terms["reconstruction"] + 3 * squares)


def test_perceptual_hook(case: Case) -> None:
    loss = TokenizerLoss(LossConfig(perceptual_weight=3.0), lambda a, b: (a - b).square().mean((1, 2, 3)))
    terms = loss(case.images, case.output).terms
    squares = (case.images - case.output.reconstruction).square().mean().detach()
    torch.testing.assert_close(terms["perceptual"], squares)
    torch.testing.assert_close(terms["nll"], terms["reconstruction"] + 3 * squares)


def test_the_generators_pass_leaves_the_discriminator_alone(case: Case) -> None:
    loss = TokenizerLoss(LossConfig(adversarial="hinge", generator_weight=1.0))
    loss(case.images, case.output, discriminator=case.discriminator).total.backward()
    assert all(p.grad is None and p.requires_grad for p in case.discriminator.parameters())
    assert case.last_layer.grad is not None


def test_adaptive_weight_is_the_ratio_of_gradient_norms(case: Case) -> None:
    config = LossConfig(adversarial="hinge", generator_weight=None, adaptive_scale=0.7)
    loss = TokenizerLoss(config)(
        case.images, case.output, discriminator=case.discriminator, last_layer=case.last_layer
    )
    reconstruction = case.output.reconstruction
    nll = (case.images - reconstruction).abs().mean()
    adversarial = nonsaturating_generator_loss(case.discriminator(reconstruction))
    norms = [torch.autograd.grad(x, case.last_layer, retain_graph=True)[0].norm() for x in (nll, adversarial)]
    torch.testing.assert_close(loss.terms["adversarial_weight"], 0.7 * norms[0] / (norms[1] + 1e-4))
    with torch.no_grad():
        frozen = TokenizerLoss(config)(
            case.images,
            Output(reconstruction.detach(), case.output.quantizer),  # type: ignore[arg-type]
            discriminator=case.discriminator,
            last_layer=case.last_layer,
        )
    assert frozen.terms["adversarial_weight"] == 0


def test_the_game_starts_at_its_step(case: Case) -> None:
    loss = TokenizerLoss(LossConfig(adversarial="vanilla", discriminator_start=10, discriminator_factor=0.5))
    assert loss.adversarial_factor(9) == 0
    assert loss.adversarial_factor(10) == 0.5
    assert loss(case.images, case.output, step=9).terms["adversarial"] == 0  # and needs no discriminator
    with pytest.raises(ValueError, match="step: expected an adversarial step"):
        loss.discriminator_loss(case.images, case.output.reconstruction, case.discriminator, step=9)
    with pytest.raises(ValueError, match="discriminator: expected a module"):
        loss(case.images, case.output, step=10)


def test_lecam_averages_are_kept_in_the_state(case: Case) -> None:
    loss = TokenizerLoss(LossConfig(adversarial="vanilla", lecam_decay=0.9, lecam_weight=2.0))
    out = loss.discriminator_loss(case.images, case.output.reconstruction, case.discriminator)
    state = loss.state_dict()
    torch.testing.assert_close(state["real_average"], 0.1 * out.terms["logits_real"])
    torch.testing.assert_close(state["fake_average"], 0.1 * out.terms["logits_fake"])
    loss.eval().discriminator_loss(case.images, case.output.reconstruction, case.discriminator)
    assert torch.equal(loss.real_average, state["real_average"])
    out.total.backward()
    assert case.last_layer.grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adversarial": "wgan"}, "adversarial: expected none, hinge or vanilla, got 'wgan'"),
        ({"generator_weight": -1.0}, "generator_weight: expected at least 0"),
        ({"perceptual_weight": float("nan")}, "perceptual_weight: expected at least 0"),
        ({"discriminator_start": -1}, "discriminator_start: expected at least 0"),
        ({"lecam_decay": 1.0}, "lecam_decay: expected a share"),
    ],
)
def test_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


def test_shapes_must_agree(case: Case) -> None:
    with pytest.raises(ValueError, match=r"images: expected \[2, 3, 32, 32\], got \[2, 1, 32, 32\]"):
        TokenizerLoss(LossConfig())(case.images[:, :1], case.output)
