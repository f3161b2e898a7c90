"""What a run is made of: typed dataclasses, filled from a YAML file and the command line.

Any field can be set as ``--section.field=value``; a key that no dataclass has is refused by name, with the
nearest one that exists.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ibq_fast.data import DataConfig
from ibq_fast.generator.config import GeneratorConfig
from ibq_fast.tokenizer import LossConfig, TokenizerConfig
from ibq_fast.train.optimizer import OptimConfig
from ibq_fast.train.perceptual import PerceptualName


@dataclass(frozen=True)
class RunConfig:
    """One run: where, how long, how often what.

    Args:
        dir: everything the run writes goes below it.
        init_from: weights, averages, discriminator and optimizers to start from, as far as it has them: a
            published checkpoint, a model's directory, a run's directory or checkpoint, or a hub id. Step and
            schedules start at 0. A run that resumes ignores it.
        resume: go on from the newest good checkpoint in dir, if there is one.
        seed: of the weights, the order of the data, dropout.
        steps: optimiser steps after which the run ends; this or max_minutes must be set.
        max_minutes: minutes after which it ends, earlier parts of a resumed run included; with both set, at
            whichever comes first, and a decaying learning rate follows the one that is further on.
        device: auto takes what accelerate finds; cpu, cuda and npu insist.
        peer_timeout: seconds without a sign of life after which another process of a distributed run counts
            as lost and this one stops (0: never).
        collective_minutes: longest wait of one process for another, such as for the encoding of a data set.
        mixed_precision: what matrix products and convolutions are computed in; auto is bf16 on an NPU and
            no (float32) elsewhere.
        compile: torch.compile the convolutions' and attention's parts of the models; the quantizer's kernels
            stay as they are.
        compile_backend: inductor, or another backend of torch.compile.
        channels_last: images and convolutions in channels-last memory format (tokenizer).
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third more
            time.
        codebook_parallel: split a tokenizer's codebook, with its optimizer state and averages, over the
            processes: true over all of them, a number over so many each; false keeps it whole on each. For
            codebooks larger than a device.
        fsdp: spread weights, averages and optimizer state over the processes (generator), for models that do
            not fit one device.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations on held-out data (0: only at the end).
        sample_every: steps between picture grids (0: only at the end).
        save_every: steps between checkpoints (0: only at the end).
        keep_last: checkpoints kept.
        eval_batches: held-out batches per evaluation.
        pictures: images in a grid.
        usage_window: steps over which code utilisation is counted (tokenizer).
        tensorboard: whether to write TensorBoard files beside metrics.jsonl.
    """

    dir: str = "runs/run"
    init_from: str | None = None
    resume: bool = False
    seed: int = 0
    steps: int | None = None
    max_minutes: float | None = None
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    peer_timeout: float = 40.0
    collective_minutes: float = 240.0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    compile_backend: str = "inductor"
    channels_last: bool = False
    activation_checkpointing: bool = False
    codebook_parallel: bool | int = False
    fsdp: bool = False
    log_every: int = 50
    eval_every: int = 1000
    sample_every: int = 1000
    save_every: int = 1000
    keep_last: int = 3
    eval_batches: int = 8
    pictures: int = 16
    usage_window: int = 100
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.max_minutes is None:
            raise ValueError("run.steps: expected a number of steps (or run.max_minutes), got neither")
        for name, least in (
            ("steps", 1),
            ("max_minutes", 0),
            ("peer_timeout", 0),
            ("log_every", 1),
            ("eval_every", 0),
            ("sample_every", 0),
            ("save_every", 0),
            ("keep_last", 1),
            ("eval_batches", 1),
            ("pictures", 1),
            ("usage_window", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"run.{name}: expected at least {least}, got {value}")
        if self.codebook_parallel < 0:
            raise ValueError(
                f"run.codebook_parallel: expected true, false or a number of processes, "
                f"got {self.codebook_parallel}"
            )


@dataclass(frozen=True)
class TokenizerRun:
    """Stage one: a tokenizer.

    Args:
        run: where, how long, how often what.
        data: which images.
        model: the tokenizer.
        loss: weights of the losses.
        perceptual: the distance of the perceptual loss; none leaves it out.
        optim: how weights are updated.
    """

    run: RunConfig
    data: DataConfig
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual: PerceptualName = "none"
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class SampleConfig:
    """How the pictures of a generator's run are drawn.

    Args:
        cfg_scale: classifier-free guidance; 1 is none.
        temperature: of the logits.
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep this share of probability.
    """

    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class GeneratorRun:
    """Stage two: a generator over the tokens of a trained tokenizer.

    Args:
        run: where, how long, how often what.
        data: which images.
        tokenizer: directory, hub id or reference checkpoint of the tokenizer.
        model: the generator.
        input_codes: what embeds tokens: own (drawn at random, trained), or the tokenizer's codebook with a
            projection behind it, trained further (trained) or left as it is (frozen); these need
            model.token_dim, the dimension of the codes.
        optim: how weights are updated.
        sample: how the run's pictures are drawn.
        cache: disk encodes the images once and maps their tokens, memory keeps them in memory; none encodes
            the images of every step anew, cropped and flipped as data says.
        cache_dir: where cached tokens lie; null is tokens under run.dir. Runs with the same tokenizer and
            data may share one.
        cache_crops: squares cached of each training image: the middle one, and others by data.crop; with
            data.flip each of them also mirrored. An epoch shows one of them.
    """

    run: RunConfig
    data: DataConfig
    tokenizer: str
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    input_codes: Literal["own", "trained", "frozen"] = "own"
    cache: Literal["disk", "memory", "none"] = "disk"
    cache_dir: str | None = None
    cache_crops: int = 1

    def __post_init__(self) -> None:
        if self.input_codes != "own" and self.model.token_dim is None:
            raise ValueError(
                f"model.token_dim: expected the dimension of the tokenizer's codes with input_codes "
                f"{self.input_codes}, got none"
            )
        if self.cache_crops < 1:
            raise ValueError(f"cache_crops: expected at least 1, got {self.cache_crops}")
        if self.cache == "none" and self.cache_crops > 1:
            raise ValueError(f"cache_crops: expected 1 without a cache, got {self.cache_crops}")
        if self.cache != "disk" and self.cache_dir is not None:
            raise ValueError(f"cache_dir: expected none with cache {self.cache}, got {self.cache_dir!r}")


C = TypeVar("C", TokenizerRun, GeneratorRun)


def build_parser(kind: type[Any], prog: str, description: str = "") -> ArgumentParser:
    """The command-line parser of a run: ``--config FILE``, ``--resume`` and every field's dotted name."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} --config FILE [--section.field=value ...] [--resume]",
        description=description,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the sections below")
    parser.add_class_arguments(kind, None)
    parser.add_argument("--resume", action="store_true", help="same as --run.resume=true")
    return parser


