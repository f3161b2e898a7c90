"""``python -m ibq_fast.quickstart``: trained models, pictures and a report from embedded real images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ibq_fast.quickstart.options import Options

DESCRIPTION = """\
Train an IBQ tokenizer, plain vector quantization under the same budget, and a generator on photographs of
garments that come with the package; sample every class; measure and draw it all. Minutes on two cores; uses a
CUDA GPU where there is one.

writes to OUT:
  report.md, report.json   figures, times, protocol, machine
  reconstructions.png      held-out images above their reconstructions
  samples.png              generated images, a row per class
  evaluation/              what was measured of each model: reports of ibq-fast evaluate
  usage.png, curves.png    how often each code is used; how training went
  tokenizer/, vq/, generator/
                           the runs; models for from_pretrained: tokenizer/tokenizer, generator/generator
"""

EXAMPLES = """\
examples:
  python -m ibq_fast.quickstart --out runs/quickstart
  python -m ibq_fast.quickstart --tokenizer optim.lr=1e-3 --tokenizer model.quantizer.logit_scale=2 --skip-vq
  python -m ibq_fast.quickstart --steps-scale 0.01 --out /tmp/try   seconds; shows only that all runs

exit codes: 0 finished; 1 stopped by an error, or below target with --strict; 2 wrong arguments;
130, 143 stopped by a signal
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = build_parser().parse_args(arguments)
    strict = given.strict
    values = {name: value for name, value in vars(given).items() if name != "strict"}
    values["tokenizer_overrides"] = tuple(values["tokenizer_overrides"])
    values["generator_overrides"] = tuple(values["generator_overrides"])
    try:
        return _run(Options(**values), strict)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m ibq_fast.quickstart``."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m ibq_fast.quickstart",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=default.out, metavar="FOLDER", help=f"default {default.out}")
    add("--tokenizer-config", type=Path, default=default.tokenizer_config, metavar="YAML", help="its recipe")
    add("--generator-config", type=Path, default=default.generator_config, metavar="YAML", help="its recipe")
    for name in ("tokenizer", "generator"):
        add(
            f"--{name}",
            action="append",
            default=[],
            dest=f"{name}_overrides",
            metavar="KEY=VALUE",
            help=f"set a field of the {name}'s recipe; may be given more than once",
        )
    add("--skip-vq", action="store_true", help="leave out the comparison with plain vector quantization")
    add("--steps-scale", type=float, default=default.steps_scale, help="factor on every training's steps")
    add(
        "--max-minutes",
        type=float,
        default=default.max_minutes,
        help=f"end trainings early rather than take longer (default {default.max_minutes:g})",
    )
    add("--samples-per-class", type=int, default=default.samples_per_class, help="default %(default)s")
    add(
        "--held-out",
        type=int,
        default=default.held_out,
        help="held-out images to measure on (default %(default)s)",
    )
    add("--seed", type=int, default=default.seed, help="of samples and classifier (default %(default)s)")
    add("--strict", action="store_true", help="exit with 1 when a figure is below its target")
    return parser


def _run(options: Options, strict: bool) -> int:
    # Heavy imports wait until the arguments are known to be right.
    from ibq_fast.quickstart.freed_memory import keep_freed_memory
    from ibq_fast.quickstart.pipeline import run_quickstart
    from ibq_fast.quickstart.report import summary
    from ibq_fast.train.errors import TrainingInterrupted

    keep_freed_memory()
    try:
        report = run_quickstart(options)
    except TrainingInterrupted as stopped:
        return int(stopped.code or 0)
    sys.stderr.write(f"{summary(report)}\n  report: {options.out / 'report.md'}\n")
    return 1 if strict and not report["met"] else 0


if __name__ == "__main__":
    sys.exit(main())
