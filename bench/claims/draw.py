"""Plots and tables of docs/claims.md from bench/results/claims.csv; what is not measured is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from bench.claims.cases import ALL, CLAIMS, DIM, SEEDS, SHORT, VARIANTS, Case, cases
from bench.claims.methods import METHODS
from bench.claims.results import measured, read
from bench.claims.training import HELD_OUT, TOKENS
from bench.machine import ROOT

PAGE = ROOT / "docs" / "claims.md"
PLOTS = ROOT / "docs" / "claims"
Row = dict[str, Any]
_COLOURS = {name: f"C{i}" for i, name in enumerate(METHODS)}
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "utilisation": ("codes in use, held-out images", lambda value: f"{100 * value:.3g}"),
    "window_utilisation": ("codes in use, last 100 training steps", lambda value: f"{100 * value:.3g}"),
    "perplexity": ("perplexity, held-out images", lambda value: f"{value:,.0f}"),
    "psnr": ("PSNR, held-out images", lambda value: f"{value:.2f}"),
    "cpu_ms": ("CPU time a training step", lambda value: f"{value:.3g}"),
}
_UNITS = {"utilisation": "%", "window_utilisation": "%", "perplexity": "codes", "psnr": "dB", "cpu_ms": "ms"}


def draw() -> None:
    """Write the plots, and the tables into their places in docs/claims.md. Nothing without measurements."""
    rows = [_typed(row) for row in read() if row["method"] in ALL]
    if not rows:
        return
    last = _last(rows)
    short = [row for row in last if row["claim"] != "d"]
    shared = [row for row in rows if row["claim"] == "d" and row["step"] == SHORT.steps]
    by_codes = [row for row in short if row["claim"] == "a"] + shared
    by_dim = [row for row in short if row["claim"] in "ab" and row["codes"] == CLAIMS["b"].codes[0]]
    terms = [row for row in short if row["claim"] in "ac" and row["codes"] == CLAIMS["c"].codes[0]]
    over_time = [row for row in rows if row["claim"] == "d"]
    sections = {
        "a": (_growth(by_codes, "codes", "a"), _matrices(by_codes, "codes", METHODS)),
        "b": (_growth(by_dim, "dim", "b"), _matrices(by_dim, "dim", CLAIMS["b"].methods)),
        "c": (_terms(terms), _terms_table(terms)),
        "d": (_curves(over_time), _matrices(over_time, "step", METHODS)),
    }
    page = PAGE.read_text()
    for claim, (plot, tables) in sections.items():
        made = [row for row in rows if row["claim"] == claim]
        body = _caption(claim, made) + (f"\n\n![{CLAIMS[claim].title}](claims/{plot})" if plot else "")
        page = _between(page, claim, f"{body}\n\n{tables}".rstrip())
    PAGE.write_text(page)


def reachable(size: int) -> float:
    """The share of ``size`` codes that a uniform random choice for each held-out token would hit."""
    return 1.0 - math.exp(HELD_OUT * TOKENS * math.log1p(-1.0 / size))


def _typed(row: dict[str, str]) -> Row:
    values: Row = dict(row)
    for name in ("codes", "dim", "seed", "step", "size", "threads"):
        values[name] = int(row[name])
    for name in _FIGURES:
        values[name] = float(row[name])
    return values


def _last(rows: Iterable[Row]) -> list[Row]:
    """The last evaluation of every run."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[row["claim"], row["method"], row["codes"], row["dim"], row["seed"]] = row
    return list(found.values())


def _seeds(rows: Iterable[Row], method: str, **at: int) -> list[Row]:
    return [row for row in rows if row["method"] == method and all(row[key] == at[key] for key in at)]


def _spread(rows: list[Row], figure: str) -> str:
    """Mean of the seeds and their range; "–" without any, a star where seeds are missing."""
    if not rows:
        return "–"
    show = _FIGURES[figure][1]
    values = [row[figure] for row in rows]
    text = f"{show(sum(values) / len(values))} ({show(min(values))} – {show(max(values))})"
    return text if len(rows) == len(SEEDS) else f"{text}*"


