"""One training step of a generator's recipe: seconds and peak memory, beside logits that are materialised.

    python -m bench.generator_step configs/generator_B_262144.yaml --data.batch_size=2

The step is the training loop's own at full size: forward and backward pass, clipping, AdamW. *ibq_fast* is
the loss as it is; *logits* has a head whose N×K logits go to ``F.cross_entropy`` in its place, and everything
else in common. The tokenizer is a small one with as many codes as the recipe's, the images are noise.

Each measurement is a process of its own. The first step allocates the optimizer's state; time is the shortest
of those after it, the peak the process's high-water mark (VmHWM) over all of them, libraries, weights and
tokenizer included. Losses and gradient norms of both sides are held against each other. What was measured is
kept in bench/results/generator_step.json and shown in docs/generator_training.md; ``--sides`` and
``--precisions`` measure a part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ibq_fast.generator.generator
from bench.machine import ROOT, commit, device_name
from bench.memory import status
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig
from ibq_fast.train import GeneratorRun
from ibq_fast.train.config import parse_run
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.generator import GeneratorTask

SIDES = ("ibq_fast", "logits")
PRECISIONS = ("no", "bf16")
NAMES = {"no": "float32", "bf16": "bfloat16 autocast"}
RESULTS = ROOT / "bench" / "results" / "generator_step.json"
PAGE = ROOT / "docs" / "generator_training.md"
MARKS = ("<!-- python -m bench.generator_step -->", "<!-- end -->")
CLOSE = {"no": 1e-4, "bf16": 2e-2}
"""How far losses and gradient norms of the sides may lie apart, as a share."""


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss by logits [N, K], in float32 from there on."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def build_task(config: str, overrides: Sequence[str], scratch: Path) -> GeneratorTask:
    """The task of the YAML file ``config`` with ``overrides`` on the CPU, over four images of noise."""
    options = [
        f"--config={config}",
        f"--run.dir={scratch / 'run'}",
        "--run.device=cpu",
        "--run.fsdp=false",
        "--cache=memory",
        "--cache_dir=null",
        "--cache_crops=1",
        "--data.kind=image_folder",
        f"--data.root={scratch / 'images'}",
        f"--data.val_root={scratch / 'images'}",
        "--data.num_workers=0",
        "--data.flip=false",
        *overrides,
    ]
    run = parse_run(GeneratorRun, options)
    model, side = run.model, run.data.resolution
    (scratch / "images" / "noise").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(max(4, run.data.batch_size)):
        pixels = random.integers(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(scratch / "images" / "noise" / f"{number}.png")
    torch.manual_seed(0)
    tokenizer = Tokenizer(
        TokenizerConfig(
            image_channels=run.data.channels,
            resolution=side,
            base_channels=32,
            channel_multipliers=(1,) * (side // model.grid[0]).bit_length(),
            num_res_blocks=1,
            attention_resolutions=(),
            latent_channels=32,
            quantizer=QuantizerConfig(codebook_size=model.vocab_size, dim=model.token_dim or 256),
        )
    )
    with contextlib.redirect_stderr(io.StringIO()):
        return GeneratorTask(run, build_accelerator(run.run), tokenizer.requires_grad_(False))


def measure_here(
    config: str, overrides: Sequence[str], side: str, precision: str, steps: int
) -> dict[str, Any]:
    """Seconds of each step, the process's peak in bytes, losses and gradient norms."""
    replaced: Any = contextlib.nullcontext()
    if side == "logits":
        replaced = mock.patch.object(ibq_fast.generator.generator, "linear_cross_entropy", materialised)
    with tempfile.TemporaryDirectory() as scratch, replaced:
        task = build_task(config, [*overrides, f"--run.mixed_precision={precision}"], Path(scratch))
        torch.manual_seed(1)  # of the dropouts: the same on both sides
        seconds, terms = [], []
        for step in range(steps):
            begun = time.perf_counter()
            terms.append({name: float(value) for name, value in task.update(step, 0.0).items()})
            seconds.append(time.perf_counter() - begun)
    return {
        "seconds": seconds,
        "peak": status("VmHWM"),
        "terms": terms,
        "parameters": sum(p.numel() for p in task.parameters().values()),
        "images": task.images_per_step,
        "tokens": task.config.model.num_tokens,
    }


