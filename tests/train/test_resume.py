"""A run that was stopped and resumed ends with the very bits of one that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import full_disk_for, same

from ibq_fast.checkpoint.training import (
    CheckpointWriteError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from ibq_fast.tokenizer import LossConfig, Tokenizer
from ibq_fast.train import GeneratorRun, TokenizerRun, read_metrics, train_generator, train_tokenizer
from ibq_fast.train.errors import NonFiniteError, TrainingInterrupted
from ibq_fast.train.generator import GeneratorTask
from ibq_fast.train.tokenizer import TokenizerTask

STEPS, STOP = 100, 50


def shortened(config: Any, folder: Path, **run: Any) -> Any:
    return replace(config, run=replace(config.run, dir=str(folder), **run))


def final_state(config: Any) -> dict[str, Any]:
    newest = latest_checkpoint(Path(config.run.dir) / "checkpoints")
    assert newest is not None
    parts = load_checkpoint(newest)
    del parts["loop"]["seconds"]
    return parts


def stop_at(step: int, task: type, monkeypatch: pytest.MonkeyPatch, signum: int = signal.SIGTERM) -> None:
    """The process gets a signal in the middle of update number ``step``."""
    update = task.update

    def interrupted(self: Any, done: int, progress: float) -> Any:
        if done + 1 == step:
            os.kill(os.getpid(), signum)
        return update(self, done, progress)

    monkeypatch.setattr(task, "update", interrupted)


def check_resume_is_exact(config: Any, train: Callable[[Any], Path], task: type, tmp_path: Path) -> None:
    config = shortened(
        config, tmp_path / "unbroken", steps=STEPS, save_every=0, eval_every=30, sample_every=40
    )
    train(config)
    broken = shortened(config, tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(STOP, task, patch)
        with pytest.raises(TrainingInterrupted, match=f"SIGTERM: stopped after step {STOP}"):
            train(broken)
    torch.manual_seed(12345)  # whatever happens in between must not matter
    torch.rand(17)
    train(shortened(broken, tmp_path / "broken", resume=True))
    unbroken, resumed = final_state(config), final_state(broken)
    assert unbroken["step"] == resumed["step"] == STEPS
    assert same(unbroken, resumed)
    steps = [line["step"] for line in read_metrics(Path(broken.run.dir), "train")]
    assert steps == sorted(set(steps))
    for part in ("train", "eval"):
        first, second = (read_metrics(Path(c.run.dir), part) for c in (config, broken))
        assert [without_time(line) for line in first] == [without_time(line) for line in second]


def without_time(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("time", "images_per_second")}


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param({}, id="no discriminator"),
        pytest.param(
            {"adversarial": "hinge", "discriminator_start": 20, "generator_weight": None}, id="discriminator"
        ),
    ],
)
def test_tokenizer_50_of_100_then_resumed(
    loss: dict[str, Any], tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    config = replace(tokenizer_run, loss=replace(tokenizer_run.loss, **loss))
    check_resume_is_exact(config, train_tokenizer, TokenizerTask, tmp_path)


def test_generator_50_of_100_then_resumed(generator_run: GeneratorRun, tmp_path: Path) -> None:
    check_resume_is_exact(generator_run, train_generator, GeneratorTask, tmp_path)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_finished_step(
    signum: int, code: int, tokenizer_run: TokenizerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(3, TokenizerTask, monkeypatch, signum)
    before = signal.getsignal(signum)
    with pytest.raises(TrainingInterrupted) as raised:
        train_tokenizer(tokenizer_run)
    assert raised.value.code == code
    assert raised.value.checkpoint is not None
    assert raised.value.checkpoint.name == "step-00000003"
    assert signal.getsignal(signum) is before


def test_a_directory_with_checkpoints_is_not_trained_over(tokenizer_run: TokenizerRun) -> None:
    train_tokenizer(tokenizer_run)
    with pytest.raises(FileExistsError, match="--resume"):
        train_tokenizer(tokenizer_run)


def test_a_finished_run_resumes_to_its_export(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    folder = train_tokenizer(tokenizer_run)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    train_tokenizer(shortened(tokenizer_run, tmp_path / "run", resume=True))
    assert (folder / "model.safetensors").read_bytes() == weights


def test_resume_falls_back_past_a_damaged_checkpoint(
    tokenizer_run: TokenizerRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(tokenizer_run)
    expected = final_state(tokenizer_run)
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / "tokenizer.safetensors").write_bytes(b"lost")
    train_tokenizer(shortened(tokenizer_run, tmp_path / "run", resume=True))
    assert same(final_state(tokenizer_run), expected)
    said = capfd.readouterr().err
    assert "checkpoint passed over" in said
    assert "resumed from" in said


def test_nan_stops_with_step_and_term_and_keeps_the_last_good_checkpoint(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    calls = 0

    def poisoned(images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (images - reconstruction).abs().mean() * (float("nan") if calls == 5 else 1.0)

    with pytest.raises(NonFiniteError, match=r"step 5: perceptual is nan.*step-00000004") as raised:
        train_tokenizer(tokenizer_run, perceptual=poisoned)
    assert isinstance(raised.value, FloatingPointError)
    assert (raised.value.step, raised.value.term) == (5, "perceptual")
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000004"
    train_tokenizer(shortened(tokenizer_run, tmp_path / "run", resume=True))


def test_weights_that_are_not_finite_are_never_saved(
    tokenizer_run: TokenizerRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    update = TokenizerTask.update

    def poisoned(self: TokenizerTask, step: int, progress: float) -> Any:
        terms = update(self, step, progress)
        if step == 3:
            bare: Any = self.tokenizer.bare
            bare.decoder.conv_out.bias.data[0] = float("inf")
        return terms

    monkeypatch.setattr(TokenizerTask, "update", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 4: weight tokenizer\.decoder\.conv_out\.bias"):
        train_tokenizer(tokenizer_run)
    assert [f.name for f in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


def test_a_full_disk_on_the_way_is_a_warning_at_the_end_an_error(
    tokenizer_run: TokenizerRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run" / "checkpoints"
    train_tokenizer(shortened(tokenizer_run, tmp_path / "run", steps=2))
    with pytest.MonkeyPatch.context() as patch:
        full_disk_for("tokenizer.safetensors", patch)
        with pytest.raises(CheckpointWriteError):
            train_tokenizer(shortened(tokenizer_run, tmp_path / "run", resume=True))
    assert "warning: " in capfd.readouterr().err
    assert [f.name for f in root.iterdir()] == ["step-00000002"]
    train_tokenizer(shortened(tokenizer_run, tmp_path / "run", resume=True))
    assert list_checkpoints(root)[-1].name == "step-00000006"


def test_weight_zero_builds_no_discriminator(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    loss = LossConfig(adversarial="hinge", generator_weight=0.0)
    train_tokenizer(replace(tokenizer_run, loss=loss))
    assert "discriminator" not in final_state(tokenizer_run)


def test_the_export_holds_the_averaged_weights(tokenizer_run: TokenizerRun) -> None:
    exported = Tokenizer.from_pretrained(train_tokenizer(tokenizer_run))
    average = final_state(tokenizer_run)["tokenizer"]["ema"]["average"]
    assert all(torch.equal(p, average[name]) for name, p in exported.named_parameters())


def test_a_minute_limit_ends_the_run_with_everything_in_place(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    config = shortened(tokenizer_run, tmp_path / "run", steps=None, max_minutes=0.02, save_every=0)
    assert (train_tokenizer(config) / "model.safetensors").is_file()
    assert len(read_metrics(tmp_path / "run", "eval")) == 1
    assert read_metrics(tmp_path / "run", "train")[-1]["lr"] < config.optim.lr / 2
