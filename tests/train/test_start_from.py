"""A run that starts from a published checkpoint, and the published losses by the training loop's own code."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_resume import final_state, shortened
from torch import Tensor

from ibq_fast.checkpoint.convert import convert
from ibq_fast.checkpoint.snapshot import load_snapshot
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import LossConfig, Tokenizer
from ibq_fast.train import GeneratorRun, OptimConfig, TokenizerRun, train_generator, train_tokenizer
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.tokenizer import TokenizerTask

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CHECKPOINT = GOLDEN / "tokenizer.ckpt"
TOLERANCE = 1e-4
NAMES = {
    "loss": "total_loss",
    "quantization": "codebook_quant_loss",
    "entropy": "codebook_entropy_loss",
    "sample_entropy": "codebook_sample_entropy_loss",
    "codebook_entropy": "codebook_avg_entropy_loss",
    "codebook": "codebook_loss",
    "nll": "nll_loss",
    "reconstruction": "reconstruct_loss",
    "perceptual": "perceptual_loss",
    "adversarial_weight": "d_weight",
    "discriminator_factor": "disc_factor",
    "adversarial": "g_loss",
    "adversarial_unweighted": "unsacled_g_loss",
}
CRITIC_NAMES = {
    "discriminator": "disc_loss",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
    "lecam": "lecam_loss",
}


def published_run(run: TokenizerRun, weight: float | None = 0.1) -> TokenizerRun:
    """``run`` with the golden checkpoint's model and losses, at a rate that moves no float32 weight."""
    model = Tokenizer.from_pretrained(CHECKPOINT, resolution=64).config
    return replace(
        run,
        run=replace(run.run, init_from=str(CHECKPOINT), steps=1),
        data=replace(run.data, resolution=64, batch_size=1),
        model=model,
        loss=LossConfig(adversarial="hinge", generator_weight=weight, discriminator_channels=16),
        optim=OptimConfig(lr=1e-30, ema_decay=0.9),
    )


def distance(images: Tensor, reconstruction: Tensor) -> Tensor:
    """The golden cases' stand-in for a perceptual distance."""
    return F.avg_pool2d(images - reconstruction, 4).abs().mean((1, 2, 3))


