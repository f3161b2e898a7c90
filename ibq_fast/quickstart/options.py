"""What a quick start is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The recipes live beside the package in a checkout, where people find and change them.
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Options:
    """Settings of :func:`ibq_fast.quickstart.run_quickstart`.

    out: folder for everything that is written; a new one, or one that an earlier quick start made.
    tokenizer_config, generator_config: the recipes, YAML of ``ibq_fast.train``.
    tokenizer_overrides, generator_overrides: ``"section.field=value"``, on top of the recipes.
    skip_vq: leave out the comparison with plain vector quantization.
    steps_scale: factor on the steps of every training; far below 1 only shows that everything runs.
    max_minutes: time for all of it. Where the machine is too slow for the recipe, each training gets its
        share of the minutes and ends early, its learning rate decayed.
    samples_per_class: generated images per class that the classifier judges.
    held_out: images, from the beginning of the held-out set, that reconstruction is measured on.
    seed: of the samples and of the classifier. The trainings have their own (``run.seed``).
    """

    out: Path = Path("runs/quickstart")
    tokenizer_config: Path = CONFIGS / "quickstart_tokenizer.yaml"
    generator_config: Path = CONFIGS / "quickstart_generator.yaml"
    tokenizer_overrides: tuple[str, ...] = ()
    generator_overrides: tuple[str, ...] = ()
    skip_vq: bool = False
    steps_scale: float = 1.0
    max_minutes: float = 8.0
    samples_per_class: int = 50
    held_out: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps_scale", "max_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("samples_per_class", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("tokenizer_overrides", "generator_overrides"):
            for entry in getattr(self, name):
                if "=" not in entry:
                    raise ValueError(f"{name}: expected section.field=value, got {entry!r}")
