"""docs/benchmarks.md from a run's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.log import MACHINE, Row
from bench.results_view import Group, Sizes, curve, groups, ours, plain_mode
from bench.suite import OURS

_KERNELS = {
    "search": (
        "Search",
        "Best code of every row (and, with `lse`, the log-sum-exp). Nominal cost 2·N·K·D operations. "
        "`euclidean` is the same kernel with a logit scale and a bias per code; `exact` scores in bfloat16 "
        "and settles in float32.",
    ),
    "quantizer_step": (
        "Training step of the quantizer",
        "Forward and backward of `IndexBackpropQuantizer` with quantization loss and both entropies at "
        "τ = 0.01. Nominal cost 16·N·K·D operations, the dense fused algorithm; what is skipped because it "
        "cannot change a float32 result may push the share over 100 %. *uniform*: logits of spread 0.001; "
        "*training-like*: codes N(0, 1/D), spread 0.1; *peaked*: features near N(0, 1) codes.",
    ),
    "training_step": (
        "Training step of a tokenizer",
        "The training loop's whole update under the published settings with 64 px images and 32 channels: "
        "encoder, quantizer, decoder, losses with both entropies, backward pass, discriminator with its "
        "update, both Adams, averaged weights; 16 x 16 tokens an image, so N = 1,024 is 4 images. LPIPS is "
        "left out (its weights are a download). *eager* has the published formula in the quantizer's place "
        "and everything else in common. Nominal cost 16·N·K·D operations and the networks' convolutions "
        "and attention. Check: loss terms and gradients of the first update.",
    ),
    "linear_cross_entropy": (
        "Generator's loss",
        "Cross-entropy over a vocabulary of K codes from hidden states [N, D], forward and backward. "
        "Nominal cost 6·N·K·D operations, without the recomputation that saves the memory.",
    ),
    "sampling": (
        "Sampling",
        "N guided images of 256 tokens from the base model (D = 1024, 16 blocks, a vocabulary of K codes), "
        "greedy, against the straightforward sampler of the published code (`bench/plain_sampler.py`). "
        "int8 is weight-only, its sums float32. docs/decoding.md has steps, tokens and bandwidth.",
    ),
}

# Of kernels with a curve, tables are for sizes where several implementations meet; others are its points.
_MEETING = {"search": 3, "quantizer_step": 3}


def write(rows: Sequence[Row], plots: dict[str, str], path: Path, plots_folder: str, command: str) -> None:
    """Write the page of ``rows``, the newest of every kernel.

    ``plots`` are files in ``plots_folder`` beside it with their captions.
    """
    sections = [_head(rows, command)]
    times = groups(rows, "time")
    for kernel, (title, text) in _KERNELS.items():
        tables = [
            _time_table(group, found, rows)
            for group, found in times.items()
            if group.kernel == kernel and len(found) >= _MEETING.get(kernel, 2)
        ]
        if tables:
            sections.append("\n\n".join([f"## {title}", text, *tables]))
    sections += [section for section in (_scaling(rows), _memory(rows)) if section]
    if plots:
        images = [f"![{caption}]({plots_folder}/{name})\n\n{caption}." for name, caption in plots.items()]
        sections.append("\n\n".join(["## Plots", *images]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n")


def _head(rows: Sequence[Row], command: str) -> str:
    first = rows[0]
    limits = [
        f"{row.provider} in {row.mode}: {row.p50:.0f} {row.unit} ({row.p20:.0f} to {row.p80:.0f})"
        for row in rows
        if row.kernel == MACHINE
    ]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            f"Written by `{command}`, which measures all of it again; do not edit.",
            "",
            "| | |",
            "|---|---|",
            f"| machine | {first.device}, {first.threads} threads |",
            f"| measured limits | {'; '.join(limits)} |",
            *_runs(rows),
            f"| versions | {first.version} |",
            "",
            "Every implementation is checked against a float64 evaluation before it is timed. All that "
            "stand in one table were run in turns, round by round, so that a disturbance met all of them. "
            "Times are medians over rounds (20th to 80th percentile). The share is of the register-only "
            "multiply-add rate measured in the same rounds on the same threads, in the mode's arithmetic. "
            f"*× {OURS}* is how many times longer than {OURS} in the same mode (float32 where it has none) "
            f"an implementation takes; in {OURS}'s own rows, than its float32.",
            "",
            "Nothing on this page ran on a GPU: `make gpu` measures there and appends to "
            "`bench/results/gpu.csv`, which is empty as long as no GPU has been at hand.",
        ]
    )


def _runs(rows: Sequence[Row]) -> list[str]:
    """Date and commit; where the newest figures are of several runs, what each of them measured."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.kernel != MACHINE:
            titles = found.setdefault((row.date, row.commit), [])
            title = _KERNELS[row.kernel][0].lower()
            titles += [] if title in titles else [title]
    if len(found) == 1:
        return [line for date, commit in found for line in (f"| date | {date} |", f"| commit | `{commit}` |")]
    return [f"| run | {date}, commit `{commit}`: {', '.join(t)} |" for (date, commit), t in found.items()]


