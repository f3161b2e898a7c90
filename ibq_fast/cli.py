"""The ``ibq-fast`` command. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ibq_fast.generator import SamplingSettings

from ibq_fast.cli_evaluate import add_evaluate

USAGE = "ibq-fast COMMAND [options]"
DESCRIPTION = """\
Image tokenizers with huge codebooks: train them, look at what they keep, generate with them.

commands:
  train        train a tokenizer or a generator from a YAML config
  reconstruct  images through a tokenizer and back: a picture grid, PSNR, code usage
  sample       images of chosen classes from a generator
  evaluate     figures of a tokenizer or a generator by a named protocol, with a report
  convert      checkpoints of the published implementation in and out
  doctor       what is installed, which kernels are used and why
"""

EXAMPLES = """\
examples:
  ibq-fast doctor
  ibq-fast train tokenizer --config configs/quickstart_tokenizer.yaml --run.dir=runs/tok
  ibq-fast train generator --config configs/quickstart_generator.yaml --tokenizer=runs/tok/tokenizer
  ibq-fast reconstruct --tokenizer runs/tok/tokenizer --out out photos/
  ibq-fast sample --tokenizer runs/tok/tokenizer --generator runs/gen/generator --classes 0-9 --out out
  ibq-fast evaluate tokenizer --tokenizer runs/tok/tokenizer --out out fashion_mnist
  ibq-fast convert imagenet256_16384.ckpt models/tokenizer

ibq-fast COMMAND --help explains a command. A model is named by the directory that training wrote, a
Hugging Face hub id, or a checkpoint file of the published implementation (.ckpt).
"""

RECONSTRUCT_EXAMPLES = """\
writes to OUT:
  reconstructions.png   originals above their reconstructions (the first --columns × 4)
  usage.png             how often each code was used
  report.json           images, PSNR (mean over images, on uint8), codes used, utilisation, perplexity

examples:
  ibq-fast reconstruct --tokenizer runs/tok/tokenizer --out out photos/
  ibq-fast reconstruct --tokenizer model.ckpt --resolution 256 --out out a.jpg b.png
"""

SAMPLE_EXAMPLES = """\
writes to OUT:
  class0003_00001.png   image 1 of class 3
  grid.png              a row per class
  run.json              the settings
  samples.npz           with --npz: arr_0 uint8 [N, H, W, 3] for the ADM suite's evaluator

Image i of a run depends on the seed and on i alone: not on the batch size, nor on the number of processes.
A run that was stopped, by kill -9 too, goes on when the same command is given again; other settings are
refused.
Under torchrun the processes share the images.

examples:
  ibq-fast sample --tokenizer runs/tok/tokenizer --generator runs/gen/generator --out out
  ibq-fast sample --tokenizer T --generator G --classes 3,7,20-25 --per-class 4 --cfg-scale 2.25 --out out
  ibq-fast sample --tokenizer T --generator G --top-k 1 --cfg-scale 1 --out out      greedy, no guidance
  ibq-fast sample --tokenizer T --generator G --classes none --per-class 16 --out out       unconditional
  ibq-fast sample --tokenizer T --generator G --cfg-scale 4 --cfg-schedule power-cosine --out out
  torchrun --nproc-per-node 2 -m ibq_fast.cli sample --tokenizer T --generator G \\
    --preset B --per-class 50 --precision bf16 --npz --out out
"""


CONVERT_EXAMPLES = """\
SOURCE is a checkpoint of the published implementation (.ckpt), a model's directory, a run's directory or one
of its checkpoints, or a hub id. Into the own format it becomes a directory that from_pretrained loads, with
whatever training state it had (live and averaged weights, discriminator, optimizers) in checkpoints/ below
it: a run can start from that (--run.init_from), and the published file can be written from it again.

Not carried over: loop counters, callbacks and schedulers of the published framework, the optimizer state of
generators, and, on the way out, LeCam's averages and random states.

