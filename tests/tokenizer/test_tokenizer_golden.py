"""The tokenizer computes what the published implementation computes on the same checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ibq_fast.tokenizer import LossConfig, PatchDiscriminator, Tokenizer, TokenizerLoss

TOLERANCE = 1e-4


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ema", [False, True])
def test_reproduces_the_reference(
    checkpoint: Path, golden: dict[str, Any], ema: bool, memory_format: torch.memory_format
) -> None:
    tokenizer = Tokenizer.from_pretrained(checkpoint, ema=ema).to(memory_format=memory_format)
    wanted = golden["ema"] if ema else golden
    with torch.no_grad():
        latent = tokenizer.features(golden["image"])
        output = tokenizer(golden["image"])
    assert relative_error(latent, wanted["latent"]) < TOLERANCE
    assert torch.equal(output.quantizer.indices.flatten(), wanted["indices"])
    assert torch.equal(tokenizer.encode(golden["image"]).flatten(), wanted["indices"])
    assert relative_error(output.reconstruction, wanted["reconstruction"]) < TOLERANCE


def test_decodes_indices_like_the_reference(checkpoint: Path, golden: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_pretrained(checkpoint, ema=False)
    images = tokenizer.decode(golden["indices"].view(2, 4, 4))
    assert relative_error(images, golden["decoded_from_indices"]) < TOLERANCE
    clamped = tokenizer.decode(golden["indices"].view(2, 4, 4), clamp=True)
    assert torch.equal(clamped, images.clamp(-1, 1))


def test_architecture_is_read_off_the_shapes(checkpoint: Path, golden: dict[str, Any]) -> None:
    published = golden["ddconfig"]
    config = Tokenizer.from_pretrained(checkpoint, resolution=published["resolution"]).config
    assert config.image_channels == published["in_channels"]
    assert config.resolution == published["resolution"]
    assert config.base_channels == published["ch"]
    assert config.channel_multipliers == tuple(published["ch_mult"])
    assert config.num_res_blocks == published["num_res_blocks"]
    assert config.attention_resolutions == tuple(published["attn_resolutions"])
    assert config.latent_channels == published["z_channels"]
    assert config.quantizer.codebook_size == golden["codebook_size"]
    assert config.quantizer.dim == golden["codebook_dim"]


def distance(images: Tensor, reconstruction: Tensor) -> Tensor:
    """The golden cases' stand-in for a perceptual distance."""
    return F.avg_pool2d(images - reconstruction, 4).abs().mean((1, 2, 3))


@pytest.mark.parametrize("case", ["fixed", "adaptive"])
def test_training_losses_and_gradients(checkpoint: Path, golden_losses: dict[str, Any], case: str) -> None:
    wanted, images = golden_losses["cases"][case], golden_losses["image"]
    tokenizer = Tokenizer.from_pretrained(checkpoint, ema=False).train()
    discriminator = PatchDiscriminator.from_reference(checkpoint).train()
    weight = 0.1 if case == "fixed" else None
    losses = TokenizerLoss(LossConfig(adversarial="hinge", generator_weight=weight), distance)

    output = tokenizer(images)
    critic = losses.discriminator_loss(images, output.reconstruction, discriminator)
    critic.total.backward()
    generator = losses(images, output, discriminator=discriminator, last_layer=tokenizer.last_layer)
    generator.total.backward()

    assert critic.total.item() == pytest.approx(wanted["disc_loss"].item(), rel=TOLERANCE)
    for ours, theirs in (
        ("logits_real", "logits_real"),
        ("logits_fake", "logits_fake"),
        ("lecam", "lecam_loss"),
    ):
        assert critic.terms[ours].item() == pytest.approx(
            wanted["disc_log"][f"train/{theirs}"].item(), rel=TOLERANCE
        )
    averages = (losses.real_average.item(), losses.fake_average.item())
    assert averages == pytest.approx(wanted["lecam"], rel=TOLERANCE)

    names = {
        "total": "total_loss",
        "quantization": "codebook_quant_loss",
        "entropy": "codebook_entropy_loss",
        "sample_entropy": "codebook_sample_entropy_loss",
        "codebook_entropy": "codebook_avg_entropy_loss",
        "codebook": "codebook_loss",
        "nll": "nll_loss",
        "reconstruction": "reconstruct_loss",
        "perceptual": "perceptual_loss",
        "adversarial_weight": "d_weight",
        "adversarial": "g_loss",
        "adversarial_unweighted": "unsacled_g_loss",
    }
    for ours, theirs in names.items():
        truth = wanted["gen_log"][f"train/{theirs}"].item()
        assert generator.terms[ours].item() == pytest.approx(truth, rel=TOLERANCE), ours

    gradients = {
        "grad_disc_first": discriminator.layers[0].weight.grad,
        "grad_encoder_conv_in": tokenizer.encoder.conv_in.weight.grad,
        "grad_codebook": tokenizer.quantizer.codebook.grad,
        "grad_decoder_conv_out": tokenizer.last_layer.grad,
    }
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted[name]) < TOLERANCE, name
