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

from jsonargparse import ArgumentParser, Namespace

from ibq_fast.data import DataConfig
from ibq_fast.generator.config import GeneratorConfig
from ibq_fast.tokenizer import LossConfig, TokenizerConfig
from ibq_fast.train.optimizer import OptimConfig
from ibq_fast.train.perceptual import PerceptualName


@dataclass(frozen=True)
class RunConfig:
    """One run: where, how long, how often what.

    dir: everything the run writes goes below it. resume: go on from its newest good checkpoint, if it has
    one. steps, max_minutes: the run ends at whichever comes first; one of them must be set. The minutes
    count what
        earlier parts of a resumed run took, and a decaying learning rate follows the clock where it leads.
    device: ``auto`` takes what accelerate finds; ``cpu``, ``cuda``, ``npu`` insist.
    log_every, eval_every, sample_every, save_every: in steps; 0 is only at the end (log_every: at least 1).
    eval_batches: held-out batches per evaluation. pictures: images in a grid.
    keep_last: checkpoints kept. usage_window: steps over which code utilisation is counted (tokenizer).
    """

    dir: str = "runs/run"
    resume: bool = False
    seed: int = 0
    steps: int | None = None
    max_minutes: float | None = None
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
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


@dataclass(frozen=True)
class TokenizerRun:
    """Stage one: a tokenizer, its data, losses and optimisation. perceptual: the distance of the perceptual
    loss.
    """

    run: RunConfig
    data: DataConfig
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual: PerceptualName = "none"
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class SampleConfig:
    """How the pictures of a generator's run are drawn: guidance, temperature, filters."""

    cfg_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class GeneratorRun:
    """Stage two: a generator over the tokens of a trained tokenizer.

    tokenizer: directory, hub id or reference checkpoint of the tokenizer.
    cache: ``disk`` keeps the encoded data set memory-mapped under the run's directory, ``memory`` in
    memory.
    """

    run: RunConfig
    data: DataConfig
    tokenizer: str
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    cache: Literal["disk", "memory"] = "disk"


C = TypeVar("C", TokenizerRun, GeneratorRun)


def build_parser(
    kind: type[Any], prog: str, description: str = "", epilog: str | None = None
) -> ArgumentParser:
    """The command-line parser of a run: ``--config FILE``, ``--resume`` and every field's dotted name."""
    parser = ArgumentParser(prog=prog, description=description, epilog=epilog, exit_on_error=False)
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
        raise _explained(error, parser, arguments) from error


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
    built = parser.instantiate_classes(values)
    return kind(**{f.name: built[f.name] for f in fields(kind)})


def _explained(error: Exception, parser: ArgumentParser, arguments: Sequence[str]) -> ValueError:
    """The error as one sentence; for an unknown key, with the nearest known one."""
    text = " ".join(str(error.__cause__ or error).split())
    known = sorted(action.dest for action in parser._actions if action.dest)
    match = re.search(
        r"[Kk]ey ['\"]?([\w.]+)['\"]? (?:is )?not expected|[Uu]nrecognized arguments: --([\w.]+)", text
    )
    if match:
        key = match[1] or match[2]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        source = next((a.partition("=")[2] for a in arguments if a.startswith("--config=")), "")
        return ValueError(f"{source + ': ' if source else ''}unknown key {key!r}{hint}")
    return ValueError(text)


def _as_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_as_text, value)) + "]"
    return str(value)
