"""One small tokenizer under every choice that decides whether its codebook collapses, at two code dimensions.

    python -m bench.collapse                                      everything: choices × dimensions
    python -m bench.collapse --only euclidean_kmeans --dim 256
    python -m bench.collapse --list
    python -m bench.collapse --draw                               plot and table from what was measured so far

Every run has the same encoder, decoder, images (embedded Fashion-MNIST, 32 px, 8 × 8 tokens), losses,
optimizer, seed and number of steps. Its evaluations on held-out images go to bench/results/collapse.csv in
the place of earlier ones of the same choice and dimension: it can be made in parts. Each call ends with
drawing.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT
from ibq_fast.data import DataConfig
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import LossConfig, TokenizerConfig
from ibq_fast.train import OptimConfig, RunConfig, ScheduleConfig, TokenizerRun, read_metrics, train_tokenizer

RESULTS = ROOT / "bench" / "results" / "collapse.csv"
PAGE = ROOT / "docs" / "collapse.md"
PLOT = ROOT / "docs" / "collapse" / "curves.png"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLUMNS = (
    "choice", "dim", "codes", "seconds", "step", "psnr", "utilisation", "perplexity",
    "logit_scale", "logit_spread", "saturated", "threads", "date",
)  # fmt: skip
DIMS = (32, 256)


@dataclass(frozen=True)
class Choice:
    """What is varied: fields of QuantizerConfig, and what a reader should call it."""

    title: str
    quantizer: dict[str, Any] = field(default_factory=dict)


# A temperature T of the straight-through softmax alone: scale 1/T and entropies at τ/T.
CHOICES: dict[str, Choice] = {
    "reference": Choice("dot product, codes N(0, 1): the published recipe"),
    "dot_scaled": Choice("dot product, codes N(0, 1/D)", {"init": "scaled"}),
    "dot_features": Choice("dot product, codes from features", {"init": "features"}),
    "dot_kmeans": Choice("dot product, codes by k-means", {"init": "kmeans", "init_batches": 8}),
    "dot_inverse_sqrt": Choice("dot product, scale 1/√D", {"logit_scale_kind": "inverse_sqrt_dim"}),
    "dot_learned": Choice("dot product, learned scale", {"logit_scale_kind": "learned"}),
    "dot_temperature_4": Choice(
        "dot product, straight-through temperature 4", {"logit_scale": 0.25, "entropy_temperature": 0.0025}
    ),
    "cosine_10": Choice(
        "cosine, scale 10", {"similarity": "cosine", "logit_scale": 10.0, "init": "features"}
    ),
    "cosine_learned": Choice(
        "cosine, learned scale from 10",
        {"similarity": "cosine", "logit_scale": 10.0, "logit_scale_kind": "learned", "init": "features"},
    ),
    "euclidean_normal": Choice("Euclidean, codes N(0, 1)", {"similarity": "euclidean"}),
    "euclidean_features": Choice(
        "Euclidean, codes from features", {"similarity": "euclidean", "init": "features"}
    ),
    "euclidean_kmeans": Choice(
        "Euclidean, codes by k-means", {"similarity": "euclidean", "init": "kmeans", "init_batches": 8}
    ),
    "euclidean_inverse_sqrt": Choice(
        "Euclidean, codes by k-means, scale 1/√D",
        {
            "similarity": "euclidean",
            "logit_scale_kind": "inverse_sqrt_dim",
            "init": "kmeans",
            "init_batches": 8,
        },
    ),
    "euclidean_learned": Choice(
        "Euclidean, codes by k-means, learned scale",
        {"similarity": "euclidean", "logit_scale_kind": "learned", "init": "kmeans", "init_batches": 8},
    ),
    "vq": Choice("plain VQ, codes N(0, 1)", {"kind": "vq"}),
    "vq_kmeans": Choice("plain VQ, codes by k-means", {"kind": "vq", "init": "kmeans", "init_batches": 8}),
}


def measure(name: str, dim: int, steps: int, codes: int, threads: int) -> list[dict[str, Any]]:
    """Train under choice ``name`` for ``steps`` and return its rows, one an evaluation."""
    with tempfile.TemporaryDirectory() as scratch:
        run = _run(name, dim, steps, codes, Path(scratch) / "run")
        train_tokenizer(run)
        training = {line["step"]: line for line in read_metrics(Path(run.run.dir), "train")}
        held_out = read_metrics(Path(run.run.dir), "eval")
    rows = []
    for line in held_out:
        logits = training.get(line["step"], {})
        values = {**{key: logits.get(key, "") for key in COLUMNS[8:11]}, **line}
        row = {"choice": name, "dim": dim, "codes": codes, "seconds": line["time"]}
        row |= {key: values[key] for key in COLUMNS[4:11]}
        rows.append({**row, "threads": threads, "date": date.today().isoformat()})
    return rows


def _run(name: str, dim: int, steps: int, codes: int, folder: Path) -> TokenizerRun:
    choice = CHOICES[name].quantizer
    return TokenizerRun(
        run=RunConfig(
            dir=str(folder),
            steps=steps,
            device="cpu",
            log_every=steps // 8,
            eval_every=steps // 8,
            sample_every=0,
            save_every=0,
            eval_batches=8,
            pictures=1,
            usage_window=50,
            tensorboard=False,
        ),
        data=DataConfig(kind="fashion_mnist", resolution=32, channels=1, batch_size=16),
        model=TokenizerConfig(
            image_channels=1,
            resolution=32,
            base_channels=32,
            channel_multipliers=(1, 1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            latent_channels=64,
            quantizer=QuantizerConfig(**{"codebook_size": codes, "dim": dim, **choice}),
        ),
        loss=LossConfig(),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.99), schedule=ScheduleConfig(warmup_steps=20)),
    )


def read() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def keep(rows: list[dict[str, Any]]) -> None:
    """Put ``rows`` in the place of earlier ones of their choice and dimension."""
    done = {(str(row["choice"]), str(row["dim"])) for row in rows}
    kept = [row for row in read() if (row["choice"], row["dim"]) not in done]
    temporary = RESULTS.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, *rows])
    os.replace(temporary, RESULTS)


def table(rows: list[dict[str, str]]) -> str:
    """The last evaluation of every run as a Markdown table, best reconstruction first within a dimension."""
    last: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        last[row["choice"], row["dim"]] = row
    lines = [
        "| D | choice | codes in use | perplexity | PSNR | saturated rows | logit scale | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(last.values(), key=lambda row: (int(row["dim"]), -float(row["psnr"]))):
        saturated = f"{float(row['saturated']):.0%}" if row["saturated"] else "–"
        scale = f"{float(row['logit_scale']):.3g}" if row["logit_scale"] else "–"
        lines.append(
            f"| {row['dim']} | {CHOICES[row['choice']].title} | {float(row['utilisation']):.0%} "
            f"| {float(row['perplexity']):.0f} | {float(row['psnr']):.2f} dB | {saturated} | {scale} "
            f"| {row['step']} |"
        )
    return "\n".join(lines)


def draw() -> None:
    """Write the plot, and the table into its place in docs/collapse.md. Nothing without measurements."""
    rows = [row for row in read() if row["choice"] in CHOICES]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dims = sorted({int(row["dim"]) for row in rows})
    figure, axes = plt.subplots(2, len(dims), figsize=(6 * len(dims), 8), squeeze=False, sharex="col")
    for column, dim in enumerate(dims):
        for i, name in enumerate(CHOICES):
            line = [row for row in rows if row["choice"] == name and int(row["dim"]) == dim]
            steps = [int(row["step"]) for row in line]
            for axis, key in zip(axes[:, column], ("psnr", "utilisation"), strict=True):
                style = {"color": plt.get_cmap("tab20")(i % 20), "label": name, "linewidth": 1.5}
                axis.plot(steps, [float(row[key]) for row in line], **style)
        axes[0, column].set(title=f"D = {dim}", ylabel="PSNR, dB")
        axes[1, column].set(xlabel="steps", ylabel="share of codes in use", ylim=(0, 1))
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=100, bbox_inches="tight")
    plt.close(figure)
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    caption = (
        f"{rows[0]['codes']} codes, {rows[0]['threads']} threads, measured {rows[-1]['date']}, on "
        f"held-out images.\n\n![curves](collapse/{PLOT.name})"
    )
    PAGE.write_text(f"{before}{BEGIN}\n{caption}\n\n{table(rows)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.collapse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of each run, at least 8")
    parser.add_argument("--only", action="append", choices=CHOICES, help="this choice (repeatable)")
    parser.add_argument("--dim", type=int, action="append", help=f"this dimension (default {DIMS})")
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--missing", action="store_true", help="leave out what the CSV already has")
    parser.add_argument("--list", action="store_true", help="name the choices and stop")
    parser.add_argument("--draw", action="store_true", help="draw from the CSV and stop")
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(f"{name:24} {choice.title}" for name, choice in CHOICES.items()))
        return
    if not chosen.draw:
        torch.set_num_threads(chosen.threads)
        have = {(row["choice"], int(row["dim"])) for row in read()} if chosen.missing else set()
        for dim in chosen.dim or DIMS:
            for name in chosen.only or CHOICES:
                if (name, dim) not in have:
                    print(f"{name}, D = {dim}", flush=True)
                    keep(measure(name, dim, chosen.steps, chosen.codes, chosen.threads))
    draw()


if __name__ == "__main__":
    main()
