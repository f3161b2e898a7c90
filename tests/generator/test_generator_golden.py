"""Numbers of the published implementation, and its checkpoint layout in and out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ibq_fast.checkpoint.reference_generator import (
    from_reference_layout,
    infer_config,
    to_reference_layout,
)
from ibq_fast.generator import Generator

CHECKPOINT = Path(__file__).parent.parent / "golden" / "generator.ckpt"


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def test_logits_and_loss(published: Generator, reference: dict[str, Any]) -> None:
    logits = published(reference["tokens"], reference["classes"].squeeze(1))
    assert relative_error(logits, reference["logits"]) < 1e-5
    loss = published.loss(reference["targets"], reference["classes"].squeeze(1), inputs=reference["tokens"])
    assert_close(loss, reference["loss"], rtol=1e-5, atol=0)


def test_gradients(published: Generator, reference: dict[str, Any]) -> None:
    published.loss(
        reference["targets"], reference["classes"].squeeze(1), inputs=reference["tokens"]
    ).backward()
    ours = to_reference_layout({name: p.grad for name, p in published.named_parameters()})
    assert len(reference["grads"]) == 4
    for name, theirs in reference["grads"].items():
        assert relative_error(ours[name], theirs) < 1e-4, name


def test_greedy_tokens(published: Generator, reference: dict[str, Any]) -> None:
    for scale, case in reference["greedy"].items():
        tokens = published.sample(case["classes"].squeeze(1), cfg_scale=float(scale), top_k=1)
        assert tokens.shape == (2, 4, 4)
        assert torch.equal(tokens.flatten(1), case["tokens"]), scale


def test_architecture_is_read_off_the_shapes(published: Generator) -> None:
    config = published.config
    assert (config.vocab_size, config.num_classes, config.grid) == (96, 10, (4, 4))
    assert (config.depth, config.width, config.num_heads, config.hidden) == (2, 64, 4, 256)
    assert Generator.from_pretrained(CHECKPOINT, grid=4).config.num_heads == 1


def test_layout_round_trip(reference: dict[str, Any]) -> None:
    theirs = reference["state_dict"]
    back = to_reference_layout(from_reference_layout(theirs, Path("golden")))
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "settings",
    [{"num_kv_heads": 2}, {"shared_adaln": True}, {"token_dim": 24}, {"num_kv_heads": 1, "mlp_hidden": 40}],
    ids=str,
)
def test_every_variant_survives_the_reference_layout(
    make_generator: Callable[..., Generator], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_generator(grid=(4, 4), **settings)
    state = {f"transformer.{name}": value for name, value in to_reference_layout(model.state_dict()).items()}
    torch.save({"state_dict": state | {"first_stage_model.x": torch.zeros(1)}}, tmp_path / "last.ckpt")
    loaded = Generator.from_pretrained(tmp_path / "last.ckpt", num_heads=4, grid=(4, 4))
    assert loaded.config.kv_heads == model.config.kv_heads
    tokens, classes = torch.randint(0, 50, (2, 9)), torch.tensor([0, 5])
    assert torch.equal(loaded(tokens, classes), model(tokens, classes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "num_heads: expected a divisor of the width 64, got 5"),
        ({"num_heads": 4, "grid": (4, 0)}, "grid: expected a positive integer"),
        ({"heads": 4}, "heads: expected num_heads or grid"),
    ],
    ids=str,
)
def test_wrong_overrides_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generator.from_pretrained(CHECKPOINT, **overrides)


def test_wrong_states_are_refused(reference: dict[str, Any]) -> None:
    where, state = Path("broken.ckpt"), reference["state_dict"]
    with pytest.raises(ValueError, match=r"broken\.ckpt: expected a stage-two checkpoint"):
        from_reference_layout({"encoder.conv_in.weight": torch.zeros(1)}, where)
    with pytest.raises(ValueError, match=r"broken\.ckpt: unexpected weight 'extra'"):
        from_reference_layout(state | {"extra": torch.zeros(1)}, where)
    lonely = {name: value for name, value in state.items() if name != "blocks.1.feed_forward.w3.weight"}
    with pytest.raises(ValueError, match=r"blocks\.1\.feed_forward\.w1\.weight: expected w1 and w3"):
        from_reference_layout(lonely, where)
    with pytest.raises(ValueError, match="no architecture to read"):
        infer_config({"head.weight": torch.zeros(96, 64)}, where)


def test_a_checkpoint_without_a_grid_says_so(
    reference: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = infer_config(from_reference_layout(reference["state_dict"], Path("a.ckpt")), Path("a.ckpt"))
    assert config.grid == (16, 16)
    assert "grid= says otherwise" in caplog.text
