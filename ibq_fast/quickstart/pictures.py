"""The quick start's pictures, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ibq_fast.evaluate import image_grid

_BLUE, _ORANGE, _GREY, _RED = "#33658a", "#f26419", "#6b7280", "#d62828"
_SCALE = 3  # screen pixels per image pixel
_BORDER = 2


def reconstructions_picture(
    path: Path, originals: Tensor, copies: Mapping[str, Tensor], *, columns: int = 16
) -> None:
    """Bands of ``columns`` images: the originals, below them each named set of copies, uint8 [B, C, H, W]."""
    rows: list[Tensor] = []
    names: list[str] = []
    count = len(originals) // columns * columns or len(originals)
    columns = min(columns, count)
    for start in range(0, count, columns):
        for name, images in {"original": originals, **copies}.items():
            rows.append(images[start : start + columns])
            names.append(name)
    _labelled_rows(path, rows, names, "Held-out images and their reconstructions", group=1 + len(copies))


def samples_picture(
    path: Path, images: Tensor, classes: Tensor, seen: Tensor, names: Sequence[str], *, columns: int = 16
) -> None:
    """A row per class; images in which the classifier saw another class are framed."""
    rows = []
    for c in range(len(names)):
        chosen = (classes == c).nonzero()[:columns, 0]
        rows.append(_framed(images[chosen], seen[chosen] != c))
    title = "Generated images, a class a row; framed: the classifier saw another class"
    _labelled_rows(path, rows, list(names), title)


def usage_picture(path: Path, counts: Mapping[str, Tensor], images: int) -> None:
    """How often each code was used, most used first, for each named tokenizer: int64 [K]."""
    figure, axes = _figure(7.5, 3.6)
    for (name, values), colour in zip(counts.items(), (_BLUE, _ORANGE), strict=False):
        ordered = np.sort(values.numpy())[::-1]
        used = int((ordered > 0).sum())
        axes.step(
            np.arange(len(ordered)),
            ordered,
            where="mid",
            color=colour,
            label=f"{name}: {used} of {len(ordered)} codes used",
        )
        axes.fill_between(np.arange(len(ordered)), ordered, step="mid", color=colour, alpha=0.25)
    axes.set_yscale("symlog", linthresh=1)
    axes.set(
        xlabel="code, most used first", ylabel="times used", title=f"Code use on {images:,} held-out images"
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def curves_picture(
    path: Path, tokenizers: Mapping[str, Mapping[str, Any]], generator: Mapping[str, Any]
) -> None:
    """How training went: each run's entries of ``metrics.jsonl`` under ``"train"`` and ``"eval"``."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    for (name, run), colour in zip(tokenizers.items(), (_BLUE, _ORANGE), strict=False):
        _line(panels[0], run["eval"], "psnr", colour, name)
        _line(panels[1], run["train"], "utilisation", colour, name)
    panels[0].set(title="PSNR on held-out images", xlabel="step", ylabel="dB")
    panels[1].set(title="Share of codes in use while training", xlabel="step", ylim=(0, 1.02))
    _line(panels[2], generator["train"], "loss", _GREY, "training")
    _line(panels[2], generator["eval"], "loss", _BLUE, "held out")
    panels[2].set(title="Generator's loss", xlabel="step", ylabel="nats per token")
    for panel in panels:
        panel.grid(alpha=0.2)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _line(axes: Any, entries: Sequence[Mapping[str, float]], figure: str, colour: str, label: str) -> None:
    points = [(entry["step"], entry[figure]) for entry in entries if figure in entry]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, values, color=colour, label=label, marker="o" if len(points) < 12 else None, markersize=3
        )


def _labelled_rows(
    path: Path, rows: Sequence[Tensor], names: Sequence[str], title: str, group: int = 1
) -> None:
    """Rows of images of equal size, each with its name at the left; a gap after every ``group`` rows."""
    columns = max(len(row) for row in rows)
    height, width = rows[0].shape[2:]
    label_width, gap = 1.5, 0.10 if group > 1 else 0.0
    inches = _SCALE / 100
    row_height, row_width = (height + _BORDER) * inches, columns * (width + _BORDER) * inches
    total_height = len(rows) * row_height + (len(rows) - 1) // group * gap + 0.42
    figure = Figure(figsize=(label_width + row_width + 0.1, total_height))
    FigureCanvasAgg(figure)
    figure.text(0.05 / figure.get_figwidth(), 1 - 0.27 / total_height, title, fontsize=10, weight="bold")
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        bottom = total_height - 0.40 - (i + 1) * row_height - i // group * gap
        size = (
            label_width / figure.get_figwidth(),
            bottom / total_height,
            len(row) * (width + _BORDER) * inches / figure.get_figwidth(),
            row_height / total_height,
        )
        axes = figure.add_axes(size)
        axes.imshow(
            image_grid(row, len(row)).permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto"
        )
        axes.set_axis_off()
        figure.text(
            (label_width - 0.08) / figure.get_figwidth(),
            (bottom + row_height / 2) / total_height,
            name,
            ha="right",
            va="center",
            fontsize=8,
        )
    figure.savefig(path, dpi=100)


def _framed(images: Tensor, marked: Tensor) -> Tensor:
    """Images in three channels, those ``marked`` [B] with a coloured edge."""
    images = images.expand(-1, 3, -1, -1).clone()
    colour = torch.tensor([int(_RED[i : i + 2], 16) for i in (1, 3, 5)], dtype=torch.uint8)[:, None]
    for image, mark in zip(images, marked.tolist(), strict=True):
        if mark:
            for edge in (image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]):
                edge[:] = colour
    return images


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