def _time_table(group: Group, found: Sequence[Row], rows: Sequence[Row]) -> str:
    title = " ".join(part for part in (_pretty(group.size), group.regime) if part)
    lines = [
        f"### {_KERNELS[group.kernel][0]}: {title}",
        "",
        f"| | mode | ms | GFLOP/s | share of peak | × {OURS} |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found:
        throughput = _same(rows, row, "throughput")
        share = _same(rows, row, "share of peak")
        name = f"**{row.provider}**" if row.provider == OURS else row.provider
        lines.append(
            f"| {name} | {plain_mode(row)} | {_number(row.p50)} ({_number(row.p20)} – {_number(row.p80)}) | "
            f"{_number(throughput.p50) if throughput else ''} | {f'{share.p50:.0f} %' if share else ''} | "
            f"{_ratio(row, found)} |"
        )
    return "\n".join(lines)


def _ratio(row: Row, found: Sequence[Row]) -> str:
    plain = ours(found, "float32")
    base = plain if row.provider == OURS else ours(found, plain_mode(row)) or plain
    if base is None or base is row:
        return ""
    return f"{row.p50 / base.p50:.2f}"


def _scaling(rows: Sequence[Row]) -> str:
    """Time and cost per code at one image, by K, beside the peer that is timed at the most sizes."""
    parts = []
    for kernel, (title, _) in _KERNELS.items():
        curves = curve(rows, kernel, "time", n=256, d=256)
        mine = sorted(curves.pop(OURS, []), key=lambda point: point[0].k)
        if len({sizes.k for sizes, _ in mine}) < 2:
            continue
        peer = max(curves, key=lambda name: len(curves[name]), default="")
        other = {sizes.k: row for sizes, row in curves.get(peer, [])}
        lines = [
            f"### {title}, N = 256, D = 256, float32",
            "",
            f"| K | {OURS} ms | ns per code | {peer} ms | × {OURS} |",
            "|--:|--:|--:|--:|--:|",
        ]
        for sizes, row in mine:
            rival = other.get(sizes.k)
            lines.append(
                f"| {sizes.k:,} | {_number(row.p50)} | {_number(1e6 * row.p50 / sizes.k)} | "
                f"{_number(rival.p50) if rival else ''} | {f'{rival.p50 / row.p50:.2f}' if rival else ''} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(["## Cost by codebook size", *parts]) if parts else ""


def _memory(rows: Sequence[Row]) -> str:
    found = groups(rows, "peak extra memory")
    if not found:
        return ""
    lines = [
        "## Memory",
        "",
        "High-water mark of one call above the memory before it, in a process of its own: outputs, gradients "
        "and workspace. The gradient of the codebook alone takes 4·K·D bytes.",
        "",
        f"| | | mode | MB | codebook's gradient, MB | × {OURS} |",
        "|---|---|---|--:|--:|--:|",
    ]
    for group, members in found.items():
        sizes = Sizes.of(group.size)
        gradient = "" if group.kernel == "search" else f"{4e-6 * sizes.k * sizes.d:.0f}"
        for row in members:
            name = f"**{row.provider}**" if row.provider == OURS else row.provider
            what = f"{_KERNELS[group.kernel][0]}: {_pretty(group.size)}"
            ratio = _ratio(row, members)
            lines.append(
                f"| {what} | {name} | {plain_mode(row)} | {_number(row.p50)} | {gradient} | {ratio} |"
            )
    return "\n".join(lines)


def _same(rows: Sequence[Row], row: Row, metric: str) -> Row | None:
    """The row of another metric about the same measurement."""
    key = (row.kernel, row.provider, row.mode, row.size)
    return next(
        (r for r in rows if r.metric == metric and (r.kernel, r.provider, r.mode, r.size) == key), None
    )


def _pretty(size: str) -> str:
    sizes = Sizes.of(size)
    return f"N = {sizes.n:,}, K = {sizes.k:,}, D = {sizes.d}"


def _number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
