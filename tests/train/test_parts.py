"""The parts of a training run, one by one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from ibq_fast.train import (
    GeneratorRun,
    OptimConfig,
    ScheduleConfig,
    TokenizerRun,
    read_metrics,
    train_generator,
)
from ibq_fast.train.ema import WeightAverage
from ibq_fast.train.metrics import MetricsLog
from ibq_fast.train.optimizer import build_optimizer, by_steps, set_rates
from ibq_fast.train.perceptual import build_perceptual
from ibq_fast.train.progress import Reporter
from ibq_fast.train.rng import rng_state, set_rng_state, untouched_rng
from ibq_fast.train.schedule import learning_rate_factor, weight_decay_at
from ibq_fast.train.tokenizer import train_tokenizer
from ibq_fast.train.usage import UsageWindow

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(), {0: 1, 50: 1, 99: 1}),
        (ScheduleConfig(kind="cosine"), {0: 1, 50: 0.5, 100: 0}),
        (ScheduleConfig(kind="cosine", final_ratio=0.1), {0: 1, 50: 0.55, 100: 0.1}),
        (
            ScheduleConfig(kind="cosine", warmup_steps=20, warmup_start=0.0),
            {0: 0, 10: 0.5, 20: 1, 60: 0.5, 100: 0},
        ),
        (ScheduleConfig(kind="linear", plateau=0.2, final_ratio=0.5), {0: 1, 19: 1, 60: 0.75, 100: 0.5}),
        (ScheduleConfig(kind="drops", drop_steps=(30, 60)), {29: 1, 30: 0.1, 59: 0.1, 60: 0.01, 100: 0.01}),
    ],
)
def test_learning_rate(schedule: ScheduleConfig, expected: dict[int, float]) -> None:
    got = {step: learning_rate_factor(schedule, step, step / 100, 100) for step in expected}
    assert got == pytest.approx(expected, abs=1e-12)


def test_drops_by_epoch_are_drops_at_the_next_update() -> None:
    """10 batches an epoch, 4 an update: epoch 3 ends after 7.5 updates."""
    optim = OptimConfig(accumulate=4, schedule=ScheduleConfig(kind="drops", drop_epochs=(3, 4.0)))
    schedule = by_steps(optim, 10).schedule
    assert (schedule.drop_steps, schedule.drop_epochs) == ((8, 10), ())
    assert [learning_rate_factor(schedule, step, 0.0) for step in (7, 8, 10)] == pytest.approx([1, 0.1, 0.01])
    plain = OptimConfig(schedule=ScheduleConfig(kind="drops", drop_steps=(5,)))
    assert by_steps(plain, None) == plain
    with pytest.raises(ValueError, match=r"drop_epochs: expected data of a known size \(or drop_steps\)"):
        by_steps(optim, None)
    with pytest.raises(ValueError, match=r"kind: expected drops with drop_steps or drop_epochs, got cosine"):
        ScheduleConfig(kind="cosine", drop_epochs=(1,))
    with pytest.raises(ValueError, match=r"drop_epochs: expected drop_steps or drop_epochs, got both"):
        ScheduleConfig(kind="drops", drop_epochs=(1,), drop_steps=(1,))


def test_learning_rate_follows_the_clock_where_it_leads() -> None:
    assert learning_rate_factor(ScheduleConfig(kind="cosine"), 3, 1.0, None) == 0


def test_weight_decay_moves_along_a_half_cosine() -> None:
    assert [weight_decay_at(0.05, 0.08, p) for p in (0, 0.5, 1)] == pytest.approx([0.05, 0.065, 0.08])
    assert weight_decay_at(0.05, None, 0.7) == 0.05


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    config = OptimConfig(kind="adamw", weight_decay=0.1, weight_decay_end=0.3)
    optimizer = build_optimizer(config, module.parameters())
    set_rates(optimizer, config, 0, 1.0, 10)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in module.named_parameters()} == pytest.approx(
        {"0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    )


def test_the_fused_optimizer_of_the_cpu_is_the_plain_one() -> None:
    updated = []
    for fused in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(64, 32)
        optimizer = build_optimizer(OptimConfig(kind="adamw", weight_decay=0.1), module.parameters())
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["fused"] = fused
        for _ in range(5):
            module(torch.randn(8, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        updated.append(module.weight.detach())
    torch.testing.assert_close(*updated, rtol=1e-6, atol=1e-7)


def test_the_average_starts_at_the_first_update_and_follows_the_formula() -> None:
    module = nn.Linear(2, 2)
    frozen = module.bias.requires_grad_(False)
    average = WeightAverage(module, 0.5)
    weights = [torch.full((2, 2), float(value)) for value in (8, 4, 2)]
    for value in weights:
        module.weight.data.copy_(value)
        average.update()
    # Decays of the second and third update: min(0.5, 2/11) and min(0.5, 3/12).
    expected = 3 / 12 * (2 / 11 * 8 + 9 / 11 * 4) + 9 / 12 * 2
    with average.applied():
        assert torch.allclose(module.weight, torch.full((2, 2), expected))
    assert torch.equal(module.weight, weights[-1])
    assert list(average.state_dict()["average"]) == ["weight"]
    assert frozen is module.bias


def test_an_average_of_another_module_is_refused() -> None:
    average = WeightAverage(nn.Linear(2, 2), 0.9)
    average.update()
    with pytest.raises(ValueError, match="EMA state: expected the module's 1 parameters"):
        WeightAverage(nn.Linear(2, 2, bias=False), 0.9).load_state_dict(average.state_dict())


def test_usage_counts_a_window_and_starts_afresh() -> None:
    window = UsageWindow(4, 2, CPU)
    for codes in ([0, 0], [1, 1], [3, 3]):
        window.add(torch.tensor(codes))
        window.end_step()
    assert window.counts().tolist() == [2, 2, 0, 0]  # of the finished window, not of the one that has begun
    restored = UsageWindow(4, 2, CPU)
    restored.load_state_dict(window.state_dict())
    restored.add(torch.tensor([3, 2]))
    restored.end_step()
    assert restored.counts().tolist() == [0, 0, 1, 3]


def test_random_states_come_back() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    state = rng_state(CPU)
    first = draws()
    set_rng_state(state, CPU)
    with untouched_rng(CPU):
        draws()
    assert draws() == first


def reporter() -> Reporter:
    return Reporter("test", total_steps=10, total_seconds=None, console=Console(file=open("/dev/null", "w")))


def test_metrics_of_a_killed_run_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, reporter(), resume_step=0, tensorboard=False, main=True)
    for step in (1, 2, 3):
        log.scalars("train", step, 0.5, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')  # the kill tore this line
    MetricsLog(tmp_path, reporter(), resume_step=2, tensorboard=False, main=True).scalars("train", 3, 0.5, {})
    assert [line["step"] for line in read_metrics(tmp_path, "train")] == [1, 2, 3]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_metrics_on_a_full_disk_are_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog.__new__(MetricsLog)
    said: list[str] = []
    log.__dict__.update(
        _main=True,
        _path=tmp_path / "metrics.jsonl",
        _board=None,
        _complained=False,
        _reporter=SimpleNamespace(say=said.append),
    )
    log.scalars("train", 1, 0.0, {"loss": 1.0})
    log.scalars("train", 2, 0.0, {"loss": 1.0})
    assert len(said) == 1
    assert "No space left on device" in said[0]


def test_plain_lines_off_a_terminal_say_rate_and_time_left() -> None:
    console = Console(record=True, width=200, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with Reporter("tokenizer", total_steps=100, total_seconds=None, console=console) as shown:
        for step in range(1, 11):
            shown.step(step, step * 2.0, step * 64)
        shown.figures(10, 20.0, {"loss": 0.25})
    assert console.export_text().strip() == "tokenizer: step 10/100  32.0 images/s  3m00s left  loss 0.25"


def test_a_terminal_shows_a_bar() -> None:
    console = Console(record=True, width=120, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with Reporter("tokenizer", total_steps=4, total_seconds=None, console=console) as shown:
        shown.step(2, 1.0, 64)
        shown.figures(2, 1.0, {"loss": 0.25})
        shown.step(3, 2.0, 96)
    assert "step 3/4" in console.export_text()


def test_a_second_signal_leaves_at_once() -> None:
    code = (
        "import time, sys\n"
        "from ibq_fast.train.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    start = time.monotonic()
    child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    _, stderr = child.communicate(timeout=20)
    assert child.returncode == 143
    assert time.monotonic() - start < 20
    assert b"finishing this step" in stderr
    assert b"second signal" in stderr


def quiet_model(run: GeneratorRun) -> GeneratorRun:
    silent = {f"{kind}_dropout": 0.0 for kind in ("class", "token", "residual", "mlp")}
    return replace(run, model=replace(run.model, **silent))


def test_accumulated_micro_batches_are_one_large_batch(generator_run: GeneratorRun, tmp_path: Path) -> None:
    weights = []
    for batch, accumulate in ((4, 1), (2, 2)):
        run = quiet_model(generator_run)
        run = replace(
            run,
            run=replace(run.run, dir=str(tmp_path / f"run{batch}")),
            data=replace(run.data, batch_size=batch),
            optim=replace(run.optim, accumulate=accumulate),
        )
        folder = train_generator(run)
        from safetensors.torch import load_file

        weights.append(load_file(folder / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=2e-5), name


def test_accumulation_with_a_discriminator_trains_both(tokenizer_run: TokenizerRun) -> None:
    run = replace(
        tokenizer_run,
        loss=replace(tokenizer_run.loss, adversarial="vanilla"),
        optim=replace(tokenizer_run.optim, accumulate=2, clip_norm=1.0),
    )
    train_tokenizer(run)
    last = read_metrics(Path(run.run.dir), "train")[-1]
    assert {"discriminator", "adversarial", "grad_norm", "loss", "utilisation", "psnr"} - set(last) == {
        "psnr"
    }
    assert last["discriminator"] > 0


def test_bf16_autocast_trains(tokenizer_run: TokenizerRun) -> None:
    run = replace(tokenizer_run, run=replace(tokenizer_run.run, mixed_precision="bf16", steps=2))
    train_tokenizer(run)
    # A second run of the process may ask for another precision.
    train_tokenizer(replace(run, run=replace(run.run, dir=run.run.dir + "2", mixed_precision="no")))


def test_plain_vq_is_an_option_of_the_same_command(tokenizer_run: TokenizerRun) -> None:
    quantizer = replace(tokenizer_run.model.quantizer, kind="vq")
    run = replace(tokenizer_run, model=replace(tokenizer_run.model, quantizer=quantizer))
    train_tokenizer(run)
    assert read_metrics(Path(run.run.dir), "train")[-1]["entropy"] == 0


def test_tensorboard_gets_scalars_and_pictures(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tokenizer(replace(tokenizer_run, run=replace(tokenizer_run.run, tensorboard=True, steps=2)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/utilisation", "eval/psnr"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["reconstructions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 17}, "model.vocab_size: expected the tokenizer's 16, got 17"),
        ({"grid": (2, 8)}, r"model.grid: expected the tokenizer's \(4, 4\), got \(2, 8\)"),
        ({"num_classes": 1}, "model.num_classes: expected at least the data's 2 classes, got 1"),
    ],
)
def test_a_generator_has_to_fit_its_tokenizer(
    change: dict[str, Any], message: str, generator_run: GeneratorRun
) -> None:
    with pytest.raises(ValueError, match=message):
        train_generator(replace(generator_run, model=replace(generator_run.model, **change)))


def test_a_tokenizer_has_to_fit_its_data(tokenizer_run: TokenizerRun) -> None:
    with pytest.raises(ValueError, match=r"model\.resolution: expected data\.resolution 8, got 16"):
        train_tokenizer(replace(tokenizer_run, model=replace(tokenizer_run.model, resolution=16)))


def test_a_device_that_is_not_there_is_refused(tokenizer_run: TokenizerRun) -> None:
    absent: Any = "npu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(
        ValueError, match=f"run.device: expected a machine with {absent}, accelerate found only"
    ):
        train_tokenizer(replace(tokenizer_run, run=replace(tokenizer_run.run, device=absent)))


def test_lpips_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"perceptual: expected the lpips package.*ibq_fast\[lpips\]"):
        build_perceptual("lpips", CPU)


def test_lpips_is_frozen_and_takes_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(nn.Conv2d):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__(3, 1, 1)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return super().forward(a - b).mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Fake))
    distance = build_perceptual("lpips", CPU)
    assert distance is not None
    assert not any(p.requires_grad for p in distance.train().parameters())
    assert not any(module.training for module in distance.modules())
    assert distance(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).shape == (2,)
