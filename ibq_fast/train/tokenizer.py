"""Stage one: training a tokenizer, with or without a discriminator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ibq_fast.codebook_parallel import CodebookShards
from ibq_fast.data import ShardLoader, build_loader, to_float, to_uint8
from ibq_fast.evaluate.images import psnr, reconstruction_grid
from ibq_fast.evaluate.usage import CodebookUsage, usage_figures
from ibq_fast.tokenizer import LossConfig, PatchDiscriminator, Tokenizer, TokenizerLoss
from ibq_fast.train.collapse import CollapseMonitor
from ibq_fast.train.config import TokenizerRun, dump_config
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.loop import run_task, will_resume
from ibq_fast.train.optimizer import by_steps
from ibq_fast.train.peers import PeerWatch
from ibq_fast.train.perceptual import build_perceptual
from ibq_fast.train.speed import prepare
from ibq_fast.train.split import SplitCodebook
from ibq_fast.train.usage import UsageWindow
from ibq_fast.train.weights import Trained

Perceptual = Callable[[Tensor, Tensor], Tensor]


def train_tokenizer(config: TokenizerRun, *, perceptual: Perceptual | None = None) -> Path:
    """Train a tokenizer and return the directory of the exported model, ``<run.dir>/tokenizer``.

    ``perceptual(images, reconstructions)`` replaces the distance that ``config.perceptual`` names.
    Raises ValueError for settings that do not fit together, and what :func:`run_task` and
    :class:`PeerWatch` raise.
    """
    if config.data.resolution != config.model.resolution:
        raise ValueError(
            f"model.resolution: expected data.resolution {config.data.resolution}, "
            f"got {config.model.resolution}"
        )
    if config.data.channels != config.model.image_channels:
        raise ValueError(
            f"model.image_channels: expected data.channels {config.data.channels}, "
            f"got {config.model.image_channels}"
        )
    if config.run.fsdp:
        raise ValueError(
            "run.fsdp: expected false for a tokenizer (run.codebook_parallel splits its codebook)"
        )
    accelerator = build_accelerator(config.run)
    with PeerWatch(config.run):
        task = TokenizerTask(config, accelerator, perceptual)
        if config.run.init_from and not will_resume(config.run):
            task.start_from(config.run.init_from)
        return run_task(task, config.run, accelerator)


class TokenizerTask:
    """A tokenizer, its losses and data, as the loop sees them.

    An update with a discriminator first improves the discriminator on the batch's reconstructions, then the
    tokenizer against the improved discriminator, as published. With gradient accumulation the first half
    needs reconstructions of every micro-batch before the second may begin: they are computed once more,
    without gradients.
    """

    title = "tokenizer"

    def __init__(
        self, config: TokenizerRun, accelerator: Accelerator, perceptual: Perceptual | None = None
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        device = accelerator.device
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self.data = build_loader(config.data, "train", seed=config.run.seed, **ranks)
        self.held_out = build_loader(config.data, "val", seed=config.run.seed, **ranks)
        self.images_per_step = config.data.batch_size * config.optim.accumulate * accelerator.num_processes
        batches = None if isinstance(self.data, ShardLoader) else len(self.data)
        optim = by_steps(config.optim, batches)
        tokenizer = Tokenizer(config.model)
        tokenizer.checkpoint_activations(config.run.activation_checkpointing)
        prepare(tokenizer, (tokenizer.encoder, tokenizer.decoder), config.run)
        self.shards = _shards(config, accelerator)
        self.split = None if self.shards is None else SplitCodebook(tokenizer, self.shards)
        self.tokenizer = Trained(tokenizer, optim, accelerator, averaged=True, split=self.split)
        self.critic: Trained | None = None
        if has_discriminator(config.loss):
            critic = build_discriminator(config, accelerator)
            prepare(critic, (critic,), config.run)
            self.critic = Trained(critic, optim, accelerator, averaged=False)
        losses = config.loss if self.critic else replace(config.loss, adversarial="none")
        self.loss = TokenizerLoss(losses, perceptual or build_perceptual(config.perceptual, device)).to(
            device
        )
        self.usage = UsageWindow(config.model.quantizer.codebook_size, config.run.usage_window, device)
        self.collapse = CollapseMonitor(tokenizer.quantizer)
        self._last_image: Tensor | None = None
        self._batches: Iterator[Any] = self.data.forever()

    def record(self, run_dir: Path) -> None:
        dump_config(self.config, run_dir / "config.yaml")

    def update(self, step: int, progress: float) -> dict[str, Tensor]:
        for trained in (self.tokenizer, self.critic):
            if trained is not None:
                trained.set_rates(step, progress, self.config.run.steps)
        batches = [self._next() for _ in range(self.config.optim.accumulate)]
        # One micro-batch: its forward pass serves both halves of the update.
        output = self.tokenizer.module(batches[0]) if len(batches) == 1 else None
        terms = _Terms(len(batches))
        if self.critic is not None and self.loss.adversarial_factor(step) > 0:
            self._update_critic(self.critic, batches, output, step, terms)
        for i, images in enumerate(batches):
            with self.tokenizer.micro(i):
                out = output if output is not None else self.tokenizer.module(images)
                losses = self.loss(
                    images,
                    out,
                    step=step,
                    discriminator=self.critic.bare if self.critic else None,
                    last_layer=self._last_layer(),
                )
                self.tokenizer.backward(losses.total)
            terms.add(losses.terms)
            self.usage.add(out.quantizer.indices)
        norm = self.tokenizer.apply()
        if norm is not None:
            terms.values["grad_norm"] = norm
        self.usage.end_step()
        terms.values["loss"] = terms.values.pop("total")
        return terms.values

    def figures(self) -> dict[str, float]:
        bad = self.data.share_faults(gather_object)
        counts = self._total(self.usage.counts())
        logits: dict[str, float] = {}
        if self._last_image is not None:
            tokenizer: Any = self.tokenizer.bare.eval()
            with torch.no_grad():
                logits = self.collapse.logit_figures(tokenizer.features(self._last_image))
            tokenizer.train()
        if self.usage.finished and self.accelerator.is_main_process:
            self.collapse.look(counts, logits)
        return {"lr": self.tokenizer.rate, **usage_figures(counts), **logits, **bad}

    def evaluate(self) -> dict[str, float]:
        """``psnr`` (mean over images, on uint8), ``l1``, ``utilisation`` and ``perplexity`` on held-out
        images.
        """
        quantizer = self.config.model.quantizer
        usage = CodebookUsage(quantizer.codebook_size, self.accelerator.device)
        sums = torch.zeros(3, dtype=torch.float64)
        for images, reconstruction, indices in self._reconstructed(self.config.run.eval_batches):
            quality = psnr(images, to_uint8(reconstruction)).clamp_max(100.0)
            sums[0] += quality.sum()
            sums[1] += (reconstruction - to_float(images)).abs().flatten(1).mean(1).cpu().sum()
            sums[2] += len(images)
            usage.update(indices)
        device = self.accelerator.device
        sums = sums.to(torch.float32 if device.type == "npu" else torch.float64).to(device)
        sums, counts = self.accelerator.reduce((sums, usage.counts), "sum")
        total, distance, images_seen = sums.tolist()
        seen = max(images_seen, 1)
        return {"psnr": total / seen, "l1": distance / seen, **usage_figures(counts)}

    def picture(self) -> tuple[str, Tensor] | None:
        if not self.accelerator.is_main_process and self.shards is None:
            return None  # the others may have no held-out images at all
        originals, copies = [], []
        needed = math.ceil(self.config.run.pictures / self.config.data.batch_size)
        for images, reconstruction, _ in self._reconstructed(needed):
            originals.append(images.cpu())
            copies.append(to_uint8(reconstruction).cpu())
        if not self.accelerator.is_main_process:
            return None
        wanted = slice(0, self.config.run.pictures)
        return "reconstructions", reconstruction_grid(torch.cat(originals)[wanted], torch.cat(copies)[wanted])

    def parameters(self) -> Mapping[str, Tensor]:
        modules = {"tokenizer": self.tokenizer.bare}
        if self.critic is not None:
            modules["discriminator"] = self.critic.bare
        return {
            f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()
        }

    def state(self) -> dict[str, Any]:
        critic = {} if self.critic is None else {"discriminator": self.critic.state()}
        return {
            "tokenizer": self.tokenizer.state(),
            **critic,
            "progress": {
                "data": self.data.state_dict(gather_object),
                "usage": self.usage.state_dict(self._total),
                "loss": {"buffers": dict(self.loss.named_buffers(recurse=False))},
            },
        }

    def rows_to_read(self, name: str, shape: Sequence[int]) -> slice | None:
        return None if self.split is None else self.split.rows_to_read(name, shape)

    def load_state(self, parts: Mapping[str, Any]) -> None:
        self.tokenizer.load_state(parts["tokenizer"])
        if self.critic is not None and "discriminator" in parts:  # it may have been turned on since
            self.critic.load_state(parts["discriminator"])
        progress = parts["progress"]
        self.data.load_state_dict(progress["data"])
        self._batches = self.data.forever()
        self.usage.load_state_dict(progress["usage"], main=self.accelerator.is_main_process)
        for name, buffer in self.loss.named_buffers(recurse=False):
            buffer.copy_(progress["loss"]["buffers"][name])

    def start_from(self, source: str) -> None:
        """Take over the weights, and what else there is, of another tokenizer of these settings.

        Raises ValueError, naming the weight, where they do not fit, and what ``load_snapshot`` raises.
        """
        from ibq_fast.checkpoint.snapshot import load_snapshot, with_codes_set

        snapshot = load_snapshot(source, "tokenizer")
        network = dict(snapshot.parts["tokenizer"])
        network["model"] = with_codes_set(self.config.model, network["model"])
        self.tokenizer.start_from(network, source, may_lack=self.config.model.quantizer.learned_scalars)
        critic = snapshot.parts.get("discriminator")
        if self.critic is not None and critic is not None:
            self.critic.start_from(critic, source)

    def export(self, run_dir: Path) -> Path:
        folder = run_dir / "tokenizer"
        with self.tokenizer.exporting() as model:
            if model is not None:
                model.save_pretrained(folder)  # type: ignore[operator]
        self.accelerator.wait_for_everyone()
        return folder

    def _update_critic(
        self, critic: Trained, batches: list[Tensor], output: Any, step: int, terms: _Terms
    ) -> None:
        for i, images in enumerate(batches):
            if output is not None:
                reconstruction = output.reconstruction
            else:
                with torch.no_grad():
                    reconstruction = self.tokenizer.module(images).reconstruction
            with critic.micro(i):
                losses = self.loss.discriminator_loss(images, reconstruction, critic.module, step=step)
                critic.backward(losses.total)
            terms.add(losses.terms)
        critic.apply()

    def _next(self) -> Tensor:
        images = to_float(next(self._batches).images.to(self.accelerator.device, non_blocking=True))
        self._last_image = images[:1]
        if self.config.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images

    def _total(self, counts: Tensor) -> Tensor:
        """The sum over processes; ``counts`` stays as it is."""
        return self.accelerator.reduce(counts.clone(), "sum")

    def _last_layer(self) -> nn.Parameter:
        return self.tokenizer.bare.last_layer  # type: ignore[return-value]

    def _reconstructed(self, batches: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Held-out images uint8, reconstructions and indices, with the weights that would be exported."""
        with self.tokenizer.evaluating() as model, torch.no_grad():
            for batch in self._in_step(itertools.islice(self.held_out, batches)):
                if batch is None:  # others have images left, and need this one's codes
                    quantizer: Any = model.quantizer
                    quantizer(
                        torch.zeros(0, quantizer.dim, device=self.accelerator.device), channel_last=True
                    )
                    continue
                images = batch.images.to(self.accelerator.device)
                out = model(images)
                yield images, out.reconstruction, out.quantizer.indices

    def _in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """``batches``; with a split codebook as many on each process, None where one has no more."""
        if self.shards is None:
            yield from batches
            return
        while self.shards.any((batch := next(batches, None)) is not None):
            yield batch


