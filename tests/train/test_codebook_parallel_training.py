"""Training with a codebook that is split over processes is the training of one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_processes import largest_difference, steady, trained

from ibq_fast import Tokenizer
from ibq_fast.checkpoint.training import latest_checkpoint, load_checkpoint
from ibq_fast.train import TokenizerRun
from ibq_fast.train.__main__ import main

CODES = 17  # no even split


def split_run(config: TokenizerRun, batch: int, parallel: bool | int) -> TokenizerRun:
    """Ten steps that are clipped, with a learned scale and averages."""
    config = steady(config, batch, "all")
    quantizer = replace(
        config.model.quantizer, codebook_size=CODES, similarity="euclidean", logit_scale_kind="learned"
    )
    schedule = replace(config.optim.schedule, kind="constant")
    return replace(
        config,
        run=replace(
            config.run, steps=10, codebook_parallel=parallel, eval_every=5, sample_every=5, pictures=3
        ),
        model=replace(config.model, quantizer=quantizer),
        optim=replace(config.optim, clip_norm=0.05, schedule=schedule),
    )


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = one["tokenizer"], other["tokenizer"]
    assert largest_difference(first["model"], second["model"]) <= 1e-5
    assert largest_difference(first["ema"]["average"], second["ema"]["average"]) <= 1e-5
    for name, entry in first["optimizer"].items():
        assert largest_difference(entry, second["optimizer"][name]) <= 1e-4, name
    assert torch.equal(one["progress"]["usage"]["counts"], other["progress"]["usage"]["counts"])


def test_split_codebooks_train_as_a_whole_one(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    one, one_log = trained(split_run(tokenizer_run, 4, False), tmp_path / "one", 1)
    two, two_log = trained(split_run(tokenizer_run, 2, True), tmp_path / "two", 2)
    assert_same(one, two)
    assert any(figures["grad_norm"] > 0.05 for figures in one_log)
    for first, second in zip(one_log, two_log, strict=True):
        for name in set(first) - {"split", "time", "images_per_second"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), (first["step"], name)
    # What two have written is a model like any other.
    models = [Tokenizer.from_pretrained(tmp_path / name / "tokenizer") for name in ("one", "two")]
    assert largest_difference(*(m.state_dict() for m in models)) <= 1e-5
    # It goes on in one process, and in four, of which two each share a codebook.
    resumed = {}
    for world, parallel in ((1, "true"), (4, "2")):
        folder = tmp_path / f"resumed {world}"
        shutil.copytree(tmp_path / "two", folder)
        options = [f"--run.codebook_parallel={parallel}", f"--data.batch_size={4 // world}"]
        options += ["--run.steps=13", f"--run.dir={folder}", "--resume"]
        run_ranks(world, main, ["tokenizer", f"--config={folder / 'given.yaml'}", *options])
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        resumed[world] = load_checkpoint(newest)
        assert resumed[world]["step"] == 13
    assert_same(resumed[1], resumed[4])
