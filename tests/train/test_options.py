"""Options that change how a model is computed, not what; and what the optimizer does with a gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import final_state, shortened
from torch import Tensor, nn

from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train import (
    GeneratorRun,
    OptimConfig,
    ScheduleConfig,
    TokenizerRun,
    train_generator,
    train_tokenizer,
)
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.ema import WeightAverage
from ibq_fast.train.schedule import learning_rate_factor
from ibq_fast.train.tokenizer import TokenizerTask
from ibq_fast.train.weights import Trained

OPTIONS: list[dict[str, Any]] = [
    {"compile": True, "compile_backend": "aot_eager"},
    {"channels_last": True},
    {"activation_checkpointing": True},
    {
        "compile": True,
        "compile_backend": "aot_eager",
        "channels_last": True,
        "activation_checkpointing": True,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_a_tokenizer_trains_the_same_with_every_option(
    options: dict[str, Any], tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    loss = replace(tokenizer_run.loss, adversarial="hinge")
    run = replace(tokenizer_run, loss=loss, optim=replace(tokenizer_run.optim, lr=1e-4))
    plain = shortened(run, tmp_path / "plain", steps=3)
    train_tokenizer(plain)
    other = shortened(run, tmp_path / "other", steps=3, **options)
    exported = train_tokenizer(other)
    for part in ("tokenizer", "discriminator"):
        expected, got = final_state(plain)[part]["model"], final_state(other)[part]["model"]
        assert list(got) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    Tokenizer.from_pretrained(exported)
    train_tokenizer(shortened(run, tmp_path / "other", steps=4, resume=True))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=lambda options: "+".join(options))
def test_a_generator_trains_the_same_with_every_option(
    options: dict[str, Any], generator_run: GeneratorRun, tmp_path: Path
) -> None:
    still = {f"{kind}_dropout": 0.0 for kind in ("class", "token", "residual", "mlp")}
    run = replace(generator_run, model=replace(generator_run.model, **still))
    plain, other = shortened(run, tmp_path / "a", steps=3), shortened(run, tmp_path / "b", steps=3, **options)
    train_generator(plain)
    train_generator(other)
    expected, got = (final_state(config)["generator"]["model"] for config in (plain, other))
    assert all(torch.allclose(got[name], tensor, rtol=1e-3, atol=1e-5) for name, tensor in expected.items())


def test_an_unknown_compiler_is_refused(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    run = shortened(tokenizer_run, tmp_path / "run", compile=True, compile_backend="clang")
    with pytest.raises(ValueError, match=r"run\.compile_backend: expected one of .*inductor.*, got 'clang'"):
        train_tokenizer(run)


def test_images_and_weights_are_channels_last(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    run = shortened(tokenizer_run, tmp_path / "run", channels_last=True)
    task = TokenizerTask(run, build_accelerator(run.run))
    assert task._next().is_contiguous(memory_format=torch.channels_last)
    model: Any = task.tokenizer.bare
    assert model.encoder.levels[0].blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def saved_bytes(module: Any, images: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(images).reconstruction.sum()
    return sum(kept.values())


def test_recomputed_activations_are_not_kept(tokenizer_run: TokenizerRun) -> None:
    images = torch.rand(8, 3, 8, 8)
    model = Tokenizer(tokenizer_run.model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = saved_bytes(model, images) - weights
    model.checkpoint_activations()
    assert saved_bytes(model, images) - weights < plain / 3


def test_averages_on_the_cpu_are_the_same_averages() -> None:
    module = nn.Linear(3, 3)
    here, cpu = WeightAverage(module, 0.9), WeightAverage(module, 0.9, on_cpu=True)
    for _ in range(4):
        with torch.no_grad():
            module.weight += torch.randn(3, 3)
        here.update()
        cpu.update()
    ours, theirs = (a.state_dict()["average"] for a in (cpu, here))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    restored = WeightAverage(module, 0.9, on_cpu=True)
    restored.load_state_dict(here.state_dict())
    live = module.weight.clone()
    with restored.applied():
        assert torch.equal(module.weight, theirs["weight"])
    assert torch.equal(module.weight, live)
    restored.update()
    assert not torch.equal(theirs["weight"], restored.state_dict()["average"]["weight"])  # its own copy


def test_a_run_with_averages_on_the_cpu(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    run = shortened(tokenizer_run, tmp_path / "a", steps=2)
    train_tokenizer(run)
    cpu = shortened(replace(run, optim=replace(run.optim, ema_on_cpu=True)), tmp_path / "b")
    train_tokenizer(cpu)
    averages = [final_state(config)["tokenizer"]["ema"]["average"] for config in (run, cpu)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


class Accelerator:
    """As much of accelerate as one process without mixed precision needs."""

    scaler = None

    device = torch.device("cpu")

    def prepare(self, *parts: Any) -> Any:
        return parts

    def unwrap_model(self, module: nn.Module) -> nn.Module:
        return module

    def clip_grad_norm_(self, parameters: Any, norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm)


def gradient_of(config: OptimConfig, seen: list[Tensor]) -> Tensor | None:
    """One update of two weights whose gradient is (3, 4); what reaches the optimizer goes into ``seen``."""
    module = nn.Linear(2, 1, bias=False)
    accelerator: Any = Accelerator()
    trained = Trained(module, config, accelerator, averaged=False)
    optimizer: Any = trained._optimizer
    optimizer.register_step_pre_hook(lambda *_: seen.append(module.weight.grad.clone()))
    trained.set_rates(0, 0.0, None)
    (module.weight * torch.tensor([[3.0, 4.0]])).sum().backward()
    return trained.apply()


def test_gradients_are_clipped_by_their_norm() -> None:
    seen: list[Tensor] = []
    norm = gradient_of(OptimConfig(clip_norm=1.0), seen)
    assert norm is not None
    assert float(norm) == pytest.approx(5.0)
    torch.testing.assert_close(seen[0], torch.tensor([[0.6, 0.8]]))
    assert gradient_of(OptimConfig(), seen) is None
    torch.testing.assert_close(seen[1], torch.tensor([[3.0, 4.0]]))


def test_warm_up_alone_stays_at_the_full_rate() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=10, warmup_start=0.0)
    factors = [learning_rate_factor(schedule, step, step / 100, 100) for step in (0, 5, 10, 99)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_drops_come_after_the_warm_up() -> None:
    schedule = ScheduleConfig(
        kind="drops", warmup_steps=10, warmup_start=0.0, drop_steps=(20,), drop_ratio=0.5
    )
    factors = [learning_rate_factor(schedule, step, step / 100, 100) for step in (5, 10, 19, 20)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_accumulation_with_a_tokenizer_is_one_large_batch(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    """Without entropies: those are of a whole batch, not means over images. With an eps above the rounding of
    gradients that are zero but for rounding (biases before a group norm), which Adam would blow up.
    """
    quantizer = replace(tokenizer_run.model.quantizer, sample_entropy_weight=0.0, codebook_entropy_weight=0.0)
    models = []
    for batch, accumulate in ((4, 1), (2, 2)):
        run = replace(
            tokenizer_run,
            data=replace(tokenizer_run.data, batch_size=batch, flip=False),
            model=replace(tokenizer_run.model, quantizer=quantizer),
            optim=replace(tokenizer_run.optim, accumulate=accumulate, lr=1e-3, eps=1e-3),
        )
        run = shortened(run, tmp_path / str(batch), steps=3)
        train_tokenizer(run)
        models.append(final_state(run)["tokenizer"]["model"])
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], atol=2e-5), name
