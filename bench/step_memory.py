"""One full training step of a tokenizer's config: seconds and peak memory of the process.

    python -m bench.step_memory configs/imagenet256_ibq_262144.yaml --data.batch_size=1

Losses, discriminator and optimizers are the config's; images are noise and the perceptual distance is none
unless said otherwise (its weights are a download). Peaks are the process's high-water mark (VmHWM), libraries
and weights included; the first step allocates the optimizers' state, later ones show where it settles.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.memory import status
from bench.noise_task import noise_task


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.step_memory", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="YAML file of a tokenizer's run")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    known, overrides = parser.parse_known_args()
    torch.set_num_threads(known.threads)
    with tempfile.TemporaryDirectory() as scratch:
        task = noise_task(known.config, overrides, Path(scratch), images=4, side=256)
        parameters = sum(p.numel() for p in task.parameters().values())
        print(f"{known.config} {' '.join(overrides)}")
        print(f"{parameters / 1e6:.0f} M parameters, {known.threads} threads; resident {_gib('VmRSS')} GiB")
        for step in range(known.steps):
            begun = time.perf_counter()
            terms = task.update(step, 0.0)
            seconds = time.perf_counter() - begun
            loss = {name: round(float(terms[name]), 4) for name in ("loss", "discriminator") if name in terms}
            print(f"step {step + 1}: {seconds:.1f} s, peak {_gib('VmHWM')} GiB, {loss}", flush=True)


def _gib(field: str) -> str:
    return f"{status(field) / 2**30:.2f}"


if __name__ == "__main__":
    main()