def _matrices(rows: list[Row], across: str, methods: Iterable[str]) -> str:
    """A table for each figure: methods down, ``across`` to the right."""
    columns = sorted({row[across] for row in rows})
    name = {"codes": "K", "dim": "D", "step": "step"}[across]
    parts = []
    for figure, (title, _) in _FIGURES.items():
        if (across, figure) == ("step", "cpu_ms"):  # hardly depends on the step; it stands with claim a
            continue
        lines = [
            f"{title[0].upper()}{title[1:]}, {_UNITS[figure]}:",
            "",
            "| method | " + " | ".join(f"{name} = {column:,}" for column in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for method in methods:
            cells = [_spread(_seeds(rows, method, **{across: column}), figure) for column in columns]
            lines.append(f"| {METHODS[method].title} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _terms_order(rows: list[Row]) -> list[str]:
    order: list[str] = []
    for name in VARIANTS:
        base = name.split("-")[0]
        order += [name] if base in order else [base, name]
    return [name for name in order if _seeds(rows, name, dim=DIM)]


def _terms_table(rows: list[Row]) -> str:
    lines = [
        "| loss | " + " | ".join(f"{title}, {_UNITS[key]}" for key, (title, _) in _FIGURES.items()) + " |",
        "|---" * (len(_FIGURES) + 1) + "|",
    ]
    for method in _terms_order(rows):
        seeds = _seeds(rows, method, dim=DIM)
        title = ALL[method].title + ("" if "-" in method else ", all terms")
        lines.append(f"| {title} | {' | '.join(_spread(seeds, figure) for figure in _FIGURES)} |")
    return "\n".join(lines)


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * count, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Any, name: str) -> str:
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / name, dpi=100)
    return name


def _line(axis: Any, rows: list[Row], method: str, across: str, figure: str) -> None:
    """Mean of the seeds with their range as a band; flat and dashed for what has no D to vary."""
    seeds = _seeds(rows, method)
    if not seeds:
        return
    colour, label = _COLOURS[method], METHODS[method].title
    if across == "dim" and not METHODS[method].sized:
        mean = sum(row[figure] for row in seeds) / len(seeds)
        axis.axhline(mean, color=colour, linestyle="--", label=f"{label} (no D)")
        return
    xs = sorted({row[across] for row in seeds})
    values = [[row[figure] for row in seeds if row[across] == x] for x in xs]
    axis.plot(xs, [sum(part) / len(part) for part in values], color=colour, marker="o", ms=4, label=label)
    axis.fill_between(xs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.18, lw=0)


def _growth(rows: list[Row], across: str, claim: str) -> str:
    """Utilisation, reconstruction and cost against K or D."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = _panels(3)
    for axis, key in zip(axes, ("utilisation", "psnr", "cpu_ms"), strict=True):
        for method in METHODS:
            _line(axis, rows, method, across, key)
        ticks = sorted({row[across] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="codes K" if across == "codes" else "dimension D", title=_FIGURES[key][0])
    axes[0].set(ylabel="share of codes", ylim=(0, 1.02))
    if across == "codes":
        sizes = sorted({row["codes"] for row in rows})
        axes[0].plot(sizes, [reachable(size) for size in sizes], "k:", label="uniform choice")
    axes[1].set_ylabel("dB")
    axes[2].set(ylabel="ms, one thread", yscale="log")
    axes[2].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[2].yaxis.set_minor_locator(NullLocator())
    axes[2].yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return _save(figure, f"{claim}.png")


def _terms(rows: list[Row]) -> str:
    """A dot for each seed, a bar for their mean."""
    order = _terms_order(rows)
    figure, axes = _panels(2)
    for axis, key in zip(axes, ("utilisation", "psnr"), strict=True):
        for place, method in enumerate(order):
            values = [row[key] for row in _seeds(rows, method, dim=DIM)]
            colour = _COLOURS[method.split("-")[0]]
            axis.barh(place, sum(values) / len(values), color=colour, alpha=0.45)
            axis.plot(values, [place] * len(values), "o", color=colour, ms=4)
        axis.set(title=_FIGURES[key][0], xlabel="share of codes" if key == "utilisation" else "dB")
        labels = [ALL[name].title + ("" if "-" in name else ", all terms") for name in order]
        axis.set_yticks(range(len(order)), labels if axis is axes[0] else [""] * len(order))
        axis.invert_yaxis()
    lowest = min((row["psnr"] for row in rows), default=0.0)
    axes[1].set_xlim(left=math.floor(lowest - 1))
    return _save(figure, "c.png")


def _curves(rows: list[Row]) -> str:
    figure, axes = _panels(3)
    for axis, key in zip(axes, ("utilisation", "window_utilisation", "psnr"), strict=True):
        for method in METHODS:
            _line(axis, rows, method, "step", key)
        axis.set(xlabel="optimiser steps", title=_FIGURES[key][0])
        axis.set(ylabel="dB" if key == "psnr" else "share of codes")
    for axis in axes[:2]:
        axis.set_ylim(0, 1.02)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return _save(figure, "d.png")


def _caption(claim: str, rows: list[Row]) -> str:
    missing = set(cases(claim)) - measured()
    done = len(list(cases(claim))) - len(missing)
    text = f"`python -m bench.claims {claim}`: {done} of {done + len(missing)} runs measured"
    if rows:
        commits = ", ".join(sorted({row["commit"] for row in rows}))
        dates = ", ".join(sorted({row["date"] for row in rows}))
        threads = ", ".join(sorted({str(row["threads"]) for row in rows}))
        machines = ", ".join(sorted({row["machine"] for row in rows}))
        text += f", {dates}, {machines}, threads: {threads}, commit {commits}"
    if missing:
        text += f".\nNot measured (in whole or for some seeds): {_named(claim, missing)}"
        text += "; complete it with `--missing`"
    return text + "."


def _named(claim: str, missing: set[Case]) -> str:
    """``missing`` by size: all methods there, or which."""
    parts = []
    for codes, dim in sorted({(case.codes, case.dim) for case in missing}):
        absent = {case.method for case in missing if (case.codes, case.dim) == (codes, dim)}
        titles = [ALL[name].title for name in CLAIMS[claim].methods if name in absent]
        whole = len(titles) == len(CLAIMS[claim].methods)
        parts.append(f"K = {codes:,}, D = {dim} ({'all methods' if whole else '; '.join(titles)})")
    return "; ".join(parts)


def _between(page: str, name: str, body: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE.name}: expected {begin} … {end}")
    return f"{before}{begin}\n{body}\n{end}{after}"
