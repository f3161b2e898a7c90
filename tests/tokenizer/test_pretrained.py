"""Saving and loading in the project's own format."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from ibq_fast.checkpoint.pretrained import CONFIG_NAME, WEIGHTS_NAME
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig


def assert_same(a: Tokenizer, b: Tokenizer) -> None:
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert bits(tensor) == bits(theirs[name]), name


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def saved(small: Tokenizer, tmp_path: Path) -> Path:
    return small.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_round_trip_is_exact(
    small: Tokenizer, tmp_path: Path, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    small.to(dtype=dtype, memory_format=memory_format)
    with torch.no_grad():
        small.quant_conv.bias[0] = float("nan")
        small.quant_conv.bias[1] = -0.0
    loaded = Tokenizer.from_pretrained(small.save_pretrained(tmp_path / "deep" / "model"))
    assert_same(small, loaded)
    assert not loaded.training
    assert sorted(os.listdir(tmp_path / "deep" / "model")) == [CONFIG_NAME, WEIGHTS_NAME]
    assert os.listdir(tmp_path / "deep") == ["model"]


def test_a_quantizer_waiting_for_features_round_trips(small_config: TokenizerConfig, tmp_path: Path) -> None:
    quantizer = QuantizerConfig(codebook_size=32, dim=8, similarity="euclidean", init="features")
    tokenizer = Tokenizer(replace(small_config, quantizer=quantizer))
    fresh = Tokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / "fresh"))
    assert not fresh.quantizer.initialized
    tokenizer.train()(torch.rand(4, 1, 16, 16))
    trained = Tokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / "trained"))
    assert trained.quantizer.initialized
    assert_same(tokenizer, trained)


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    Tokenizer.from_pretrained(saved)
    assert torch.equal(torch.rand(4), wanted)


def test_a_second_save_replaces_the_model_and_nothing_else(
    small: Tokenizer, small_config: TokenizerConfig, saved: Path
) -> None:
    (saved / "notes.txt").write_text("mine")
    with torch.no_grad():
        small.quant_conv.weight += 1
    small.save_pretrained(saved)
    assert_same(small, Tokenizer.from_pretrained(saved))
    other = Tokenizer(replace(small_config, latent_channels=24))
    other.save_pretrained(saved)
    assert_same(other, Tokenizer.from_pretrained(saved))
    assert sorted(os.listdir(saved)) == [CONFIG_NAME, WEIGHTS_NAME, "notes.txt"]
    assert os.listdir(saved.parent) == ["model"]


class Killed(BaseException):
    """Stands for the process ending: nothing catches it by type."""


@pytest.mark.parametrize("same_settings", [True, False])
@pytest.mark.parametrize("survived", range(4))
def test_interrupted_saves_never_mix_two_models(
    small: Tokenizer,
    small_config: TokenizerConfig,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
    same_settings: bool,
) -> None:
    """The save ends before its ``survived``-th step that changes the directory's contents."""
    torch.manual_seed(1)
    config = small_config if same_settings else replace(small_config, dropout=0.5, image_channels=3)
    other = Tokenizer(config)
    steps = 0

    def dying(action: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > survived:
                raise Killed
            return action(*args, **kwargs)

        return step

    finished = True
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        try:
            other.save_pretrained(saved)
        except Killed:
            finished = False
    if (saved / CONFIG_NAME).exists():
        found = Tokenizer.from_pretrained(saved)
        written = torch.equal(found.quant_conv.weight, other.quant_conv.weight)
        assert_same(found, other if written else small)
        assert written or not finished
    else:
        assert not same_settings
        assert not finished
        with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
            Tokenizer.from_pretrained(saved)
    other.save_pretrained(saved)
    assert_same(other, Tokenizer.from_pretrained(saved))


def test_save_refuses_a_file(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="directory: expected a directory"):
        small.save_pretrained(tmp_path / "file")


def edit_config(saved: Path, **changes: Any) -> None:
    document = json.loads((saved / CONFIG_NAME).read_text())
    for path, value in changes.items():
        target = document["config"]
        *outer, last = path.split("__")
        for key in outer:
            target = target[key]
        target[last] = value
    (saved / CONFIG_NAME).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("chanels", 3, "config.chanels: unknown setting; TokenizerConfig has image_channels"),
        ("quantizer__code_size", 3, "config.quantizer.code_size: unknown setting"),
        ("base_channels", "32", "config.base_channels: expected int, got str '32'"),
        ("base_channels", 32.0, "config.base_channels: expected int, got float 32.0"),
        ("base_channels", True, "config.base_channels: expected int, got bool True"),
        ("base_channels", None, "config.base_channels: expected int, got NoneType None"),
        ("base_channels", 32 * 10**12, "expected 32 to 8192 channels per level"),
        ("channel_multipliers", [1] * 10**5, "channel_multipliers: expected 1 to 8 levels, got 100000"),
        ("channel_multipliers", [1, "2"], r"config.channel_multipliers\[1\]: expected int, got str '2'"),
        ("channel_multipliers", 2, "config.channel_multipliers: expected a list, got int 2"),
        ("num_res_blocks", 10**9, "num_res_blocks: expected 1 to 32"),
        ("dropout", float("nan"), "config.dropout: expected a finite number, got float nan"),
        ("dropout", 10**400, "config.dropout: expected a finite number"),
        ("quantizer", [1], "config.quantizer: expected an object of settings"),
        ("quantizer__kind", "rvq", r"config.quantizer.kind: expected one of \['ibq', 'vq'\], got str 'rvq'"),
        ("quantizer__codebook_size", -1, "codebook_size: expected at least 1, got -1"),
        ("quantizer__codebook_size", 10**12, r"'quantizer.codebook': expected shape \[1000000000000, 8\]"),
        ("quantizer__codebook_size", 10**30, "no model can have these settings"),
    ],
)
def test_hostile_config(saved: Path, key: str, value: Any, message: str) -> None:
    edit_config(saved, **{key: value})
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected an object with the keys model, format and config, got list"),
        ("{}", r"expected an object with the keys model, format and config, got \[\]"),
        ('{"model": "Generator", "format": 1, "config": {}}', "model: expected 'Tokenizer', got 'Generator'"),
        ('{"model": "Tokenizer", "format": 2, "config": {}}', "format: expected 1, got 2"),
        (" " * (1 << 20) + "{}", "expected at most 1048576 bytes"),
    ],
    ids=["truncated", "deep", "list", "empty", "other model", "newer format", "large"],
)
def test_malformed_config(saved: Path, text: str, message: str) -> None:
    (saved / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(saved)


def rewrite_weights(saved: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(saved / WEIGHTS_NAME)
    change(state)
    save_file(state, saved / WEIGHTS_NAME)


def drop(state: dict[str, Tensor]) -> None:
    del state["encoder.conv_in.bias"]


def misshape(state: dict[str, Tensor]) -> None:
    state["quant_conv.bias"] = torch.zeros(9)


def add(state: dict[str, Tensor]) -> None:
    state["encoder.conv_in.scale"] = torch.zeros(2)


def retype(state: dict[str, Tensor]) -> None:
    state["quant_conv.bias"] = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"weight 'encoder.conv_in.bias' \[32\] is missing"),
        (misshape, r"weight 'quant_conv.bias': expected shape \[8\] from the settings, got \[9\]"),
        (add, r"unexpected weight 'encoder.conv_in.scale' \[2\]"),
        (retype, "weight 'quant_conv.bias': expected torch.float32, got torch.int64"),
    ],
)
def test_weights_that_do_not_fit(saved: Path, change: Any, message: str) -> None:
    rewrite_weights(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(saved)
    assert WEIGHTS_NAME in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 1000, -100])
