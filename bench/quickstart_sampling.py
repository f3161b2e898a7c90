"""The quick start's samples: from classes to pixels, beside the plain sampler, with the same weights.

    python -m bench.quickstart_sampling runs/quickstart

*plain* is ``bench/plain_sampler.py`` (greedy: it does not even draw) and the tokenizer's decoder, 100 images
at a time, float32; *ibq_fast* is what the quick start does. Both in turns, the shortest time of each part
counts. Like the quick start's, this process keeps freed memory, which spares both a part of decoding pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import plain_sampler
from bench.machine import commit, device_name
from ibq_fast.data import to_uint8
from ibq_fast.generator import Generator
from ibq_fast.quickstart.freed_memory import keep_freed_memory
from ibq_fast.quickstart.measure import draw_images
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train import GeneratorRun, load_config

BATCH = 100


def timed(best: dict[str, float], name: str, call: Callable[[], Tensor]) -> Tensor:
    """``call``'s result; its time goes into ``best`` if it is the shortest of that name."""
    begun = time.perf_counter()
    result = call()
    best[name] = min(best.get(name, float("inf")), time.perf_counter() - begun)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.quickstart_sampling", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what a quick start wrote")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    known = parser.parse_args()
    torch.set_num_threads(known.threads)
    keep_freed_memory()
    run = load_config(GeneratorRun, known.folder / "generator" / "config.yaml")
    generator = Generator.from_pretrained(known.folder / "generator" / "generator")
    plain = Tokenizer.from_pretrained(known.folder / "tokenizer" / "tokenizer").requires_grad_(False)
    ours = Tokenizer.from_pretrained(known.folder / "tokenizer" / "tokenizer").requires_grad_(False)
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classes = torch.arange(known.images) % run.model.num_classes
    grid, scale = run.model.grid, run.sample.cfg_scale
    best: dict[str, float] = {}

    def plain_tokens(part: Tensor) -> Tensor:
        return plain_sampler.sample(generator, part, scale, grid[0] * grid[1])[0].unflatten(1, grid)

    for _ in range(known.rounds):
        tokens = timed(
            best, "plain, tokens", lambda: torch.cat([plain_tokens(part) for part in classes.split(BATCH)])
        )
        timed(
            best,
            "plain, pixels",
            lambda tokens=tokens: torch.cat(  # type: ignore[misc]
                [to_uint8(plain.decode(part, clamp=True)) for part in tokens.split(BATCH)]
            ),
        )
        for precision in ("bf16", "float32"):
            timed(
                best,
                f"ibq_fast, {precision}",
                lambda precision=precision: draw_images(  # type: ignore[misc]
                    generator, ours, classes, sampling=run.sample, seed=0, precision=precision
                ),
            )
    before = best["plain, tokens"] + best["plain, pixels"]
    print(f"{known.images} images, {known.threads} threads, {device_name()}, commit {commit()}")
    for name, seconds in best.items():
        ratio = f", {before / seconds:.2f} times as fast as plain" if name.startswith("ibq") else ""
        print(f"{name}: {seconds:.3f} s{ratio}")


if __name__ == "__main__":
    main()
