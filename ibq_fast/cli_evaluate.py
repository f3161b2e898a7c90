"""``ibq-fast evaluate``: its arguments, and what they are handed to. Heavy imports wait."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DESCRIPTION = "Measure a tokenizer or a generator by a named protocol, or compare two reports."
EXAMPLES = """\
examples:
  ibq-fast evaluate tokenizer --tokenizer runs/tok/tokenizer --out out fashion_mnist
  ibq-fast evaluate generator --samples samples.npz --reference photos/ --out out
  ibq-fast evaluate compare out/a out/b

ibq-fast evaluate tokenizer|generator|compare --help explains each.
"""
TOKENIZER_EXAMPLES = """\
IMAGES: image files, folders searched through, one .npz file with uint8 images arr_0 [N, H, W, 3], or
fashion_mnist, the 2,000 held-out images that come with the package.

writes to OUT:
  report.json, report.md  figures, what is missing and why, the protocol, hashes, versions
  reconstructions.png     originals above their reconstructions; worst.png, best.png: by PSNR
  usage.png, codebook.png how often each code was used; the codebook's map, coloured by use
  reference_TRUNK.npz     the originals' statistics under each trunk

LPIPS and rFID need weights that are downloads: give them by path, or --fetch them. Without them the other
figures are computed. The Fréchet distance under EfficientNet-Lite0 needs none; it is not FID.

An evaluation that was interrupted goes on when it is started again. Several processes:
  torchrun --nproc-per-node=2 -m ibq_fast.evaluate tokenizer ...

examples:
  ibq-fast evaluate tokenizer --tokenizer runs/tok/tokenizer --out out fashion_mnist
  ibq-fast evaluate tokenizer --tokenizer runs/tok/tokenizer --out out --trunk efficientnet_lite0 photos/
  ibq-fast evaluate tokenizer --tokenizer imagenet256.ckpt --protocol reference-256 --fetch --out out val/
