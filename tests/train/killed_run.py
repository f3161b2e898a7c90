"""Trains in a child process that is killed with SIGKILL again and again. Usage: killed_run.py RUN_DIR PHOTOS ROUNDS.

One process imports everything and forks each attempt, so that ten attempts do not import torch ten times. Prints
one JSON line: the resumed step of each attempt, and how many kills hit in the middle of a checkpoint's writing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import data_config, tokenizer_model

from ibq_fast.checkpoint.training import list_checkpoints
from ibq_fast.tokenizer import LossConfig
from ibq_fast.train import OptimConfig, RunConfig, TokenizerRun, train_tokenizer

STEPS = 400


def config(folder: Path, photos: Path, *, steps: int, save_every: int, resume: bool) -> TokenizerRun:
    return TokenizerRun(
        run=RunConfig(
            dir=str(folder),
            resume=resume,
            steps=steps,
            device="cpu",
            log_every=1000,
            eval_every=0,
            sample_every=0,
            save_every=save_every,
            keep_last=2,
            eval_batches=1,
            pictures=1,
            tensorboard=False,
        ),
        data=data_config(photos),
        model=tokenizer_model(),
        loss=LossConfig(adversarial="hinge", discriminator_channels=8, discriminator_layers=1),
        optim=OptimConfig(lr=1e-3, ema_decay=0.9),
    )


def attempt(folder: Path, photos: Path, *, steps: int) -> int:
    """Start (or resume) training in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train_tokenizer(config(folder, photos, steps=steps, save_every=1, resume=True))
            code = 0
        finally:
            os._exit(code)
    return child


def kill_round(
    folder: Path, photos: Path, randomness: random.Random, *, while_writing: bool
) -> tuple[int, bool]:
    """One attempt and its end: the newest step before, and whether a checkpoint was left half-written."""
    root = folder / "checkpoints"
    before = newest_step(root)
    child = attempt(folder, photos, steps=STEPS)
    deadline = time.monotonic() + 60
    while newest_step(root) <= before and time.monotonic() < deadline:  # it resumed, and saves again
        time.sleep(0.002)
    time.sleep(randomness.uniform(0.0, 0.2))
    while while_writing and not any(root.glob(".writing-step*")) and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(randomness.uniform(0.0, 0.004))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return before, any(root.glob(".writing-step*"))


def newest_step(root: Path) -> int:
    found = list_checkpoints(root)
    return int(found[-1].name.split("-")[1].split(".")[0]) if found else 0


def main() -> None:
    folder, photos, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    randomness = random.Random(0)
    results = [kill_round(folder, photos, randomness, while_writing=i % 2 == 1) for i in range(rounds)]
    end = newest_step(folder / "checkpoints") + 2
    child = attempt(folder, photos, steps=end)
    _, status = os.waitpid(child, 0)
    unbroken = folder.with_name("unbroken")
    train_tokenizer(config(unbroken, photos, steps=end, save_every=0, resume=False))
    steps = [step for step, _ in results]
    halves = sum(half for _, half in results)
    report = {"steps": steps, "half_written": halves, "status": os.waitstatus_to_exitcode(status), "end": end}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