def measure(
    config: str, overrides: Sequence[str], side: str, precision: str, steps: int, threads: int
) -> dict[str, Any]:
    """:func:`measure_here` in a process of its own. Raises RuntimeError when that fails."""
    request = json.dumps([config, list(overrides), side, precision, steps, threads])
    done = subprocess.run(
        [sys.executable, "-m", "bench.generator_step", "--measure", request],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"bench.generator_step: {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(ours: dict[str, Any], plain: dict[str, Any], precision: str) -> None:
    """Raises RuntimeError where losses or gradient norms of any step disagree."""
    for step, (got, expected) in enumerate(zip(ours["terms"], plain["terms"], strict=False)):
        for name, value in expected.items():
            if abs(got[name] - value) > CLOSE[precision] * abs(value):
                raise RuntimeError(f"step {step}: {name}: expected {value} as with logits, got {got[name]}")


def table(results: dict[str, dict[str, Any]]) -> str:
    """The page's part of what was measured, a table for each recipe."""
    lines: list[str] = []
    for title in dict.fromkeys(entry["title"] for entry in results.values()):
        entries = {(e["side"], e["precision"]): e for e in results.values() if e["title"] == title}
        any_entry = next(iter(entries.values()))
        lines += [
            f"`{title}`: {any_entry['parameters'] / 1e6:.0f} M parameters, {any_entry['images']} images of "
            f"{any_entry['tokens']} tokens a step.",
            "",
            "| | products in | seconds a step | × ibq_fast | peak of the process | × ibq_fast |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for precision in PRECISIONS:
            ours = entries.get(("ibq_fast", precision))
            for side in SIDES:
                entry = entries.get((side, precision))
                if entry is None:
                    continue
                name = "**ibq_fast**" if side == "ibq_fast" else "logits materialised"
                seconds, peak = min(entry["seconds"][1:]), entry["peak"]
                times, memory = "", ""
                if ours is not None and side != "ibq_fast":
                    times = f"{seconds / min(ours['seconds'][1:]):.2f}"
                    memory = f"{peak / ours['peak']:.2f}"
                figures = f"{seconds:.1f} | {times} | {peak / 1e9:.2f} GB | {memory}"
                lines.append(f"| {name} | {NAMES[precision]} | {figures} |")
        about = sorted(
            {
                f"{e['device']}, {e['threads']} threads, {e['date']}, commit {e['commit']}"
                for e in entries.values()
            }
        )
        lines += ["", *about, ""]
    return "\n".join(lines)


def write_page(results: dict[str, dict[str, Any]], page: Path) -> None:
    """Put the tables between the page's marks."""
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(results)}{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.generator_step", description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", default="configs/generator_B_262144.yaml")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    known, overrides = parser.parse_known_args()
    if known.measure:
        *arguments, threads = json.loads(known.measure)
        torch.set_num_threads(threads)
        print(json.dumps(measure_here(*arguments)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    title = " ".join([known.config, *overrides])
    for precision in known.precisions:
        for side in known.sides:
            entry = measure(known.config, overrides, side, precision, known.steps, known.threads)
            entry |= {"title": title, "side": side, "precision": precision, "threads": known.threads}
            entry |= {"device": device_name(), "commit": commit()}
            entry["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            results[f"{title} {side} {precision}"] = entry
            print(
                f"{side} {precision}: {min(entry['seconds'][1:]):.1f} s, {entry['peak'] / 1e9:.2f} GB",
                flush=True,
            )
        pair = [results.get(f"{title} {side} {precision}") for side in SIDES]
        if pair[0] and pair[1]:
            check(pair[0], pair[1], precision)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, PAGE)


if __name__ == "__main__":
    main()