"""
GENERATOR_EXAMPLES = """\
SAMPLES: a folder of image files, or an .npz file with uint8 images arr_0 [N, H, W, 3], all of one size.
REFERENCE: image files, folders, an .npz file of images, an .npz file of statistics (mu, sigma, mu_s, sigma_s;
such as this command writes, or ADM's reference batches), or fashion_mnist.

writes to OUT:
  report.json, report.md  figures, what is missing and why, the protocol, hashes, versions
  samples.png             the first samples
  reference_TRUNK.npz     the reference's statistics under each trunk, which --reference takes

An evaluation that was interrupted goes on when it is started again. Several processes:
  torchrun --nproc-per-node=2 -m ibq_fast.evaluate generator ...

examples:
  ibq-fast evaluate generator --samples out/samples --reference photos/ --out report
  ibq-fast evaluate generator --samples s.npz --reference VIRTUAL_imagenet256_labeled.npz \\
    --protocol adm-256 --fetch --out report
  ibq-fast evaluate generator --generator runs/gen/generator --tokenizer runs/tok/tokenizer --count 500 \\
    --reference fashion_mnist --out report
"""
COMPARE_EXAMPLES = """\
A, B: report.json files, or the folders that they are in. Differences of protocol, networks, images or
reference are warned of; with --strict they are an error.

examples:
  ibq-fast evaluate compare out/a out/b
"""

Make = Callable[..., argparse.ArgumentParser]


def add_evaluate(commands: Any, manual: Make) -> None:
    """Add the command to a parser's ``commands``; ``manual`` makes parsers in the house's format."""
    evaluate = manual(
        commands.add_parser,
        "evaluate",
        usage="ibq-fast evaluate tokenizer|generator|compare [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    kinds = evaluate.add_subparsers(dest="kind", metavar="KIND", required=True, help=argparse.SUPPRESS)

    tokenizer = manual(
        kinds.add_parser,
        "tokenizer",
        usage="ibq-fast evaluate tokenizer --tokenizer MODEL --out FOLDER [options] IMAGES ...",
        description="Images through a tokenizer and back: rFID, LPIPS, PSNR, SSIM, L1, code use.",
        epilog=TOKENIZER_EXAMPLES,
    )
    tokenizer.add_argument("images", nargs="+", help="see below")
    tokenizer.add_argument("--tokenizer", required=True, help="directory, hub id or .ckpt")
    tokenizer.add_argument(
        "--live", action="store_true", help="the live weights of a .ckpt, not the averaged ones"
    )
    tokenizer.add_argument("--lpips", help="alex, vgg, both with a comma (default), or none")
    tokenizer.set_defaults(run=_tokenizer)

    generator = manual(
        kinds.add_parser,
        "generator",
        usage="ibq-fast evaluate generator --samples SAMPLES --reference REFERENCE ... --out FOLDER\n"
        "       ibq-fast evaluate generator --generator MODEL --tokenizer MODEL --count N --reference ...",
        description="Generated images against a reference: gFID, sFID, Inception Score, precision, recall.",
        epilog=GENERATOR_EXAMPLES,
    )
    which = generator.add_mutually_exclusive_group(required=True)
    which.add_argument("--samples", type=Path, help="images to measure")
    which.add_argument("--generator", help="model to draw them from: directory, hub id or .ckpt")
    generator.add_argument("--tokenizer", help="the tokenizer that the generator was trained with")
    generator.add_argument("--count", type=int, default=50_000, help="images to draw (default 50000)")
    generator.add_argument("--reference", nargs="+", required=True, help="what to compare them with")
    for name, default in (("cfg-scale", 2.0), ("temperature", 1.0), ("top-p", 1.0)):
        generator.add_argument(
            f"--{name}", type=float, default=default, help=f"of sampling (default {default:g})"
        )
    generator.add_argument("--top-k", type=int, default=0, help="of sampling; 0 is all (default)")
    generator.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    generator.set_defaults(run=_generator)

    for command, weights in (
        (tokenizer, ("inception", "lpips-alex", "lpips-vgg")),
        (generator, ("inception",)),
    ):
        add = command.add_argument
        add("--out", type=Path, required=True, help="folder for what is written")
        add("--protocol", default="uint8-bicubic", help="uint8-bicubic (default), reference-256 or adm-256")
        add("--resolution", type=int, help="side in pixels (default: the protocol's, or the images')")
        add("--resize", help="bicubic-antialiased, bilinear-antialiased, bilinear-opencv or none")
        add("--trunk", action="append", help="inception, efficientnet_lite0 or none; may be given twice")
        for name in weights:
            add(f"--{name}", type=Path, metavar="PATH", help="file of its weights")
        add(
            "--fetch",
            action="store_true",
            help="download weights that are neither given nor in torch's cache",
        )
        add("--batch-size", type=int, default=32, help="images at a time: 16, 32 (default), 48 or 64")
        add("--decode-threads", type=int, default=2, help="threads that read image files (default 2)")
        add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, npu, …")

    compare = manual(
        kinds.add_parser,
        "compare",
        usage="ibq-fast evaluate compare A B [--strict]",
        description="Two reports side by side.",
        epilog=COMPARE_EXAMPLES,
    )
    compare.add_argument("a", type=Path, help="first report")
    compare.add_argument("b", type=Path, help="second report")
    compare.add_argument("--strict", action="store_true", help="exit with 1 when they should not be compared")
    compare.set_defaults(run=_compare)


def _tokenizer(chosen: argparse.Namespace) -> int:
    from ibq_fast.evaluate.opening import open_images, processes
    from ibq_fast.evaluate.protocols import find_protocol
    from ibq_fast.evaluate.report import summary
    from ibq_fast.evaluate.tokenizer import evaluate_tokenizer
    from ibq_fast.tokenizer import Tokenizer

    changes = {**_changes(chosen), "lpips": _names(chosen.lpips), "weights": "live" if chosen.live else None}
    protocol = find_protocol(chosen.protocol, **changes)
    with processes(chosen.device) as device:
        model = Tokenizer.from_pretrained(chosen.tokenizer, ema=not chosen.live, device=device)
        side = protocol.resolution or model.config.resolution
        channels = model.config.image_channels
        source = open_images(chosen.images, side, protocol.resize, channels, chosen.decode_threads)
        made = evaluate_tokenizer(
            model.requires_grad_(False),
            source,
            protocol,
            chosen.out,
            weights=_weights(chosen, "inception", "lpips_alex", "lpips_vgg"),
            model=str(chosen.tokenizer),
            batch_size=chosen.batch_size,
            say=_say,
        )
    if made is not None:
        sys.stdout.write(f"{summary(made.report)}\n{chosen.out / 'report.md'}\n")
    return 0


def _generator(chosen: argparse.Namespace) -> int:
    from dataclasses import replace

    from ibq_fast.evaluate.generated import GeneratedSource, Sampling
    from ibq_fast.evaluate.generator import evaluate_generator
    from ibq_fast.evaluate.opening import open_reference, open_samples, processes
    from ibq_fast.evaluate.protocols import find_protocol
    from ibq_fast.evaluate.report import summary
    from ibq_fast.generator import Generator
    from ibq_fast.tokenizer import Tokenizer

    if chosen.generator is not None and chosen.tokenizer is None:
        raise ValueError("tokenizer: expected the one that the generator was trained with, got none")
    protocol = find_protocol(chosen.protocol, **_changes(chosen))
    with processes(chosen.device) as device:
        samples: Any
        if chosen.samples is not None:
            samples, side = open_samples(chosen.samples, protocol.resolution, chosen.decode_threads)
        else:
            names = ("cfg_scale", "temperature", "top_k", "top_p", "seed")
            sampling = Sampling(**{name: getattr(chosen, name) for name in names})
            generator = Generator.from_pretrained(chosen.generator, device=device).requires_grad_(False)
            tokenizer = Tokenizer.from_pretrained(chosen.tokenizer, device=device).requires_grad_(False)
            samples = GeneratedSource(generator, tokenizer, chosen.count, sampling, chosen.batch_size)
            side = samples.resolution
            if protocol.resolution not in (None, side):
                raise ValueError(f"generator: expected images of {protocol.resolution} pixels, got {side}")
        protocol = replace(protocol, resolution=side)
        reference = open_reference(chosen.reference, protocol, chosen.decode_threads)
        report = evaluate_generator(
            samples,
            reference,
            protocol,
            chosen.out,
            device=device,
            weights=_weights(chosen, "inception"),
            batch_size=chosen.batch_size,
            say=_say,
        )
    if report is not None:
        sys.stdout.write(f"{summary(report)}\n{chosen.out / 'report.md'}\n")
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from ibq_fast.evaluate.report import compare, read_report

    table, warnings = compare(read_report(chosen.a), read_report(chosen.b))
    sys.stdout.write(f"{table}\n")
    if warnings:
        sys.stderr.write("warning: these reports do not measure the same thing (first / second):\n")
        sys.stderr.writelines(f"  {line}\n" for line in warnings)
    return 1 if warnings and chosen.strict else 0


def _changes(chosen: argparse.Namespace) -> dict[str, Any]:
    """Settings of the protocol that the command line changes; None: as it is."""
    trunks = chosen.trunk and tuple(name for name in chosen.trunk if name != "none")
    return {"resolution": chosen.resolution, "resize": chosen.resize, "trunks": trunks}


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name for name in text.split(",") if name != "none")


def _weights(chosen: argparse.Namespace, *names: str) -> Any:
    from ibq_fast.evaluate.trunks import Weights

    paths = {name: path for name in names if (path := getattr(chosen, name)) is not None}
    return Weights(paths, chosen.fetch)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{line}\n")
