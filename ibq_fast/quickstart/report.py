"""``report.md``: the quick start's figures in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STAGES = {
    "tokenizer": "IBQ tokenizer",
    "vq": "plain VQ tokenizer",
    "classifier": "classifier",
    "generator": "generator",
    "measure": "samples, figures, pictures",
    "total": "**all of it**",
}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report of ``report.json``'s content as Markdown."""
    path.write_text("\n\n".join(_sections(report)) + "\n")


def summary(report: Mapping[str, Any]) -> str:
    """The outcome in one line per target, for a terminal."""
    lines = [
        f"  {target['title']}: {_value(target['reached'], target['unit'])}"
        f" (target {_value(target['at_least'], target['unit'])}{'' if target['met'] else ', MISSED'})"
        for target in report["targets"]
    ]
    return "\n".join([_verdict(report), *lines])


def _sections(report: Mapping[str, Any]) -> list[str]:
    protocol, machine = report["protocol"], report["machine"]
    sections = ["# Quick start", f"**{_verdict(report)}**"]
    if report["cut_short"]:
        stages = ", ".join(_STAGES[stage] for stage in report["cut_short"])
        sections.append(f"Ended by the clock before its last step, on a slow or busy machine: {stages}.")
    sections += [
        _table(
            ("", "reached", "target"),
            [
                (t["title"], _value(t["reached"], t["unit"]), "≥ " + _value(t["at_least"], t["unit"]))
                for t in report["targets"]
            ],
        ),
        "## Tokenizers",
        _table(
            ("", "PSNR", "SSIM", "Fréchet", "utilisation", "perplexity", "steps", "time"),
            [
                (
                    name,
                    f"{f['psnr']:.2f} dB",
                    f"{f['ssim']:.3f}",
                    _number(f, "frechet_efficientnet_lite0"),
                    f"{f['utilisation']:.1%}",
                    f"{f['perplexity']:.0f}",
                    f"{report['steps'][stage]:,}",
                    f"{report['seconds'][stage]:.0f} s",
                )
                for (name, f), stage in zip(report["tokenizers"].items(), ("tokenizer", "vq"), strict=False)
            ],
        ),
        "Everything that was measured, with the worst and the best images and a map of each codebook: "
        f"{_links(report)}.",
        "![originals above reconstructions](reconstructions.png)",
        "![how often each code is used](usage.png)",
        "## Generated images",
        f"The classifier recognises the class asked for in {report['figures']['recognised']:.1%} of "
        f"{protocol['samples']:,} generated images (of real held-out images it recognises "
        f"{report['figures']['classifier_accuracy']:.1%}). Fréchet distance to the held-out images: "
        f"{_number(report['figures'], 'samples_frechet_efficientnet_lite0')}; precision "
        f"{_number(report['figures'], 'samples_precision_efficientnet_lite0')}, recall "
        f"{_number(report['figures'], 'samples_recall_efficientnet_lite0')}.",
        "![generated images, a row per class](samples.png)",
        _table(
            ("class", "recognised"),
            [(name, f"{share:.0%}") for name, share in report["recognised_by_class"].items()],
        ),
        "## How it went",
        "![curves](curves.png)",
        _table(
            ("stage", "seconds"), [(_STAGES[stage], f"{s:.0f}") for stage, s in report["seconds"].items()]
        ),
        f"At most {report['peak_memory_gb']:.2f} GB of memory. {machine['processor']}, "
        f"{machine['cores']} cores, {machine['instruction_set']}, device {machine['device']}"
        f"{_threads(report['threads'])}, "
        f"precision {protocol['mixed_precision']}; "
        f"Python {machine['python']}, PyTorch {machine['torch']}, ibq_fast {machine['ibq_fast']}.",
        "## Protocol",
        _list(_protocol(protocol)),
        "## Go on from here",
        "```\n"
        "ibq-fast sample --tokenizer tokenizer/tokenizer --generator generator/generator --out more\n"
        "ibq-fast reconstruct --tokenizer tokenizer/tokenizer --out kept photos/\n"
        "tensorboard --logdir .\n"
        "```",
    ]
    return sections


def _protocol(protocol: Mapping[str, Any]) -> list[str]:
    height, width = protocol["image_size"][1:]
    return [
        f"Data: {protocol['training_images']:,} training and {protocol['held_out_images']:,} held-out images "
        f"of Fashion-MNIST, 28 × 28 photographs padded with black to {height} × {width}.",
        "PSNR: mean over the held-out images of each one's PSNR, both sides rounded to uint8, peak 255, "
        "all pixels with the padding.",
        "Fréchet distances, precision and recall: of features of EfficientNet-Lite0, so neither FID nor "
        "comparable with figures of other networks; — where its package is not installed.",
        "Evaluation protocol {name}, version {version}; its settings are in the reports linked above.".format(
            **protocol["evaluation"]
        ),
        "Utilisation: share of the codes used at least once over the held-out images; perplexity: "
        "exponential of the entropy of their use.",
        "Plain VQ: the same networks, images, losses and steps; nearest code, straight-through gradient, "
        "commitment loss.",
        "Recognised: a small convolutional network, trained on the real training images, names the class of "
        f"every generated image. Sampling: {_settings(protocol['sampling'])}, seed {protocol['seed']}; no "
        "image is left out.",
    ]


def _links(report: Mapping[str, Any]) -> str:
    stages = ("tokenizer", "vq")[: len(report["tokenizers"])]
    return ", ".join(f"[{_STAGES[s]}](evaluation/{s}/report.md)" for s in (*stages, "generator"))


def _number(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.2f}" if name in figures else "—"


def _threads(by_stage: Mapping[str, int]) -> str:
    """How many threads the trainings ran on, where that was chosen."""
    counts = sorted(set(by_stage.values()))
    if not counts:
        return ""
    return f", trained on {' or '.join(map(str, counts))} thread{'s' if counts[-1] > 1 else ''}"


def _verdict(report: Mapping[str, Any]) -> str:
    if report["met"]:
        return "All targets met."
    missed = [target["title"] for target in report["targets"] if not target["met"]]
    return f"Below target: {'; '.join(missed)}."


def _value(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if unit else f"{value:.1%}"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
