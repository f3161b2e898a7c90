"""The losses that train a tokenizer: reconstruction, perceptual, adversarial and quantizer terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ibq_fast.tokenizer.model import TokenizerOutput

Perceptual = Callable[[Tensor, Tensor], Tensor]

_ADAPTIVE_EPS = 1e-4
_ADAPTIVE_MAX = 1e4


@dataclass(frozen=True)
class LossConfig:
    """Weights of a tokenizer's losses; the defaults are the published recipe's, without its discriminator.

    reconstruction_weight, squared_weight: of the mean absolute and the mean square error of the pixels.
    perceptual_weight: used when :class:`TokenizerLoss` is given a perceptual distance.
    quantization_weight, entropy_weight: of the quantizer's ``quantization_loss`` and ``entropy_loss``.
    adversarial: "none", or the discriminator's loss, "hinge" or "vanilla". The tokenizer's own adversarial
        loss is non-saturating with both.
    generator_weight: of the tokenizer's adversarial loss; None balances its gradient at the decoder's last
        layer against the reconstruction's, times ``adaptive_scale``.
    discriminator_start: first step with adversarial terms; before it they cost nothing.
    discriminator_factor: scales both sides of the adversarial game.
    discriminator_channels, discriminator_layers: size of the patch discriminator a trainer builds.
    discriminator_norm: whose images its batch norms take their statistics over: those of each device
        ("device", as published; the running statistics are the main process's), or those of all devices
        ("all", on GPUs and NPUs).
    lecam_weight, lecam_decay: LeCam regularisation of the discriminator by running averages of its logits.
    """

    reconstruction_weight: float = 1.0
    perceptual_weight: float = 1.0
    squared_weight: float = 0.0
    quantization_weight: float = 1.0
    entropy_weight: float = 0.05
    adversarial: Literal["none", "hinge", "vanilla"] = "none"
    generator_weight: float | None = 0.1
    adaptive_scale: float = 0.4
    discriminator_start: int = 0
    discriminator_factor: float = 1.0
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_norm: Literal["device", "all"] = "device"
    lecam_weight: float = 0.05
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        if self.adversarial not in ("none", "hinge", "vanilla"):
            raise ValueError(f"adversarial: expected none, hinge or vanilla, got {self.adversarial!r}")
        if self.discriminator_norm not in ("device", "all"):
            raise ValueError(f"discriminator_norm: expected device or all, got {self.discriminator_norm!r}")
        for name in ("reconstruction", "squared", "perceptual", "quantization", "lecam"):
            value = getattr(self, f"{name}_weight")
            if not value >= 0:
                raise ValueError(f"{name}_weight: expected at least 0, got {value}")
        if self.generator_weight is not None and not self.generator_weight >= 0:
            raise ValueError(f"generator_weight: expected at least 0 or null, got {self.generator_weight}")
        if self.discriminator_start < 0:
            raise ValueError(f"discriminator_start: expected at least 0, got {self.discriminator_start}")
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"lecam_decay: expected a share in [0, 1), got {self.lecam_decay}")


class LossOutput(NamedTuple):
    """``total`` to differentiate; ``terms``: 0-dim detached tensors by name, for the log."""

    total: Tensor
    terms: dict[str, Tensor]


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean relu(1 - real) + mean relu(1 + fake)) over all patches' logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean softplus(-real) + mean softplus(fake)): binary cross-entropy on logits."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def nonsaturating_generator_loss(fake: Tensor) -> Tensor:
    """mean softplus(-m), with m each image's mean over its patches' logits [B, 1, h, w]."""
    return F.softplus(-fake.flatten(1).mean(1)).mean()


def lecam_regularizer(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """mean relu(real - fake_average)² + mean relu(real_average - fake)²."""
    return F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()


class TokenizerLoss(nn.Module):
    """Both sides of a tokenizer's training loss. The discriminator stays outside, for its own optimizer.

    ``perceptual(images, reconstruction)`` returns a distance of any shape; its mean counts. Images are
    floating point in [-1, 1]. LeCam's running averages are buffers and so are saved with the state dict.
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(self, config: LossConfig, perceptual: Perceptual | None = None) -> None:
        super().__init__()
        self.config = config
        self.perceptual = perceptual
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def adversarial_factor(self, step: int) -> float:
        """Scale of the adversarial terms at ``step``: 0 without a discriminator or before its start."""
        config = self.config
        active = config.adversarial != "none" and step >= config.discriminator_start
        return config.discriminator_factor if active else 0.0

    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        step: int = 0,
        discriminator: nn.Module | None = None,
        last_layer: Tensor | None = None,
    ) -> LossOutput:
        """The tokenizer's loss. Gradients reach the tokenizer only, never the discriminator's weights.

        Pass the bare ``discriminator`` (not one wrapped for gradient synchronisation) when
        ``config.adversarial`` is not "none", and ``tokenizer.last_layer`` when ``generator_weight`` is None.
        Terms: total; reconstruction, squared, perceptual and nll, their weighted sum; quantization,
        sample_entropy, codebook_entropy, entropy and codebook, the weighted sum of quantization and entropy;
        adversarial (weighted), adversarial_unweighted, adversarial_weight, discriminator_factor.
        """
        config, reconstruction, quantized = self.config, output.reconstruction, output.quantizer
        if images.shape != reconstruction.shape:
            raise ValueError(f"images: expected {list(reconstruction.shape)}, got {list(images.shape)}")
        pixels = F.l1_loss(reconstruction, images)
        distance = pixels.new_zeros(())
        if self.perceptual is not None and config.perceptual_weight > 0:
            distance = self.perceptual(images, reconstruction).mean()
        nll = config.reconstruction_weight * pixels + config.perceptual_weight * distance
        squared = pixels.new_zeros(())
        if config.squared_weight > 0:
            squared = F.mse_loss(reconstruction, images)
            nll = nll + config.squared_weight * squared
        codebook = config.quantization_weight * quantized.quantization_loss
        if config.entropy_weight != 0:
            codebook = codebook + config.entropy_weight * quantized.entropy_loss
        adversarial = weight = pixels.new_zeros(())
        factor = self.adversarial_factor(step)
        if factor > 0:
            with _frozen(_required(discriminator)) as critic:
                adversarial = factor * nonsaturating_generator_loss(critic(reconstruction))
            weight = self._generator_weight(nll, adversarial / factor, last_layer)
        total = nll + codebook + weight * adversarial
        terms = {
            "total": total,
            "reconstruction": pixels,
            "squared": squared,
            "perceptual": distance,
            "nll": nll,
            "quantization": quantized.quantization_loss,
            "sample_entropy": quantized.sample_entropy,
            "codebook_entropy": quantized.codebook_entropy,
            "entropy": quantized.entropy_loss,
            "codebook": codebook,
            "adversarial": weight * adversarial,
            "adversarial_unweighted": adversarial,
            "adversarial_weight": weight,
            "discriminator_factor": pixels.new_tensor(factor),
        }
        return LossOutput(total, {name: term.detach() for name, term in terms.items()})

    def discriminator_loss(
        self, images: Tensor, reconstruction: Tensor, discriminator: nn.Module, *, step: int = 0
    ) -> LossOutput:
        """The discriminator's loss; in training mode LeCam's averages are updated first.

        Call it only where ``adversarial_factor(step)`` is above 0 (``ValueError`` otherwise).
        Terms: discriminator (the total), logits_real, logits_fake (means), lecam (unweighted).
        """
        config, factor = self.config, self.adversarial_factor(step)
        if factor <= 0:
            raise ValueError(
                f"step: expected an adversarial step (from {config.discriminator_start} on), got {step}"
            )
        real, fake = discriminator(images.detach()), discriminator(reconstruction.detach())
        loss = hinge_discriminator_loss if config.adversarial == "hinge" else vanilla_discriminator_loss
        total, lecam = loss(real, fake), real.new_zeros(())
        if config.lecam_weight > 0:
            if self.training:
                self._update_averages(real.detach(), fake.detach())
            lecam = lecam_regularizer(real, fake, self.real_average, self.fake_average)
            total = total + config.lecam_weight * lecam
        total = factor * total
        terms = {
            "discriminator": total,
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
            "lecam": lecam,
        }
        return LossOutput(total, {name: term.detach() for name, term in terms.items()})

    def _generator_weight(self, nll: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
        """The fixed weight, or ‖∂nll/∂w‖ / (‖∂adversarial/∂w‖ + 1e-4) at the last layer's weight w."""
        config = self.config
        if config.generator_weight is not None:
            return nll.new_tensor(config.generator_weight)
        if last_layer is None:
            raise ValueError(
                "last_layer: expected the tokenizer's last layer for adaptive weighting, got None"
            )
        if not nll.requires_grad:
            return nll.new_zeros(())
        of_nll, of_adversarial = (
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
            for loss in (nll, adversarial)
        )
        ratio = of_nll / (of_adversarial + _ADAPTIVE_EPS)
        return config.adaptive_scale * ratio.clamp(0.0, _ADAPTIVE_MAX).detach()

    @torch.no_grad()
    def _update_averages(self, real: Tensor, fake: Tensor) -> None:
        """Move the averages towards the batch's mean logits, taken over all processes."""
        means = torch.stack([real.float().mean(), fake.float().mean()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        share = 1 - self.config.lecam_decay
        self.real_average.lerp_(means[0].to(self.real_average.dtype), share)
        self.fake_average.lerp_(means[1].to(self.fake_average.dtype), share)


def _required(discriminator: nn.Module | None) -> nn.Module:
    if discriminator is None:
        raise ValueError("discriminator: expected a module for the adversarial loss, got None")
    return discriminator


@contextmanager
def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` with its parameters taken for constants: what is computed inside sends them no gradient."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
