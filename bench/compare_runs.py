"""Two tokenizers' runs side by side: curves, reconstructions of held-out images, use of the codes, a table.

    python -m bench.compare_runs IBQ=runs/emoji64_ibq_16384 "plain VQ=runs/emoji64_vq_16384" --out docs/emoji

Each argument is a title and the directory of a finished run; all have the same data. curves.png is drawn from
their metrics.jsonl, over training time: PSNR of held-out images, and the share of the codes that the last
window of training steps used. reconstructions.png has, from top to bottom, held-out images and what every
tokenizer makes of them; usage_N.png how often the N-th tokenizer uses each code. The table on standard output
counts code use by the exported tokenizers over the whole training set, unflipped.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ibq_fast.data import build_loader, to_uint8
from ibq_fast.evaluate import image_grid, psnr, save_png, usage_plot
from ibq_fast.evaluate.usage import CodebookUsage
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train import TokenizerRun, read_metrics
from ibq_fast.train.config import load_config

_COLUMNS = 12


@dataclass(frozen=True)
class Run:
    """A finished run: its title, directory, settings and exported tokenizer."""

    title: str
    folder: Path
    config: TokenizerRun
    tokenizer: Tokenizer

    @staticmethod
    def of(argument: str) -> Run:
        """From ``title=directory``. Raises ValueError where it is something else."""
        title, _, folder = argument.partition("=")
        if not title or not folder:
            raise ValueError(f"run: expected title=directory, got {argument!r}")
        config = load_config(TokenizerRun, Path(folder) / "config.yaml")
        tokenizer = Tokenizer.from_pretrained(str(Path(folder) / "tokenizer")).eval()
        return Run(title, Path(folder), config, tokenizer)


def compare(runs: list[Run], out: Path) -> str:
    """Write the pictures into ``out``; the table as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    curves(runs, out / "curves.png")
    shown: list[Tensor] = []
    lines = [
        "| | steps | images seen | PSNR, held out | codes in use, training set | perplexity | codes in use, "
        "held out |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for number, run in enumerate(runs, 1):
        quality, held_out, pairs = reconstructions(run)
        shown += pairs if number == 1 else pairs[1:]
        usage = code_use(run)
        usage_plot(usage.counts, out / f"usage_{number}.png", run.title)
        steps = int(read_metrics(run.folder, "train")[-1]["step"])
        found = usage.figures()
        lines.append(
            f"| {run.title} | {steps:,} | {steps * run.config.data.batch_size:,} | {quality:.2f} dB "
            f"| {found['utilisation']:.1%} | {found['perplexity']:,.0f} "
            f"| {held_out.figures()['utilisation']:.1%} |"
        )
    save_png(image_grid(torch.cat(shown), _COLUMNS), out / "reconstructions.png")
    return "\n".join(lines)


@torch.no_grad()
def reconstructions(run: Run) -> tuple[float, CodebookUsage, list[Tensor]]:
    """Of the held-out images: mean PSNR, code use, and evenly spread ones beside their reconstructions."""
    usage = CodebookUsage(run.tokenizer.config.quantizer.codebook_size)
    images, copies = [], []
    for batch in build_loader(run.config.data, "val", seed=0):
        indices = run.tokenizer.encode(batch.images)
        usage.update(indices)
        images.append(batch.images)
        copies.append(to_uint8(run.tokenizer.decode(indices)))
    originals, copied = torch.cat(images), torch.cat(copies)
    chosen = torch.linspace(0, len(originals) - 1, _COLUMNS).long()
    quality = psnr(originals, copied).clamp_max(100.0).mean()
    return float(quality), usage, [originals[chosen], copied[chosen]]


@torch.no_grad()
def code_use(run: Run) -> CodebookUsage:
    """Over the whole training set, each image once and as it is."""
    usage = CodebookUsage(run.tokenizer.config.quantizer.codebook_size)
    data = replace(run.config.data, val_root=run.config.data.root, val_fraction=0.0)
    for batch in build_loader(data, "val", seed=0):
        usage.update(run.tokenizer.encode(batch.images))
    return usage


def curves(runs: list[Run], path: Path) -> None:
    """PSNR on held-out images and utilisation in training, over minutes of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for run in runs:
        for axis, split, key in ((left, "eval", "psnr"), (right, "train", "utilisation")):
            lines = read_metrics(run.folder, split)
            axis.plot([line["time"] / 60 for line in lines], [line[key] for line in lines], label=run.title)
    left.set(xlabel="minutes of training", ylabel="PSNR of held-out images, dB")
    right.set(xlabel="minutes of training", ylabel="share of codes in use, last window", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.compare_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="TITLE=DIRECTORY")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args()
    print(compare([Run.of(run) for run in options.runs], options.out))


if __name__ == "__main__":
    main()
