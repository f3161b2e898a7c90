"""Plots of a run: cost against K and N, memory against K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.log import Row
from bench.results_view import Sizes, curve
from bench.suite import OURS

# One colour a provider in every plot; ours is drawn last and thicker.
_COLOURS = {
    OURS: "#c0392b",
    "eager": "#2c3e50",
    "chunked eager": "#7f8c8d",
    "torch.compile": "#2980b9",
    "matmul+argmax": "#27ae60",
    "matmul": "#95a5a6",
    "faiss IndexFlatIP": "#8e44ad",
}
_TITLES = {"search": "search", "quantizer_step": "training step of the quantizer (training-like)"}


def draw(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Write the plots that ``rows`` have points for; file names with the sentence that describes each."""
    folder.mkdir(parents=True, exist_ok=True)
    kernels = ("search", "quantizer_step")
    wanted: list[tuple[str, str, str, tuple[str, ...], dict[str, int], Callable[[Sizes], int], str]] = [
        ("cost_by_codebook_size.png", "time", "ms", kernels, {"n": 256, "d": 256}, lambda s: s.k, "K"),
        ("cost_by_rows.png", "time", "ms", kernels, {"k": 16384, "d": 256}, lambda s: s.n, "N"),
        (
            "memory_by_codebook_size.png",
            "peak extra memory",
            "MB",
            kernels[1:],
            {"n": 1024, "d": 256},
            lambda s: s.k,
            "K",
        ),
    ]
    drawn = {}
    for name, metric, unit, names, fixed, along, letter in wanted:
        curves = {kernel: curve(rows, kernel, metric, **fixed) for kernel in names}
        curves = {kernel: found for kernel, found in curves.items() if _has_a_line(found, along)}
        if curves:
            where = ", ".join(f"{key.upper()} = {value:,}" for key, value in fixed.items())
            _figure(folder / name, curves, along, letter, f"{metric} ({unit})", where)
            drawn[name] = f"{metric.capitalize()} in {unit} against {letter}, float32, {where}"
    return drawn


def _has_a_line(found: dict[str, list[tuple[Sizes, Row]]], along: Callable[[Sizes], int]) -> bool:
    return any(len({along(sizes) for sizes, _ in points}) > 1 for points in found.values())


def _figure(
    path: Path,
    curves: dict[str, dict[str, list[tuple[Sizes, Row]]]],
    along: Callable[[Sizes], int],
    letter: str,
    ylabel: str,
    where: str,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), squeeze=False)
    for axis, (kernel, found) in zip(axes[0], curves.items(), strict=True):
        for provider in sorted(found, key=lambda name: name == OURS):
            points = sorted(found[provider], key=lambda point: along(point[0]))
            _line(axis, provider, [along(sizes) for sizes, _ in points], [row for _, row in points])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{_TITLES.get(kernel, kernel)}\n{where}", fontsize=10)
        axis.set_xlabel(letter)
        axis.set_ylabel(ylabel)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _line(axis: Any, provider: str, places: list[int], rows: list[Row]) -> None:
    middle = [row.p50 for row in rows]
    colour = _COLOURS.get(provider)
    axis.plot(places, middle, "o-", label=provider, color=colour, lw=2.2 if provider == OURS else 1.3, ms=4)
    axis.fill_between(
        places, [row.p20 for row in rows], [row.p80 for row in rows], color=colour, alpha=0.15, lw=0
    )