def test_truncated_weights(saved: Path, size: int) -> None:
    whole = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file \(truncated"):
        Tokenizer.from_pretrained(saved)


def test_what_is_not_there(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file, a directory nor a hub id"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither a file, a directory nor a hub id"):
        Tokenizer.from_pretrained("runs/model.ckpt")
    with pytest.raises(ValueError, match="expected the directory that holds model"):
        Tokenizer.from_pretrained(saved / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="resolution: expected only with a reference checkpoint"):
        Tokenizer.from_pretrained(saved, resolution=64)
    with pytest.raises(ValueError, match="revision: expected only with a hub id"):
        Tokenizer.from_pretrained(saved, revision="main")
    (saved / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="the directory has no weights"):
        Tokenizer.from_pretrained(saved)
    (saved / CONFIG_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        Tokenizer.from_pretrained(saved)


def test_hub_repositories(
    small: Tokenizer, saved: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    (published / "tokenizer.ckpt").symlink_to(checkpoint)
    folders = {"someone/own": saved, "someone/published": published, "someone/empty": tmp_path}
    asked: list[tuple[str, Any, list[str]]] = []

    def snapshot_download(repository: str, *, revision: Any, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        if repository not in folders:
            raise OSError("offline")
        return str(folders[repository])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(small, Tokenizer.from_pretrained("someone/own", revision="v1"))
    assert asked == [("someone/own", "v1", [CONFIG_NAME, WEIGHTS_NAME])]
    assert Tokenizer.from_pretrained("someone/published").config.quantizer.codebook_size == 256
    assert asked[-1] == ("someone/published", None, ["*.ckpt"])
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or one \.ckpt file"):
        Tokenizer.from_pretrained("someone/empty")
    with pytest.raises(FileNotFoundError, match="the hub could not give it: offline"):
        Tokenizer.from_pretrained("someone/else")
