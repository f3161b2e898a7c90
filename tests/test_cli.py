"""The ``ibq-fast`` command: what it writes, what it says, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_fast import doctor, ops
from ibq_fast.cli import main
from ibq_fast.generator import Generator, GeneratorConfig
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig
from ibq_fast.train.tokenizer import TokenizerTask

SIDE = 8
torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of a tokenizer and a generator that were never trained."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = Tokenizer(
        TokenizerConfig(
            resolution=SIDE,
            base_channels=32,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(),
            latent_channels=32,
            quantizer=QuantizerConfig(codebook_size=16, dim=8),
        )
    )
    generator = Generator(
        GeneratorConfig(vocab_size=16, num_classes=3, grid=(4, 4), depth=1, num_heads=2, width=16)
    )
    torch.nn.init.normal_(generator.head.weight)
    return str(tokenizer.save_pretrained(folder / "tokenizer")), str(
        generator.save_pretrained(folder / "generator")
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(np.full((10 + i, 12, 3), 40 * i, np.uint8)).save(root / "a" / f"{i}.png")
    return root


def test_reconstruct_writes_pictures_and_figures(
    models: tuple[str, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = photos / "a" / "9.png"
    broken.write_bytes((photos / "a" / "0.png").read_bytes()[:-30])
    arguments = [
        "reconstruct",
        str(photos),
        "--tokenizer",
        models[0],
        "--out",
        str(tmp_path / "out"),
        "--batch-size",
        "2",
    ]
    assert main([*arguments, "--columns", "3", "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["images"] == 5
    assert 0 < report["psnr"] < 60
    assert report["codes_used"] == round(report["utilisation"] * 16) > 0
    assert [Path(path).name for path, _ in report["unreadable"]] == ["9.png"]
    with Image.open(tmp_path / "out" / "reconstructions.png") as grid:
        assert grid.size == (3 * SIDE + 4, 4 * SIDE + 6)
    assert (tmp_path / "out" / "usage.png").is_file()
    said = capsys.readouterr()
    assert "5 images  PSNR" in said.out
    assert f"not read: {broken}: " in said.err


RECONSTRUCT = ["reconstruct", "--tokenizer", "{tokenizer}"]
SAMPLE = ["sample", "--tokenizer", "{tokenizer}", "--generator", "{generator}"]
TRAIN = ["train", "tokenizer", "--run.steps=3", "--data.val_fraction=0.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RECONSTRUCT, "{photos}/none"], "images: expected a file or a folder"),
        ([*RECONSTRUCT, "{photos}/empty"], "images: expected at least one that can be read"),
        (
            [*RECONSTRUCT, "{photos}", "--tokenizer={photos}/none"],
            "is neither a file, a directory nor a hub id",
        ),
        ([*RECONSTRUCT, "{photos}", "--device=warp"], "device: expected one that is available"),
        ([*SAMPLE, "--classes=9"], "classes: expected ids from 0 to 2"),
        ([*SAMPLE, "--top-p=2"], "top_p: expected"),
        ([*SAMPLE, "--tokenizer={generator}"], "expected 'Tokenizer', got 'Generator'"),
        ([*TRAIN, "--data.root={photos}/none"], "{photos}/none"),
        ([*TRAIN, "--run.stepz=3"], "unknown key 'run.stepz'; did you mean 'run.steps'?"),
        (["train", "decoder"], "expected tokenizer or generator, got 'decoder'"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    message: str,
    models: tuple[str, str],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (photos / "empty").mkdir()
    names = {"photos": str(photos), "tokenizer": models[0], "generator": models[1]}
    words = [word.format(**names) for word in arguments]
    out = [f"--run.dir={tmp_path / 'out'}"] if words[0] == "train" else ["--out", str(tmp_path / "out")]
    assert main([*words, *(out if words[1] != "decoder" else [])]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert message.format(**names) in said[0]


def train_words(tmp_path: Path) -> list[str]:
    settings = {
        "run.dir": tmp_path / "run",
        "run.steps": 4,
        "run.device": "cpu",
        "run.tensorboard": "false",
        "run.eval_batches": 1,
        "data.root": tmp_path / "photos",
        "data.val_root": tmp_path / "photos",
        "data.resolution": SIDE,
        "data.batch_size": 2,
        "data.num_workers": 0,
        "model.resolution": SIDE,
        "model.base_channels": 32,
        "model.channel_multipliers": "[1, 1]",
        "model.attention_resolutions": "[]",
        "model.num_res_blocks": 1,
        "model.quantizer.codebook_size": 16,
        "model.quantizer.dim": 8,
    }
    return ["train", "tokenizer", *(f"--{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_its_exit_code_and_resume_goes_on(
    signum: int, code: int, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    update = TokenizerTask.update

    def interrupted(self: TokenizerTask, step: int, progress: float) -> Any:
        if step == 1:
            os.kill(os.getpid(), signum)
        return update(self, step, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTask, "update", interrupted)
        assert main(train_words(tmp_path)) == code
    assert "stopped after step 2, saved in" in capfd.readouterr().err
    assert main([*train_words(tmp_path), "--resume"]) == 0
    assert "resumed from" in capfd.readouterr().err
    assert (tmp_path / "run" / "tokenizer" / "model.safetensors").is_file()


@pytest.mark.parametrize("word", ["--help", "reconstruct --help", "sample --help", "doctor --help"])
def test_help_reads_like_a_manual(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(word.split())
    assert raised.value.code == 0
    text = capsys.readouterr().out
    if "doctor" not in word:
        assert "examples:\n  ibq-fast" in text
    assert max(map(len, text.splitlines())) <= 110


def test_train_help_shows_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "--resume goes on from the newest checkpoint" in capsys.readouterr().out
    assert main(["train", "generator", "--help"]) == 0
    text = capsys.readouterr().out
    words = ("--optim.schedule.plateau", "--model.gate_init", "--run.max_minutes", "micro-batches per update")
    for word in words:
        assert word in " ".join(text.split())


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    show = "import sys; from ibq_fast.cli import build_parser; build_parser().format_help(); "
    code = show + "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_doctor_says_what_is_used_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "compiled extension", "devices", "codebook_search", "composite", "used"):
        assert word in text


def test_doctor_never_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str = "cpu") -> Any:
        raise RuntimeError("driver mismatch")

    monkeypatch.setattr(ops, "backend_report", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(ops.native, "UNAVAILABLE", "the C++ extension is not built")
    report = doctor.report()
    assert report.count("could not be examined: RuntimeError: driver mismatch") == 2
    assert "not in use: the C++ extension is not built" in report
