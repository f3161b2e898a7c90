"""Stage two: training a generator on a tokenizer's tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ibq_fast.data import to_uint8
from ibq_fast.data.config import Split
from ibq_fast.evaluate.images import image_grid
from ibq_fast.generator import Generator
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train.config import GeneratorRun, dump_config
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.loop import run_task, will_resume
from ibq_fast.train.optimizer import by_steps
from ibq_fast.train.peers import PeerWatch
from ibq_fast.train.progress import Reporter
from ibq_fast.train.speed import prepare
from ibq_fast.train.token_cache import TokenCache, build_token_cache
from ibq_fast.train.token_source import CachedTokens, EncodedImages, TokenSource
from ibq_fast.train.weights import Trained


def train_generator(config: GeneratorRun) -> Path:
    """Train a generator and return the directory of the exported model, ``<run.dir>/generator``.

    Raises ValueError for settings that do not fit the tokenizer or the data, and what :func:`run_task`
    and :class:`PeerWatch` raise.
    """
    if config.run.codebook_parallel:
        raise ValueError(
            f"run.codebook_parallel: expected false for a generator, got {config.run.codebook_parallel}"
        )
    accelerator = build_accelerator(config.run)
    with PeerWatch(config.run):
        tokenizer = Tokenizer.from_pretrained(config.tokenizer, device=accelerator.device)
        task = GeneratorTask(config, accelerator, tokenizer.requires_grad_(False))
        if config.run.init_from and not will_resume(config.run):
            task.start_from(config.run.init_from)
        return run_task(task, config.run, accelerator)


class GeneratorTask:
    """A generator, the tokens it learns and the tokenizer that shows its pictures, as the loop sees them."""

    title = "generator"

    def __init__(self, config: GeneratorRun, accelerator: Accelerator, tokenizer: Tokenizer) -> None:
        self.config = config
        self.accelerator = accelerator
        self.tokenizer = tokenizer
        _check_tokenizer(config, tokenizer)
        self.held_out = self._cached("val")
        self.source = self._source()
        classes = max(self.source.classes or 0, len(self.held_out.classes))
        if classes > config.model.num_classes:
            raise ValueError(
                f"model.num_classes: expected at least the data's {classes} classes, "
                f"got {config.model.num_classes}"
            )
        self.images_per_step = config.data.batch_size * config.optim.accumulate * accelerator.num_processes
        generator = Generator(config.model)
        generator.recompute = config.run.activation_checkpointing
        if config.input_codes != "own":
            generator.set_input_codes(_codes(tokenizer), frozen=config.input_codes == "frozen")
        prepare(generator, generator.layers(), replace(config.run, channels_last=False))
        parts = list[nn.Module](generator.blocks) if config.run.fsdp else None
        self.generator = Trained(
            _Loss(generator),
            by_steps(config.optim, self.source.batches),
            accelerator,
            averaged=True,
            sharded=parts,
        )

    def record(self, run_dir: Path) -> None:
        dump_config(self.config, run_dir / "config.yaml")

    def update(self, step: int, progress: float) -> dict[str, Tensor]:
        config = self.config.optim
        self.generator.set_rates(step, progress, self.config.run.steps)
        total = torch.zeros((), device=self.accelerator.device)
        for i in range(config.accumulate):
            tokens, labels = self._next()
            with self.generator.micro(i):
                loss = self.generator.module(tokens, labels)
                self.generator.backward(loss)
            total += loss.detach().float() / config.accumulate
        norm = self.generator.apply()
        return {"loss": total} if norm is None else {"loss": total, "grad_norm": norm}

    def figures(self) -> dict[str, float]:
        return {"lr": self.generator.rate, **self.source.figures()}

    def evaluate(self) -> dict[str, float]:
        """``loss``, nats per token on held-out images, without dropout; ``perplexity`` is its exponential."""
        size = self.config.data.batch_size
        last = min(len(self.held_out), self._evaluated)
        total = 0.0
        with self.generator.evaluating() as model, torch.no_grad():
            for start in range(0, last, size):
                indices = torch.arange(start, min(start + size, last)).numpy()
                tokens, labels = self.held_out.batch(0, indices, self.config.run.seed)
                loss = model(tokens.to(self.accelerator.device), labels.to(self.accelerator.device))
                total += float(loss) * len(indices)
        mean = total / max(last, 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}

    def picture(self) -> tuple[str, Tensor] | None:
        """The first images of the run's seed, classes in turn."""
        known = self.source.classes or self.config.model.num_classes
        classes = torch.arange(self.config.run.pictures) % known
        drawn = self.config.sample
        with self.generator.exporting() as model:
            if model is None:
                return None
            tokens = _bare(model).sample(
                classes.to(self.accelerator.device),
                cfg_scale=drawn.cfg_scale,
                temperature=drawn.temperature,
                top_k=drawn.top_k,
                top_p=drawn.top_p,
                seed=self.config.run.seed,
            )
        return "samples", image_grid(to_uint8(self.tokenizer.decode(tokens)))

    def parameters(self) -> Mapping[str, Tensor]:
        return dict(_bare(self.generator.bare).named_parameters())

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.state(), "progress": {"data": self.source.state()}}

    def rows_to_read(self, name: str, shape: Sequence[int]) -> slice | None:
        return None

    def load_state(self, parts: Mapping[str, Any]) -> None:
        self.generator.load_state(parts["generator"])
        self.source.load_state(parts["progress"]["data"])

    def start_from(self, source: str) -> None:
        """Take over the weights, and what else there is, of another generator of these settings.

        Raises ValueError, naming the weight, where they do not fit, and what ``load_snapshot`` raises.
        """
        from ibq_fast.checkpoint.snapshot import load_snapshot, renamed

        snapshot = load_snapshot(source, "generator")
        network = renamed(snapshot.parts["generator"], lambda name: f"generator.{name}")
        self.generator.start_from(network, source)

    def export(self, run_dir: Path) -> Path:
        folder = run_dir / "generator"
        with self.generator.exporting() as model:
            if model is not None:
                _bare(model).save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _next(self) -> tuple[Tensor, Tensor]:
        tokens, labels = self.source.next()
        known = self.config.model.num_classes
        if self.source.classes is None and not bool(((labels >= 0) & (labels < known)).all()):
            raise ValueError(
                f"data.root: expected labels in [0, {known - 1}] (model.num_classes = {known}) with every "
                f"sample, got {labels.tolist()} (-1: none)"
            )
        device = self.accelerator.device
        return tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    @property
    def _evaluated(self) -> int:
        """Held-out images that an evaluation looks at, at most."""
        return self.config.data.batch_size * self.config.run.eval_batches

    def _source(self) -> TokenSource:
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        if config.cache == "none":
            return EncodedImages(self.tokenizer, config.data, config.run.seed, rank, world)
        return CachedTokens(self._cached("train"), config.data.batch_size, config.run.seed, rank, world)

    def _cached(self, split: Split) -> TokenCache:
        """On disk the main process encodes and the others map the same file; in memory each encodes for
        itself. Without a cache the held-out images that are looked at are kept in memory all the same.
        """
        config = self.config
        folder = Path(config.cache_dir or Path(config.run.dir) / "tokens") if config.cache == "disk" else None
        with (
            Reporter(
                self.title, total_steps=None, total_seconds=None, main=self.accelerator.is_main_process
            ) as reporter,
            self.accelerator.main_process_first(),
        ):
            return build_token_cache(
                self.tokenizer,
                config.data,
                split,
                folder,
                crops=config.cache_crops,
                limit=self._evaluated if config.cache == "none" else None,
                say=reporter.say,
            )


