"""Checkpoints of the published implementation that are damaged, incomplete or hostile."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_fast.checkpoint import PretrainedMixin
from ibq_fast.checkpoint.reference import load_reference_state, reference_name
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig

State = dict[str, Tensor]


def write(path: Path, state: State, **more: Any) -> Path:
    torch.save({"state_dict": state, **more}, path)
    return path


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_with_the_reason(tmp_path: Path, zipped: bool) -> None:
    path, mark = tmp_path / "bad.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {}, "x": Payload(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad.ckpt: refused: it holds a pickled object \(\w+.system\)"):
        Tokenizer.from_pretrained(path)
    assert not mark.exists()


def test_settings_objects_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.ckpt", {}, hyper_parameters=argparse.Namespace(lr=1.0))
    with pytest.raises(ValueError, match=r"refused: it holds a pickled object \(argparse.Namespace\)"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>Not found</html>", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)) * 4],
    ids=["empty", "web page", "pointer", "noise"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.ckpt: truncated or corrupt, not a readable checkpoint"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, checkpoint: Path, share: float) -> None:
    path = tmp_path / "bad.ckpt"
    whole = checkpoint.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"bad\.ckpt: truncated or corrupt, not a readable checkpoint"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "expected a dict of tensors, or one under 'state_dict', got list"),
        ({"state_dict": {}}, "expected a dict of tensors"),
        ({"state_dict": {"a": 1}}, "entry 'a': expected a tensor by name, got int"),
        ({"state_dict": {3: torch.zeros(1)}}, "entry 3: expected a tensor by name"),
        ({"a": torch.zeros(1).expand(10**12, 8)}, r"'a': \[1000000000000, 8\] is more than the file holds"),
        ({"a": torch.zeros(1)}, "weight 'encoder.conv_in.weight' is missing: not a tokenizer checkpoint"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, contents: Any, message: str) -> None:
    torch.save(contents, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_conv.bias", None, r"weight 'quant_conv.bias' \[32\] is missing"),
        (
            "decoder.up.4.attn.1.q.weight",
            None,
            r"weight 'decoder.up.4.attn.1.q.weight' \[64, 64, 1, 1\] is missing",
        ),
        ("encoder.conv_out.weight", None, "weight 'encoder.conv_out.weight' is missing"),
        (
            "decoder.up.3.block.0.conv1.weight",
            torch.zeros(32, 32, 3, 3),
            r"'decoder.up.3.block.0.conv1.weight': expected shape \[32, 64, 3, 3\], got \[32, 32, 3, 3\]",
        ),
        ("encoder.conv_in.weight", torch.zeros(3), r"'encoder.conv_in.weight': expected 4 dimensions"),
        ("encoder.conv_in.weight", torch.zeros(0, 3, 3, 3), "expected 4 dimensions, none empty"),
        ("encoder.conv_in.weight", torch.zeros(32, 2, 3, 3), "image_channels: expected 1 or 3, got 2"),
        (
            "encoder.down.2.block.0.conv2.weight",
            torch.zeros(33, 32, 3, 3),
            "expected a multiple of the 32 channels",
        ),
        ("encoder.down.2.block.0.conv2.weight", None, r"expected levels numbered from 0, got \[0, 1, 3, 4\]"),
        ("encoder.down.1.block.7.conv2.weight", torch.zeros(32, 32, 3, 3), "as many blocks at every level"),
        (
            "encoder.down.0.extra.weight",
            torch.zeros(2),
            r"unexpected weight 'encoder.down.0.extra.weight' \[2\]",
        ),
        ("quant_conv.bias", torch.zeros(32, dtype=torch.int64), "'quant_conv.bias': expected torch.float32"),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, reference_state: State, key: str, value: Tensor | None, message: str
) -> None:
    state = dict(reference_state)
    if value is None:
        del state[key]
    else:
        state[key] = value
    path = write(tmp_path / "bad.ckpt", state)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(path, ema=False)
    assert str(path) in str(caught.value)


def test_incomplete_averages_are_refused(tmp_path: Path, reference_state: State) -> None:
    state = {name: t for name, t in reference_state.items() if name != "model_ema.quant_convbias"}
    path = write(tmp_path / "bad.ckpt", state)
    with pytest.raises(ValueError, match=r"weight 'model_ema.quant_convbias' \[32\] is missing"):
        Tokenizer.from_pretrained(path, ema=True)
    Tokenizer.from_pretrained(path, ema=False)


def test_without_averages_the_live_weights_are_taken_and_said(tmp_path: Path, reference_state: State) -> None:
    state = {name: t for name, t in reference_state.items() if not name.startswith("model_ema.")}
    path = write(tmp_path / "live.ckpt", state)
    with pytest.warns(UserWarning, match=r"live.ckpt: no averaged weights"):
        tokenizer = Tokenizer.from_pretrained(path)
    assert torch.equal(tokenizer.quantizer.codebook, reference_state["quantize.embedding.weight"])


def test_the_first_stage_of_a_generators_checkpoint(tmp_path: Path, reference_state: State) -> None:
    state = {f"first_stage_model.{name}": t for name, t in reference_state.items()}
    state["transformer.head.weight"] = torch.zeros(2, 2)
    tokenizer = Tokenizer.from_pretrained(write(tmp_path / "stage2.ckpt", state), ema=True)
    assert torch.equal(tokenizer.quantizer.codebook, reference_state["model_ema.quantizeembeddingweight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"image_channels": 1, "channel_multipliers": (2,), "attention_resolutions": ()},
        {"channel_multipliers": (1, 2, 1), "num_res_blocks": 2, "attention_resolutions": (16, 8)},
        {"channel_multipliers": (2, 1), "latent_channels": 7, "attention_resolutions": (16,)},
    ],
)
def test_other_architectures_are_read_off_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {"resolution": 16, "base_channels": 32, "num_res_blocks": 1, "latent_channels": 16, **changes}
    config = TokenizerConfig(**settings, quantizer=QuantizerConfig(codebook_size=11, dim=5))
    tokenizer = Tokenizer(config)
    levels = len(config.channel_multipliers)
    state = {reference_name(name, levels): tensor for name, tensor in tokenizer.state_dict().items()}
    path = write(tmp_path / "other.ckpt", state)
    loaded = Tokenizer.from_pretrained(path, ema=False, resolution=16)
    assert loaded.config == config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_overrides_say_what_shapes_cannot(checkpoint: Path, reference_state: State) -> None:
    tokenizer = Tokenizer.from_pretrained(
        checkpoint,
        ema=False,
        resolution=128,
        dropout=0.1,
        quantizer={"commitment": "paper", "init": "features"},
    )
    assert tokenizer.config.attention_resolutions == (8,)
    assert tokenizer.config.quantizer.commitment == "paper"
    tokenizer.train()(torch.rand(2, 3, 32, 32))
    assert torch.equal(tokenizer.quantizer.codebook, reference_state["quantize.embedding.weight"])
    with pytest.raises(ValueError, match="resolution: expected a multiple of 16"):
        Tokenizer.from_pretrained(checkpoint, resolution=100)
    with pytest.raises(TypeError, match="resolutions"):
        Tokenizer.from_pretrained(checkpoint, resolutions=128)


def test_models_without_a_reference_layout_say_so(checkpoint: Path) -> None:
    class Plain(PretrainedMixin, torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="Plain reads no checkpoints of the published implementation"):
        Plain.from_pretrained(checkpoint)


def test_reading_gives_every_tensor(checkpoint: Path, reference_state: State) -> None:
    state = load_reference_state(checkpoint)
    assert state.keys() == reference_state.keys()


def test_a_loaded_reference_saves_in_the_own_format(checkpoint: Path, tmp_path: Path, golden: Any) -> None:
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    again = Tokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / "own"))
    assert again.config == tokenizer.config
    assert torch.equal(again.encode(golden["image"]).flatten(), golden["ema"]["indices"])