class _Terms:
    """Loss terms averaged over an update's micro-batches."""

    def __init__(self, micro_batches: int) -> None:
        self._share = 1.0 / micro_batches
        self.values: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            part = term.detach().float() * self._share
            self.values[name] = self.values[name] + part if name in self.values else part


def build_discriminator(config: TokenizerRun, accelerator: Accelerator) -> nn.Module:
    """The discriminator, its batch norms synchronised if ``config.loss.discriminator_norm`` says so.

    Raises ValueError where the processes' backend cannot: torch has no such batch norm on the CPU.
    """
    loss = config.loss
    critic = PatchDiscriminator(
        config.model.image_channels, loss.discriminator_channels, loss.discriminator_layers
    )
    if loss.discriminator_norm == "device" or accelerator.num_processes == 1:
        return critic
    if accelerator.device.type == "cpu":
        raise ValueError(
            'loss.discriminator_norm: expected "device" on the CPU (with gloo), where torch has no '
            f"synchronised batch norm, got {loss.discriminator_norm!r}"
        )
    synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(critic)
    return synchronised


def _shards(config: TokenizerRun, accelerator: Accelerator) -> CodebookShards | None:
    """How ``run.codebook_parallel`` splits the codebook; None where each process has it whole."""
    wanted = config.run.codebook_parallel
    if config.model.quantizer.kind != "ibq" and wanted:
        raise ValueError(
            f"run.codebook_parallel: expected model.quantizer.kind ibq, got {config.model.quantizer.kind}"
        )
    size = accelerator.num_processes if isinstance(wanted, bool) and wanted else int(wanted)
    if size < 2:
        return None
    timeout = timedelta(minutes=config.run.collective_minutes)
    return CodebookShards(
        config.model.quantizer.codebook_size, size, device=accelerator.device, timeout=timeout
    )


def has_discriminator(config: LossConfig) -> bool:
    """Whether any weight would ever let a discriminator matter."""
    weightless = config.generator_weight == 0 or config.discriminator_factor == 0
    return config.adversarial != "none" and not weightless