@pytest.mark.parametrize("case", ["fixed", "adaptive"])
def test_published_losses_and_gradients_by_the_loop(
    case: str, tokenizer_run: TokenizerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = torch.load(GOLDEN / "tokenizer_losses.pt", weights_only=True)
    wanted = golden["cases"][case]
    config = published_run(tokenizer_run, 0.1 if case == "fixed" else None)
    task = TokenizerTask(config, build_accelerator(config.run), distance)
    task.start_from(str(CHECKPOINT))
    monkeypatch.setattr(task, "_next", lambda: golden["image"])
    tokenizer: Any = task.tokenizer.bare
    assert task.critic is not None
    critic: Any = task.critic.bare
    weights = {
        "grad_disc_first": critic.layers[0].weight,
        "grad_encoder_conv_in": tokenizer.encoder.conv_in.weight,
        "grad_codebook": tokenizer.quantizer.codebook,
        "grad_decoder_conv_out": tokenizer.last_layer,
    }
    gradients: dict[str, Tensor] = {}
    for name, weight in weights.items():

        def keep(parameter: Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()

        weight.register_post_accumulate_grad_hook(keep)

    terms = task.update(0, 0.0)

    for ours, theirs in NAMES.items():
        truth = wanted["gen_log"][f"train/{theirs}"].item()
        assert float(terms[ours]) == pytest.approx(truth, rel=TOLERANCE), ours
    for ours, theirs in CRITIC_NAMES.items():
        truth = wanted["disc_log"][f"train/{theirs}"].item()
        assert float(terms[ours]) == pytest.approx(truth, rel=TOLERANCE), ours
    assert len(NAMES) == len(wanted["gen_log"])
    assert len(CRITIC_NAMES) + 1 == len(wanted["disc_log"])  # disc_factor is in both logs
    averages = (float(task.loss.real_average), float(task.loss.fake_average))
    assert averages == pytest.approx(wanted["lecam"], rel=TOLERANCE)
    for name, gradient in gradients.items():
        error = (gradient - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < TOLERANCE, name
    assert set(gradients) == set(weights)


def test_a_run_starts_with_everything_the_checkpoint_has(tokenizer_run: TokenizerRun) -> None:
    config = published_run(tokenizer_run)
    train_tokenizer(config)
    ended, theirs = final_state(config), load_snapshot(CHECKPOINT, resolution=64).parts
    for name, tensor in theirs["tokenizer"]["model"].items():
        assert torch.equal(ended["tokenizer"]["model"][name], tensor), name
    live, ema = theirs["tokenizer"]["model"], theirs["tokenizer"]["ema"]
    d = min(0.9, (1 + ema["updates"]) / (10 + ema["updates"]))
    for name, kept in ended["tokenizer"]["ema"]["average"].items():
        torch.testing.assert_close(kept, d * ema["average"][name] + (1 - d) * live[name])
    assert ended["tokenizer"]["ema"]["updates"] == ema["updates"] + 1
    critic = theirs["discriminator"]["model"]
    assert torch.equal(ended["discriminator"]["model"]["layers.0.weight"], critic["layers.0.weight"])


def test_a_runs_checkpoint_goes_out_and_starts_another(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    loss = replace(tokenizer_run.loss, adversarial="hinge")
    first = replace(tokenizer_run, loss=loss)
    train_tokenizer(first)
    ended = final_state(first)
    published = convert(first.run.dir, tmp_path / "out.ckpt", to="reference")
    for source in (first.run.dir, str(published), str(convert(published, tmp_path / "own", resolution=8))):
        again = shortened(first, tmp_path / Path(source).name / "again", init_from=source, steps=1)
        task = TokenizerTask(again, build_accelerator(again.run))
        task.start_from(source)
        state = task.state()
        for part in ("tokenizer", "discriminator"):
            for kind in ("model", "optimizer"):
                assert set(state[part][kind]) == set(ended[part][kind])
                for name, value in ended[part][kind].items():
                    ours = state[part][kind][name]
                    if kind == "model":
                        assert torch.equal(ours, value), name
                    else:
                        assert all(torch.equal(ours[k], value[k]) for k in value), name
        average = ended["tokenizer"]["ema"]["average"]
        assert all(torch.equal(t, average[n]) for n, t in state["tokenizer"]["ema"]["average"].items())


def test_a_resumed_run_does_not_start_over(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    source = Tokenizer(tokenizer_run.model).save_pretrained(tmp_path / "source")
    config = shortened(tokenizer_run, tmp_path / "run", init_from=str(source))
    train_tokenizer(config)
    ended = final_state(config)
    (source / "model.safetensors").unlink()
    train_tokenizer(shortened(config, tmp_path / "run", resume=True))
    now = final_state(config)
    assert all(torch.equal(t, now["tokenizer"]["model"][n]) for n, t in ended["tokenizer"]["model"].items())


def test_models_that_do_not_fit_are_refused(tokenizer_run: TokenizerRun) -> None:
    run = replace(tokenizer_run, run=replace(tokenizer_run.run, init_from=str(CHECKPOINT)))
    with pytest.raises(ValueError, match=r"tokenizer.ckpt: weight 'encoder.*expected shape"):
        train_tokenizer(run)
    published = published_run(tokenizer_run)
    small = replace(published, loss=replace(published.loss, discriminator_channels=8))
    with pytest.raises(ValueError, match=r"tokenizer.ckpt: weight 'layers.0.weight': expected shape \[8, 3"):
        train_tokenizer(small)


@pytest.mark.parametrize("options", [{"init": "kmeans"}, {"logit_scale_kind": "learned"}], ids=str)
def test_quantizer_options_start_from_published_codes(
    options: dict[str, Any], tokenizer_run: TokenizerRun
) -> None:
    config = published_run(tokenizer_run)
    quantizer: QuantizerConfig = replace(config.model.quantizer, **options)
    config = replace(config, model=replace(config.model, quantizer=quantizer))
    train_tokenizer(config)
    codes = load_snapshot(CHECKPOINT).parts["tokenizer"]["model"]["quantizer.codebook"]
    assert torch.equal(final_state(config)["tokenizer"]["model"]["quantizer.codebook"], codes)


def test_a_generator_starts_from_another(
    generator_run: GeneratorRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_generator(generator_run)
    exported = convert(generator_run.run.dir, tmp_path / "gen.ckpt", to="reference", weights="live")
    caplog.set_level(logging.ERROR)
    own = convert(exported, tmp_path / "gen", num_heads=2, grid=4)
    frozen = replace(generator_run, optim=replace(generator_run.optim, lr=1e-30, ema_decay=0.0))
    again = shortened(frozen, tmp_path / "again", init_from=str(own), steps=1)
    train_generator(again)
    ended, then = final_state(again)["generator"]["model"], final_state(generator_run)["generator"]["model"]
    assert all(torch.equal(tensor, ended[name]) for name, tensor in then.items())
