"""One process of a run is killed, or fails: the others stop, and any number of processes goes on."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import exit_codes, run_ranks, start_ranks

from ibq_fast.checkpoint.training import latest_checkpoint, list_checkpoints, load_checkpoint
from ibq_fast.train import RunConfig, TokenizerRun, read_metrics
from ibq_fast.train.__main__ import main
from ibq_fast.train.config import dump_config
from ibq_fast.train.peers import EXIT_CODE, PeerWatch

LIMIT = 60  # seconds the others have


def write(config: TokenizerRun, folder: Path, batch: int, **run: object) -> list[str]:
    """The command line of ``config`` with ``batch`` images per process."""
    config = replace(
        config,
        run=replace(config.run, dir=str(folder / "run"), **run),
        data=replace(config.data, batch_size=batch),
        model=replace(config.model, channel_multipliers=(1,)),
    )
    file = folder / f"{batch}.yaml"
    dump_config(config, file)
    return ["tokenizer", f"--config={file}"]


@pytest.mark.parametrize("world", [1, 4])
def test_killed_with_two_goes_on_with_one_and_with_four(
    world: int, tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    """12 images, 4 a step: 1 process with 4, 2 with 2 and 4 with 1 take the same images at each step."""
    long = write(tokenizer_run, tmp_path, 2, steps=100_000, save_every=2, log_every=1)
    processes = start_ranks(2, main, long, errors=tmp_path)
    root = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + LIMIT
    while len(list_checkpoints(root)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    victim, survivor = processes[::-1] if world == 1 else processes  # of rank 1, of rank 0
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    start = time.monotonic()
    codes = exit_codes([survivor], LIMIT)
    assert codes == [EXIT_CODE]
    assert time.monotonic() - start < LIMIT
    said = (tmp_path / str(processes.index(survivor))).read_text()
    assert "error: " in said
    assert "The last checkpoint is" in said
    assert "run.resume goes on" in said
    newest = latest_checkpoint(root)
    assert newest is not None
    before = load_checkpoint(newest)
    end = before["step"] + 4
    run_ranks(world, main, [*write(tokenizer_run, tmp_path, 4 // world, steps=end, log_every=1), "--resume"])
    newest = latest_checkpoint(root)
    assert newest is not None
    after = load_checkpoint(newest)
    assert after["step"] == end
    epoch, step = divmod(end, 3)
    assert {name: after["progress"]["data"][name] for name in ("epoch", "step")} == {
        "epoch": epoch,
        "step": step,
    }
    # Codes counted by two processes are counted once: each of 4 images has 8 x 8 tokens.
    counts = after["progress"]["usage"]["counts"]
    assert int(counts.sum()) == 4 * 64 * (end % tokenizer_run.run.usage_window)
    assert [line["step"] for line in read_metrics(tmp_path / "run", "train")] == list(range(1, end + 1))


def silent_or_failing(folder: Path, how: str) -> None:
    """Rank 1 stops breathing (or fails) while rank 0 waits for something that no lost connection ends."""
    dist.init_process_group("gloo")
    with PeerWatch(RunConfig(dir=str(folder), steps=1, peer_timeout=2.0)):
        dist.barrier()
        if dist.get_rank() == 1:
            if how == "silent":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise ValueError("image 7: no such thing")
        time.sleep(LIMIT)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("silent", "error: process 1 was not heard of for"),
        ("failing", "error: process 1 failed: ValueError: image 7: no such thing"),
    ],
)
def test_whoever_waits_hears_of_it(how: str, message: str, tmp_path: Path) -> None:
    start = time.monotonic()
    waiting, other = start_ranks(2, silent_or_failing, tmp_path, how, errors=tmp_path)
    assert exit_codes([waiting], LIMIT) == [EXIT_CODE]
    assert time.monotonic() - start < 20
    other.kill()
    said = (tmp_path / "0").read_text()
    assert message in said
    assert "No checkpoint was written yet" in said
