"""Published checkpoints in and out: nothing that both sides can hold is lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_fast import cli
from ibq_fast.checkpoint.convert import convert
from ibq_fast.checkpoint.reference import published_order, reference_name
from ibq_fast.checkpoint.snapshot import load_snapshot
from ibq_fast.checkpoint.training import latest_checkpoint
from ibq_fast.generator import Generator
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig
from ibq_fast.tokenizer.model import expected_weights

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOKENIZER, GENERATOR = GOLDEN / "tokenizer.ckpt", GOLDEN / "generator.ckpt"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(ours[name]) == bits(tensor), name


def test_a_tokenizer_goes_in_and_out_bit_for_bit(tmp_path: Path) -> None:
    own = convert(TOKENIZER, tmp_path / "own")
    back = load(convert(own, tmp_path / "back.ckpt", to="reference"))
    theirs = load(TOKENIZER)
    assert_same_tensors(back["state_dict"], theirs["state_dict"])
    assert (back["epoch"], back["global_step"]) == (theirs["epoch"], theirs["global_step"])
    assert "pytorch-lightning_version" in back
    # Their loader maps averages to names it has met before: live entries have to come first.
    names = list(back["state_dict"])
    first = next(i for i, name in enumerate(names) if name.startswith("model_ema."))
    assert all(name.startswith("model_ema.") for name in names[first:])


def test_the_own_directory_loads_with_the_averages(tmp_path: Path) -> None:
    own = convert(TOKENIZER, tmp_path / "own")
    for which, name in (("ema", "own"), ("live", "live")):
        if which == "live":
            convert(TOKENIZER, tmp_path / name, weights="live")
        loaded = Tokenizer.from_pretrained(tmp_path / name)
        expected = Tokenizer.from_pretrained(TOKENIZER, ema=which == "ema")
        assert loaded.config == expected.config
        assert_same_tensors(loaded.state_dict(), expected.state_dict())
    assert latest_checkpoint(own / "checkpoints") is not None
    assert sorted(f.name for f in (tmp_path / "live").iterdir()) == ["config.json", "model.safetensors"]


def with_optimizers(path: Path) -> dict[str, Any]:
    """The golden checkpoint with both Adam states, as the published training writes them."""
    contents = load(TOKENIZER)
    state = contents["state_dict"]
    generator = [
        tensor
        for module in ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
        for name, tensor in state.items()
        if name.startswith(module)
    ]
    critic = [
        t for n, t in state.items() if n.startswith("loss.") and n.rsplit(".", 1)[1] in ("weight", "bias")
    ]
    torch.manual_seed(0)
    for weights in (generator, critic):
        parameters = [torch.nn.Parameter(t.clone()) for t in weights]
        adam = torch.optim.Adam(parameters, lr=3e-5, betas=(0.5, 0.9))
        for p in parameters:
            p.grad = torch.randn_like(p)
        adam.step()
        contents["optimizer_states"].append(adam.state_dict())
    torch.save(contents, path)
    return contents


def test_optimizers_go_with_them(tmp_path: Path) -> None:
    theirs = with_optimizers(tmp_path / "full.ckpt")
    own = convert(tmp_path / "full.ckpt", tmp_path / "own")
    back = load(convert(own, tmp_path / "back.ckpt", to="reference"))
    assert len(back["optimizer_states"]) == 2
    for ours, expected in zip(back["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert ours["param_groups"] == expected["param_groups"]
        assert set(ours["state"]) == set(expected["state"])
        for number, entry in expected["state"].items():
            assert_same_tensors(ours["state"][number], entry)
    assert_same_tensors(back["state_dict"], theirs["state_dict"])


def test_moments_find_their_parameters(tmp_path: Path) -> None:
    theirs = with_optimizers(tmp_path / "full.ckpt")
    parts = load_snapshot(tmp_path / "full.ckpt").parts
    state, moments = theirs["state_dict"], parts["tokenizer"]["optimizer"]
    for own in ("decoder.levels.0.blocks.0.conv1.weight", "quantizer.codebook", "encoder.conv_in.bias"):
        number = [n for n in state if not n.startswith(("loss.", "model_ema."))].index(reference_name(own, 5))
        assert torch.equal(moments[own]["exp_avg"], theirs["optimizer_states"][0]["state"][number]["exp_avg"])
    assert parts["discriminator"]["optimizer"]["layers.0.weight"]["exp_avg"].shape == (16, 3, 4, 4)


def test_parameters_are_numbered_as_published(tmp_path: Path) -> None:
    config = Tokenizer.from_pretrained(TOKENIZER).config
    order = [reference_name(own, 5) for own in published_order(expected_weights(config), 5)]
    theirs = [n for n in load(TOKENIZER)["state_dict"] if not n.startswith(("loss.", "model_ema."))]
    assert order == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[0]["param_groups"][0]["params"].pop(), r"optimizer_states\[0\]: expected"),
        (
            lambda s: s[0]["state"][0].update(exp_avg=torch.zeros(2)),
            r"optimizer_states\[0\]: exp_avg of encoder.conv_in.weight: expected \[32, 3, 3, 3\], got \[2\]",
        ),
        (
            lambda s: s[1]["state"].update({10**6: {}}),
            r"optimizer_states\[1\]: expected the state of one Adam",
        ),
    ],
)
def test_optimizers_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    contents = with_optimizers(tmp_path / "full.ckpt")
    change(contents["optimizer_states"])
    torch.save(contents, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        load_snapshot(tmp_path / "bad.ckpt")


def test_a_generator_goes_in_and_out_with_its_first_stage(tmp_path: Path) -> None:
    own = convert(GENERATOR, tmp_path / "gen", num_heads=4, grid=4)
    stage = convert(GENERATOR, tmp_path / "tok", kind="tokenizer")
    back = convert(own, tmp_path / "back.ckpt", to="reference", first_stage=stage)
    assert_same_tensors(load(back)["state_dict"], load(GENERATOR)["state_dict"])
    assert Generator.from_pretrained(own).config.num_heads == 4
    alone = load(convert(own, tmp_path / "alone.ckpt", to="reference"))["state_dict"]
    assert set(alone) == {name for name in load(GENERATOR)["state_dict"] if name.startswith("transformer.")}


def test_one_set_of_weights_is_its_own_average(tmp_path: Path) -> None:
    """The published evaluation keeps random weights where a file has no averages."""
    live = Tokenizer.from_pretrained(TOKENIZER, ema=False)
    live.save_pretrained(tmp_path / "plain")
    state = load(convert(tmp_path / "plain", tmp_path / "plain.ckpt", to="reference"))["state_dict"]
    assert torch.equal(state["model_ema.quantizeembeddingweight"], state["quantize.embedding.weight"])
    assert_same_tensors(Tokenizer.from_pretrained(tmp_path / "plain.ckpt").state_dict(), live.state_dict())


def test_what_the_published_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    quantizer = QuantizerConfig(codebook_size=8, dim=4, similarity="euclidean")
    config = TokenizerConfig(
        resolution=8, base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(),
        latent_channels=8, quantizer=quantizer,
    )  # fmt: skip
    Tokenizer(config).save_pretrained(tmp_path / "euclidean")
    with pytest.raises(
        ValueError, match="dot-product logits only, got kind 'ibq' with similarity 'euclidean'"
    ):
        convert(tmp_path / "euclidean", tmp_path / "out.ckpt", to="reference")
    assert [f.name for f in tmp_path.iterdir()] == ["euclidean"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    own = convert(TOKENIZER, tmp_path / "own")
    (own / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"own: exists; expected a new path, or --force"):
        convert(TOKENIZER, own)
    assert (own / "notes.txt").read_text() == "mine"
    convert(TOKENIZER, own, weights="live", force=True)
    assert sorted(f.name for f in own.iterdir()) == ["config.json", "model.safetensors"]
    file = convert(own, tmp_path / "file.ckpt", to="reference")
    assert convert(own, file, to="reference", force=True) == file
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file.ckpt", "own"]


def test_a_failed_write_leaves_the_old_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = convert(TOKENIZER, tmp_path / "own", weights="live")
    before = (own / "model.safetensors").read_bytes()
    (tmp_path / "file.ckpt").write_text("old")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("ibq_fast.checkpoint.convert.save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        convert(TOKENIZER, own, force=True)
    with pytest.raises(OSError, match="No space left"):
        convert(own, tmp_path / "file.ckpt", to="reference", force=True)
    assert (own / "model.safetensors").read_bytes() == before
    assert (tmp_path / "file.ckpt").read_text() == "old"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file.ckpt", "own"]


def test_training_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    own = convert(TOKENIZER, tmp_path / "own")
    model = Tokenizer.from_pretrained(own)
    model.quant_conv.bias.data += 1
    model.save_pretrained(own)
    with pytest.raises(
        ValueError, match=r"its model.safetensors is not of the training state in checkpoints/"
    ):
        load_snapshot(own)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file, a directory nor a hub id"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"expected a model's directory .* or a run's"):
        convert(tmp_path, tmp_path / "out")
    Tokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="ema: expected averaged weights, the source has one set"):
        convert(tmp_path / "one", tmp_path / "out", weights="ema")
    with pytest.raises(ValueError, match="grid: expected only with a published checkpoint"):
        convert(tmp_path / "one", tmp_path / "out", grid=4)
    with pytest.raises(
        ValueError, match="num_heads: a published tokenizer takes resolution, dropout, quantizer"
    ):
        convert(TOKENIZER, tmp_path / "out", num_heads=4)
    with pytest.raises(ValueError, match=r"one: expected a generator, got a tokenizer"):
        convert(tmp_path / "one", tmp_path / "out", kind="generator")
    with pytest.raises(ValueError, match="first_stage: expected only when a generator"):
        convert(TOKENIZER, tmp_path / "out", first_stage=tmp_path / "one")
    torch.save({"state_dict": {}, "x": argparse.Namespace()}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="refused: it holds a pickled object"):
        convert(tmp_path / "bad.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, back = str(tmp_path / "own"), str(tmp_path / "back.ckpt")
    assert cli.main(["convert", str(TOKENIZER), own, "--resolution", "64"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{own}\n"
    assert "reading" in shown.err
    assert "MiB" in shown.err
    assert Tokenizer.from_pretrained(own).config.resolution == 64
    assert cli.main(["convert", own, back, "--to", "reference"]) == 0
    assert cli.main(["convert", own, back, "--to", "reference"]) == 1
    assert "error: " in capsys.readouterr().err
    assert cli.main(["convert", own, back, "--to", "reference", "--live", "--force"]) == 0
    state = load(Path(back))["state_dict"]
    assert torch.equal(state["model_ema.quant_convbias"], load(TOKENIZER)["state_dict"]["quant_conv.bias"])
    gen = str(tmp_path / "gen")
    assert cli.main(["convert", str(GENERATOR), gen, "--num-heads", "4", "--grid", "4"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["convert", own, back, "--ema", "--live"])