examples:
  ibq-fast convert imagenet256_16384.ckpt models/tokenizer
  ibq-fast convert AR_256_B.ckpt models/generator --num-heads 16
  ibq-fast convert AR_256_B.ckpt models/its_tokenizer --kind tokenizer
  ibq-fast convert runs/tok tokenizer.ckpt --to reference
  ibq-fast convert runs/gen generator.ckpt --to reference --first-stage runs/tok/tokenizer
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``ibq-fast`` command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:  # jsonargparse owns everything behind it
        from ibq_fast.train.__main__ import main as train

        return train(words[1:], prog="ibq-fast train")
    parser = build_parser()
    chosen = parser.parse_args(words)
    if chosen.command is None:
        parser.print_help()
        return 2
    run: Callable[[argparse.Namespace], int] = chosen.run
    try:
        return run(chosen)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ibq-fast``."""
    parser = _manual(
        argparse.ArgumentParser, prog="ibq-fast", usage=USAGE, description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="COMMAND", help=argparse.SUPPRESS
    )
    _manual(commands.add_parser, "train", description="Train a tokenizer or a generator.", add_help=False)

    reconstruct = _manual(
        commands.add_parser,
        "reconstruct",
        usage="ibq-fast reconstruct --tokenizer MODEL --out FOLDER [options] IMAGE_OR_FOLDER ...",
        description="Encode images, decode them again, and say what was lost.",
        epilog=RECONSTRUCT_EXAMPLES,
    )
    reconstruct.add_argument("images", nargs="+", type=Path, help="image files, or folders searched through")
    reconstruct.add_argument("--tokenizer", required=True, help="directory, hub id or .ckpt")
    reconstruct.add_argument("--resolution", type=int, help="side in pixels (default: the tokenizer's)")
    reconstruct.add_argument("--columns", type=int, default=8, help="images in a row of the grid (default 8)")
    reconstruct.set_defaults(run=_reconstruct)

    sample = _manual(
        commands.add_parser,
        "sample",
        usage="ibq-fast sample --generator MODEL --tokenizer MODEL --out FOLDER [options]",
        description="Draw images of chosen classes.",
        epilog=SAMPLE_EXAMPLES,
    )
    sample.add_argument("--generator", required=True, help="directory, hub id or .ckpt")
    sample.add_argument("--tokenizer", required=True, help="the tokenizer it was trained with")
    add = sample.add_argument
    add("--classes", default="all", help="all (default), none (unconditional), or a list such as 3,7,20-25")
    add("--per-class", type=int, default=8, help="images of each class (default 8)")
    add(
        "--preset",
        choices=("B", "L", "XL", "XXL"),
        help="guidance, temperature, top-k and top-p published for a size; what is given besides goes first",
    )
    add("--cfg-scale", type=float, help="guidance; 1 is none (default 2)")
    add(
        "--cfg-schedule",
        choices=("constant", "interval", "linear", "power-cosine"),
        default="constant",
        help="how guidance changes over the positions of an image (default constant)",
    )
    add(
        "--cfg-interval",
        type=float,
        nargs=2,
        metavar=("START", "STOP"),
        default=(0.0, 1.0),
        help="with interval: the shares of the positions between which images are guided",
    )
    add("--cfg-power", type=float, default=1.0, help="with power-cosine: the larger, the later (default 1)")
    add("--temperature", type=float, help="default 1")
    add("--top-k", type=int, help="keep the k likeliest codes; 0 is all (default)")
    add("--top-p", type=float, help="keep this share of probability (default 1)")
    add("--seed", type=int, default=0, help="default 0")
    add(
        "--precision",
        choices=("float32", "bf16", "int8"),
        help="of the generator's weights while decoding (default: the model's)",
    )
    add("--npz", action="store_true", help="write samples.npz when all images are there")
    sample.set_defaults(run=_sample)

    for command in (reconstruct, sample):
        command.add_argument("--out", type=Path, required=True, help="folder for what is written")
        command.add_argument("--batch-size", type=int, default=16, help="images at a time (default 16)")
        command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, npu, …")

    add_evaluate(commands, _manual)

    convert = _manual(
        commands.add_parser,
        "convert",
        usage="ibq-fast convert SOURCE DESTINATION [--to own|reference] [--ema|--live] [options]",
        description="Convert a model between the own format and the published implementation's checkpoints.",
        epilog=CONVERT_EXAMPLES,
    )
    convert.add_argument("source", help="what to convert")
    convert.add_argument("destination", type=Path, help="directory (own) or file (reference) to make")
    convert.add_argument("--to", choices=("own", "reference"), default="own", help="format (default own)")
    one_set = convert.add_mutually_exclusive_group()
    for name, meaning in (("ema", "averaged"), ("live", "live")):
        text = f"keep the {meaning} weights alone (default: everything; averaged weights are the model's)"
        one_set.add_argument(f"--{name}", dest="weights", action="store_const", const=name, help=text)
    convert.add_argument(
        "--kind",
        choices=("tokenizer", "generator"),
        help="default: what the source is; tokenizer takes the first stage of a published generator",
    )
    convert.add_argument("--num-heads", type=int, help="of a published generator (default: width / 64)")
    convert.add_argument("--grid", type=int, help="side of a published generator's tokens (default 16)")
    convert.add_argument("--resolution", type=int, help="a published tokenizer's, in pixels (default 256)")
    convert.add_argument("--first-stage", help="tokenizer to put into a published generator's file")
    convert.add_argument("--force", action="store_true", help="replace what is at DESTINATION")
    convert.set_defaults(run=_convert)

    doctor = _manual(
        commands.add_parser,
        "doctor",
        usage="ibq-fast doctor",
        description="Versions, the compiled extension and the instruction set it chose, devices, and for\n"
        "every op the backends that are available, the one that is used, and why. Ends with exit code 0.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _manual(
    make: Callable[..., argparse.ArgumentParser], *names: str, **options: object
) -> argparse.ArgumentParser:
    return make(*names, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def _reconstruct(chosen: argparse.Namespace) -> int:
    from ibq_fast.evaluate.reconstruct import reconstruct

    report = reconstruct(
        chosen.images,
        chosen.tokenizer,
        chosen.out,
        resolution=chosen.resolution,
        columns=chosen.columns,
        batch_size=chosen.batch_size,
        device=chosen.device,
    )
    for path, reason in report["unreadable"]:
        sys.stderr.write(f"not read: {path}: {reason}\n")
    sys.stdout.write(
        f"{report['images']} images  PSNR {report['psnr']:.2f} dB  codes used {report['codes_used']} of "
        f"{report['codebook_size']} ({report['utilisation']:.1%})\n{chosen.out / 'reconstructions.png'}\n"
    )
    return 0


def _sample(chosen: argparse.Namespace) -> int:
    from ibq_fast.evaluate.sample import Share, sample

    share = Share.of_environment()
    written = sample(
        chosen.generator,
        chosen.tokenizer,
        chosen.out,
        classes=chosen.classes,
        per_class=chosen.per_class,
        settings=_sampling_settings(chosen),
        seed=chosen.seed,
        precision=chosen.precision,
        batch_size=chosen.batch_size,
        device=chosen.device,
        npz=chosen.npz,
        share=share,
    )
    if share.rank == 0:
        sys.stdout.write(f"{len(written)} images and {chosen.out / 'grid.png'}\n")
    return 0


def _sampling_settings(chosen: argparse.Namespace) -> SamplingSettings:
    """The preset's settings, or the defaults, with what was given besides in their place."""
    from ibq_fast.evaluate.sample import DEFAULT_SETTINGS
    from ibq_fast.generator import PRESETS, Guidance, SamplingSettings

    base = PRESETS[chosen.preset] if chosen.preset else DEFAULT_SETTINGS
    assert base.guidance is not None

    def given(name: str) -> Any:
        return getattr(base, name) if getattr(chosen, name) is None else getattr(chosen, name)

    scale = base.guidance.scale if chosen.cfg_scale is None else chosen.cfg_scale
    start, stop = chosen.cfg_interval
    return SamplingSettings(
        Guidance(scale, chosen.cfg_schedule, start, stop, chosen.cfg_power),
        given("temperature"),
        given("top_k"),
        given("top_p"),
    )


def _convert(chosen: argparse.Namespace) -> int:
    from ibq_fast.checkpoint.convert import convert

    given = {name: getattr(chosen, name) for name in ("num_heads", "grid", "resolution")}
    made = convert(
        chosen.source,
        chosen.destination,
        to=chosen.to,
        weights=chosen.weights,
        kind=chosen.kind,
        first_stage=chosen.first_stage,
        force=chosen.force,
        say=_to_stderr,
        **{name: value for name, value in given.items() if value is not None},
    )
    sys.stdout.write(f"{made}\n")
    return 0


def _doctor(chosen: argparse.Namespace) -> int:
    from ibq_fast.doctor import report

    sys.stdout.write(report())
    return 0


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _version() -> str:
    from ibq_fast import __version__

    return f"ibq-fast {__version__}"


if __name__ == "__main__":
    sys.exit(main())