class _Loss(nn.Module):
    """The generator's loss as a forward pass, which is what gradient synchronisation and autocast wrap."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, tokens: Tensor, class_ids: Tensor) -> Tensor:
        return self.generator.loss(tokens, class_ids)


def _bare(module: nn.Module) -> Generator:
    assert isinstance(module, _Loss)
    return module.generator


def _codes(tokenizer: Tokenizer) -> Tensor:
    """The codes [K, D] as the tokenizer's decoder receives them."""
    everything = torch.arange(tokenizer.config.quantizer.codebook_size, device=tokenizer.last_layer.device)
    with torch.no_grad():
        return tokenizer.quantizer.decode(everything.unsqueeze(0), channel_last=True)[0]


def _check_tokenizer(config: GeneratorRun, tokenizer: Tokenizer) -> None:
    settings = tokenizer.config
    pairs: tuple[tuple[str, Any, Any], ...] = (
        ("model.vocab_size", settings.quantizer.codebook_size, config.model.vocab_size),
        ("model.grid", settings.grid, config.model.grid),
        ("data.resolution", settings.resolution, config.data.resolution),
        ("data.channels", settings.image_channels, config.data.channels),
    )
    if config.input_codes != "own":
        pairs += (("model.token_dim", settings.quantizer.dim, config.model.token_dim),)
    for name, expected, found in pairs:
        if expected != found:
            raise ValueError(f"{name}: expected the tokenizer's {expected}, got {found}")
