"""One full training step of a tokenizer's config: seconds and peak memory of the process.

    python -m bench.step_memory configs/imagenet256_ibq_262144.yaml --data.batch_size=1

Losses, discriminator and optimizers are the config's; images are noise and the perceptual distance is none
unless said otherwise (its weights are a download). Peaks are the process's high-water mark (VmHWM), libraries
and weights included; the first step allocates the optimizers' state, later ones show where it settles.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from bench.memory import status
from ibq_fast.train import TokenizerRun
from ibq_fast.train.config import parse_run
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.tokenizer import TokenizerTask


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.step_memory", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="YAML file of a tokenizer's run")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    known, overrides = parser.parse_known_args()
    torch.set_num_threads(known.threads)
    with tempfile.TemporaryDirectory() as scratch:
        task = _task(known.config, overrides, Path(scratch))
        parameters = sum(p.numel() for p in task.parameters().values())
        print(f"{known.config} {' '.join(overrides)}")
        print(f"{parameters / 1e6:.0f} M parameters, {known.threads} threads; resident {_gib('VmRSS')} GiB")
        for step in range(known.steps):
            begun = time.perf_counter()
            terms = task.update(step, 0.0)
            seconds = time.perf_counter() - begun
            loss = {name: round(float(terms[name]), 4) for name in ("loss", "discriminator") if name in terms}
            print(f"step {step + 1}: {seconds:.1f} s, peak {_gib('VmHWM')} GiB, {loss}", flush=True)


def _task(config: str, overrides: list[str], scratch: Path) -> TokenizerTask:
    """The config's task over a folder of noise images."""
    side = 256
    for i in range(4):
        (scratch / "noise").mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(scratch / "noise" / f"{i}.png")
    options = [
        f"--config={config}",
        f"--run.dir={scratch / 'run'}",
        "--run.device=cpu",
        "--perceptual=none",
        "--data.kind=image_folder",
        f"--data.root={scratch}",
        f"--data.val_root={scratch}",
        "--data.resample=false",
        "--data.num_workers=0",
        *overrides,
    ]
    run = parse_run(TokenizerRun, options)
    with contextlib.redirect_stderr(io.StringIO()):
        return TokenizerTask(run, build_accelerator(run.run))


def _gib(field: str) -> str:
    return f"{status(field) / 2**30:.2f}"


if __name__ == "__main__":
    main()