def parse_run(kind: type[C], arguments: Sequence[str], prog: str = "ibq_fast.train") -> C:
    """A run's config from command-line arguments. Raises ValueError for unknown keys and wrong values."""
    parser = build_parser(kind, prog)
    try:
        values = parser.parse_args(list(arguments))
        return _instantiate(kind, parser, values)
    except Exception as error:
        raise _explained(error, parser) from error


def load_config(kind: type[C], file: str | Path, **overrides: Any) -> C:
    """A run's config from a YAML file; ``overrides`` are ``section__field=value``.

    Raises ValueError as :func:`parse_run`, FileNotFoundError when the file is missing.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"config: expected a YAML file, got {str(file)!r}")
    options: list[str] = [f"--{key.replace('__', '.')}={_as_text(value)}" for key, value in overrides.items()]
    return parse_run(kind, [f"--config={file}", *options])


def dump_config(config: TokenizerRun | GeneratorRun, file: Path) -> None:
    """Write ``config`` as YAML that :func:`load_config` reads back."""
    import yaml

    from ibq_fast.checkpoint.configs import config_to_dict

    file.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


def _instantiate(kind: type[C], parser: ArgumentParser, values: Namespace) -> C:
    if values.pop("resume", False):
        values["run.resume"] = True
    built = parser.instantiate(values)
    return kind(**{f.name: built[f.name] for f in fields(kind)})


# How jsonargparse says that a key does not exist; the last group is the key, the one before it its section.
_UNKNOWN = (
    re.compile(r"()Key ['\"]?([\w.]+)['\"]? is not expected"),
    re.compile(r"()[Uu]nrecognized arguments: --([\w.]+)"),
    re.compile(r"()Option '([\w.]+)' is not accepted"),
    re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'"),
)
_WRONG_TYPE = re.compile(r"Parser key \"([\w.]+)\": Expected an? (.+?)\. Got value: (.*)")


def _explained(error: Exception, parser: ArgumentParser) -> ValueError:
    """The error as one sentence; for an unknown key, with the nearest known one."""
    text = " ".join(str(error.__cause__ or error).split())
    for pattern in _UNKNOWN:
        if match := pattern.search(text):
            key = ".".join(part for part in match.groups() if part)
            known = [action.dest for action in parser._actions if action.dest]
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            return ValueError(f"unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    if match := _WRONG_TYPE.search(text):
        expected = re.sub(r"<class '(\w+)'>|typing\.", r"\1", match[2])
        return ValueError(f"{match[1]}: expected {expected}, got {match[3]}")
    return ValueError(text.replace('Parser key "config": ', "config: "))


def _as_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_as_text, value)) + "]"
    return str(value)
