"""The quick start from beginning to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibq_fast.data import InMemoryImages, build_dataset, to_uint8
from ibq_fast.evaluate.generator import Reference, evaluate_generator
from ibq_fast.evaluate.protocols import find_protocol
from ibq_fast.evaluate.sources import tensor_source
from ibq_fast.evaluate.tokenizer import TokenizerEvaluation, evaluate_tokenizer
from ibq_fast.generator import Generator
from ibq_fast.quickstart import pictures
from ibq_fast.quickstart.classifier import train_classifier
from ibq_fast.quickstart.clock import StageClock
from ibq_fast.quickstart.machine import describe_machine, multiplies_bfloat16, peak_memory_gigabytes
from ibq_fast.quickstart.measure import Samples, draw_samples
from ibq_fast.quickstart.options import Options
from ibq_fast.quickstart.report import write_report
from ibq_fast.quickstart.targets import judge
from ibq_fast.quickstart.threads import use_fastest_threads
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train import GeneratorRun, TokenizerRun, read_metrics, train_generator, train_tokenizer
from ibq_fast.train.config import parse_run

# Seconds per stage on two cores with AVX-512. They share out the time and the clock's forecast, nothing else.
_EXPECTED = {
    "tokenizer": 130.0,
    "vq": 110.0,
    "classifier": 25.0,
    "generator": 150.0,
    "measure": 45.0,
}
# Of a stage's time, what is left to the steps: reading images, encoding tokens and saving go off it.
_TRAINING_SHARE = 0.88
_MARK = ".quickstart"
_FOLDERS = ("tokenizer", "vq", "generator", "evaluation")
_CLASSIFIER_EPOCHS = 4.0
_SHOWN = 32
_EVALUATION = "evaluation"
# The network whose weights come as a package: nothing is downloaded.
_PROTOCOL = find_protocol("uint8-bicubic", trunks=("efficientnet_lite0",), lpips=())

NAMES = {"tokenizer": "IBQ", "vq": "plain VQ"}


def run_quickstart(options: Options) -> dict[str, Any]:
    """Do it all, write everything below ``options.out``, and return what ``report.json`` holds.

    Raises ValueError for recipes that do not fit together, FileExistsError when ``out`` holds something
    else's work, and what the trainings raise.
    """
    threads = torch.get_num_threads()
    try:
        return _Quickstart(options).run()
    finally:
        torch.set_num_threads(threads)


class _Quickstart:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.out = Path(options.out)
        self.tokenizer_run: TokenizerRun = self._recipe("tokenizer")
        self.generator_run: GeneratorRun = self._recipe("generator")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        expected = {k: v for k, v in _EXPECTED.items() if not (k == "vq" and options.skip_vq)}
        self.most_threads = torch.get_num_threads()
        self.threads: dict[str, int] = {}
        self.clock = StageClock(expected, options.max_minutes * 60)

    def run(self) -> dict[str, Any]:
        self._prepare_folder()
        train, held_out = self._images("train"), self._images("val")
        shown = held_out.images[: self.options.held_out]

        title = "IBQ tokenizer"
        folders = {"tokenizer": self._train_tokenizer("tokenizer", title, ())}
        if not self.options.skip_vq:
            same = (f"run.steps={self._steps_done('tokenizer')}", "model.quantizer.kind=vq")
            title = "plain VQ tokenizer: the same images, steps and networks"
            folders["vq"] = self._train_tokenizer("vq", title, same)

        with self._training("classifier", "classifier of real images"):
            classifier = train_classifier(
                train.images,
                train.labels,
                held_out.images,
                held_out.labels,
                classes=len(train.classes),
                epochs=_CLASSIFIER_EPOCHS * min(self.options.steps_scale, 1.0),
                seed=self.options.seed,
                device=self.device,
                max_seconds=self.clock.allowance("classifier"),
            )
        generator_folder = self._train_generator(folders["tokenizer"])

        with self.clock.stage("measure", "samples, figures, pictures"):
            models = {name: self._load(folder) for name, folder in folders.items()}
            kept = {name: self._evaluate(name, model, shown) for name, model in models.items()}
            samples = draw_samples(
                Generator.from_pretrained(generator_folder, device=self.device),
                models["tokenizer"],
                classifier.model,
                per_class=self.options.samples_per_class,
                sampling=self.generator_run.sample,
                seed=self.options.seed,
                precision="bf16" if self.generator_run.run.mixed_precision == "bf16" else None,
            )
            figures = {
                **kept["tokenizer"].figures,
                "recognised": samples.recognised,
                "classifier_accuracy": classifier.accuracy[-1],
                **self._evaluate_samples(samples, shown),
            }
            self._draw(held_out, shown, models, kept, samples)
        self.clock.finish()
        report = self._report(train, shown, kept, samples.recognised_by_class(len(train.classes)), figures)
        (self.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        write_report(self.out / "report.md", report)
        return report

    def _recipe(self, kind: str, overrides: tuple[str, ...] = ()) -> Any:
        """A run's config: the recipe, the caller's overrides, what the quick start itself decides."""
        tokenizer = kind != "generator"
        options = self.options
        file = options.tokenizer_config if tokenizer else options.generator_config
        if not file.is_file():
            raise FileNotFoundError(f"config: expected a recipe at {file}; run from a checkout, or name one")
        given = options.tokenizer_overrides if tokenizer else options.generator_overrides
        words = [f"--config={file}"]
        if not torch.cuda.is_available() and not multiplies_bfloat16():
            words.append("--run.mixed_precision=no")
        words += [f"--{entry}" for entry in (*given, *overrides)]
        words.append(f"--run.dir={self.out / kind}")
        return parse_run(TokenizerRun if tokenizer else GeneratorRun, words, "quickstart")

    def _limits(self, run: Any, stage: str) -> tuple[str, ...]:
        """Overrides that keep a training within its steps and its share of the time."""
        seconds = self.clock.allowance(stage)
        if stage == "vq":  # as many steps as the tokenizer it is compared with, so at least as much time
            seconds = max(seconds, self.clock.seconds["tokenizer"])
        minutes = seconds * _TRAINING_SHARE / 60
        return (f"run.steps={self._steps(run)}", f"run.max_minutes={minutes:.4f}")

    @contextmanager
    def _training(self, stage: str, title: str) -> Iterator[None]:
        """A stage, on as many threads as suit the machine at its beginning."""
        with self.clock.stage(stage, title):
            if self.device.type == "cpu":
                self.threads[stage] = use_fastest_threads(self.most_threads)
            yield

    def _steps(self, run: Any) -> int:
        if run.run.steps is None:
            raise ValueError("run.steps: expected a number of steps in a quick start's recipe, got none")
        return max(1, round(run.run.steps * self.options.steps_scale))

    def _train_tokenizer(self, stage: str, title: str, overrides: tuple[str, ...]) -> Path:
        with self._training(stage, title):
            limits = self._limits(self.tokenizer_run, stage)
            return train_tokenizer(self._recipe(stage, (*limits, *overrides)))

    def _train_generator(self, tokenizer: Path) -> Path:
        with self._training("generator", "generator of the IBQ tokenizer's codes"):
            limits = self._limits(self.generator_run, "generator")
            return train_generator(self._recipe("generator", (f"tokenizer={tokenizer}", *limits)))

    def _steps_done(self, stage: str) -> int:
        return int(read_metrics(self.out / stage, "train")[-1]["step"])

    def _images(self, split: str) -> InMemoryImages:
        images = build_dataset(self.tokenizer_run.data, split)  # type: ignore[arg-type]
        if not isinstance(images, InMemoryImages):
            raise ValueError(f"data.kind: expected fashion_mnist, got {self.tokenizer_run.data.kind!r}")
        return images

    def _load(self, folder: Path) -> Tokenizer:
        tokenizer = Tokenizer.from_pretrained(folder, device=self.device).requires_grad_(False)
        return tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _evaluate(self, name: str, model: Tokenizer, images: Tensor) -> TokenizerEvaluation:
        made = evaluate_tokenizer(
            model,
            tensor_source(images, "held-out images"),
            _PROTOCOL,
            self.out / _EVALUATION / name,
            model=name,
        )
        assert made is not None  # there are no other processes
        return made

    def _evaluate_samples(self, samples: Samples, images: Tensor) -> dict[str, float]:
        """The evaluator's figures of the samples, that can be computed."""
        made = evaluate_generator(
            tensor_source(samples.images, "generated images"),
            Reference(tensor_source(images, "held-out images")),
            replace(_PROTOCOL, resolution=images.shape[-1]),
            self.out / _EVALUATION / "generator",
            device=self.device,
        )
        assert made is not None
        return {f"samples_{name}": value for name, value in made["figures"].items() if value is not None}

    def _prepare_folder(self) -> None:
        """Make ``out``, without what an earlier quick start left there."""
        old = [self.out / name for name in _FOLDERS if (self.out / name).exists()]
        if old and not (self.out / _MARK).exists():
            raise FileExistsError(
                f"out: expected a new folder or an earlier quick start's, but {old[0]} exists"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / _MARK).write_text(
            "Folders beside this file belong to the quick start, which replaces them.\n"
        )
        for folder in old:
            shutil.rmtree(folder)

    def _draw(
        self,
        held_out: InMemoryImages,
        shown: Tensor,
        models: dict[str, Tokenizer],
        kept: dict[str, TokenizerEvaluation],
        samples: Samples,
    ) -> None:
        first = shown[:_SHOWN].to(self.device)
        copies = {
            f"{NAMES[k]}, {v.figures['psnr']:.1f} dB": to_uint8(
                models[k].decode(models[k].encode(first))
            ).cpu()
            for k, v in kept.items()
        }
        pictures.reconstructions_picture(self.out / "reconstructions.png", shown[:_SHOWN], copies)
        pictures.samples_picture(
            self.out / "samples.png", samples.images, samples.classes, samples.seen, held_out.classes
        )
        pictures.usage_picture(
            self.out / "usage.png", {NAMES[k]: v.counts for k, v in kept.items()}, len(shown)
        )
        runs = {
            k: {s: read_metrics(self.out / k, s) for s in ("train", "eval")} for k in (*kept, "generator")
        }
        pictures.curves_picture(self.out / "curves.png", {NAMES[k]: runs[k] for k in kept}, runs["generator"])

    def _report(
        self,
        train: InMemoryImages,
        shown: Tensor,
        kept: dict[str, TokenizerEvaluation],
        by_class: list[float],
        figures: dict[str, float],
    ) -> dict[str, Any]:
        targets = judge(figures)
        steps = {k: self._steps_done(k) for k in (*kept, "generator")}
        recipes = {"generator": self.generator_run}
        planned = {k: self._steps(recipes.get(k, self.tokenizer_run)) for k in steps}
        return {
            "met": all(target["met"] for target in targets),
            "targets": targets,
            "figures": figures,
            "tokenizers": {NAMES[k]: v.figures for k, v in kept.items()},
            "recognised_by_class": dict(zip(train.classes, by_class, strict=True)),
            "seconds": {**self.clock.seconds, "total": self.clock.elapsed},
            "steps": steps,
            "cut_short": [k for k, done in steps.items() if done < planned[k]],
            "parameters": {k: self._parameters(k) for k in (*kept, "generator")},
            "peak_memory_gb": peak_memory_gigabytes(),
            "machine": describe_machine(self.device),
            "threads": self.threads,
            "protocol": {
                "training_images": len(train),
                "held_out_images": len(shown),
                "image_size": list(shown.shape[1:]),
                "samples": self.options.samples_per_class * len(train.classes),
                "sampling": vars(self.generator_run.sample),
                "mixed_precision": self.tokenizer_run.run.mixed_precision,
                "seed": self.options.seed,
                "steps_scale": self.options.steps_scale,
                "evaluation": kept["tokenizer"].report["protocol"],
            },
        }

    def _parameters(self, stage: str) -> int:
        kind: Any = Generator if stage == "generator" else Tokenizer
        folder = self.out / stage / ("generator" if stage == "generator" else "tokenizer")
        module: nn.Module = kind.from_pretrained(folder)
        return sum(parameter.numel() for parameter in module.parameters())
