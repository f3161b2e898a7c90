"""Sampling runs: the command, resuming, several processes, what a kill or a full disk leaves behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_fast.cli import main
from ibq_fast.evaluate import sample_folder
from ibq_fast.evaluate.npz import write_npz
from ibq_fast.evaluate.sample import Share, parse_classes
from ibq_fast.evaluate.sample_folder import read_label
from ibq_fast.generator import Generator, GeneratorConfig
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig

SIDE = 8
CLASSES, PER_CLASS = 4, 16
RUN = ("--per-class", str(PER_CLASS), "--cfg-scale", "1.5", "--temperature", "1.1", "--seed", "5")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
    yield
    torch.set_num_threads(threads)


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
        GeneratorConfig(vocab_size=16, num_classes=CLASSES, grid=(4, 4), depth=2, num_heads=2, width=16)
    )
    torch.nn.init.normal_(generator.head.weight)
    return str(tokenizer.save_pretrained(folder / "tokenizer")), str(
        generator.save_pretrained(folder / "generator")
    )


def words(models: tuple[str, str], out: Path, *options: str) -> list[str]:
    given = ["--tokenizer", models[0], "--generator", models[1], "--out", str(out), "--device", "cpu"]
    return ["sample", *given, *options]


def sample(models: tuple[str, str], out: Path, *options: str) -> dict[str, bytes]:
    assert main(words(models, out, *options)) == 0
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture(scope="module")
def whole(models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A run of 64 images, undisturbed, 64 at a time."""
    return sample(models, tmp_path_factory.mktemp("whole") / "out", *RUN, "--batch-size", "64", "--npz")


def test_a_run_writes_every_image_once(whole: dict[str, bytes]) -> None:
    names = [f"class{c:04d}_{i:05d}.png" for c in range(CLASSES) for i in range(PER_CLASS)]
    assert sorted(whole) == [*names, "grid.png", "run.json", "samples.npz"]
    assert len({whole[name] for name in names}) == 64
    settings = json.loads(whole["run.json"])["settings"]
    assert (settings["cfg_scale"], settings["temperature"], settings["seed"]) == (1.5, 1.1, 5)


def test_the_npz_holds_the_images_in_order(whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "samples.npz").write_bytes(whole["samples.npz"])
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
        array = file["arr_0"]
    assert (array.dtype, array.shape) == (np.uint8, (64, SIDE, SIDE, 3))
    for i in (0, 17, 63):
        (tmp_path / "one.png").write_bytes(whole[f"class{i // PER_CLASS:04d}_{i % PER_CLASS:05d}.png"])
        with Image.open(tmp_path / "one.png") as picture:
            assert np.array_equal(array[i], np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("batch", ["1", "7"])
def test_the_batch_size_changes_no_bit(
    models: tuple[str, str], whole: dict[str, bytes], batch: str, tmp_path: Path
) -> None:
    assert sample(models, tmp_path / "out", *RUN, "--npz", "--batch-size", batch) == whole


def start(models: tuple[str, str], out: Path, rank: int, world: int) -> subprocess.Popen[bytes]:
    """A process of a run, as torchrun starts it."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = [sys.executable, "-m", "ibq_fast.cli", *words(models, out, *RUN, "--npz", "--batch-size", "3")]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_killed_in_the_middle_and_resumed_by_two_processes(
    models: tuple[str, str], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """kill -9 of one process, torn files as a power cut leaves them, two processes to the end: no image is
    missing, doubled or changed, and what was there was not drawn again."""
    out = tmp_path / "out"
    process = start(models, out, 0, 1)
    while len(list(out.glob("class*.png"))) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = sorted(out.glob("class*.png"))
    assert 10 <= len(there) < 64
    assert not (out / "samples.npz").exists()
    there[1].write_bytes(there[1].read_bytes()[:-20])
    there[4].write_bytes(b"")
    damaged = bytearray(there[6].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    there[6].write_bytes(damaged)
    (out / ".class0003_00015.png.999.tmp").write_bytes(b"torn")
    kept = {file: file.stat().st_mtime_ns for file in there if file not in (there[1], there[4], there[6])}
    processes = [start(models, out, rank, 2) for rank in range(2)]
    said = [process.communicate()[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said == [f"64 images and {out / 'grid.png'}\n", ""]
    assert contents(out) == whole
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def changed(setting: str, value: str) -> tuple[str, ...]:
    options = list(RUN)
    options[options.index(setting) + 1] = value
    return tuple(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (changed("--temperature", "1.2"), "temperature is 1.1 there, 1.2 here"),
        (changed("--seed", "6"), "seed is 5 there, 6 here"),
        (changed("--per-class", "8"), "per_class is 16 there, 8 here"),
        ((*RUN, "--precision", "bf16"), 'precision is "float32" there, "bf16" here'),
        ((*RUN, "--cfg-schedule", "linear"), 'cfg_schedule is "constant" there, "linear" here'),
        ((*RUN, "--classes", "0-2"), r"classes is [0, 1, 2, 3] there, [0, 1, 2] here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_refused_by_name(
    models: tuple[str, str],
    whole: dict[str, bytes],
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.json").write_bytes(whole["run.json"])
    assert main(words(models, tmp_path, *options)) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("error: out: expected a new folder, or the settings in ")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_other_weights_and_other_peoples_images_are_refused(
    models: tuple[str, str], whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "class0000_00003.png").write_bytes(whole["grid.png"])
    assert main(words(models, tmp_path, *RUN)) == 1
    assert "class0000_00003.png is not of this run" in capsys.readouterr().err
    other = Generator.from_pretrained(models[1])
    with torch.no_grad():
        other.blocks[1].mlp.down.weight[-1, -1] += 1
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_bytes(whole["run.json"])
    assert main(words((models[0], str(tmp_path / "other")), tmp_path / "out", *RUN)) == 1
    assert "generator_weights is " in capsys.readouterr().err


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"settings": 3}', b"\xff\xfe"], ids=str)
def test_a_corrupt_manifest_is_written_again_where_the_images_say_the_same(
    models: tuple[str, str],
    whole: dict[str, bytes],
    broken: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "run.json").write_bytes(broken)
    assert main(words(models, tmp_path, *changed("--seed", "6"))) == 1
    assert "is not of this run" in capsys.readouterr().err
    assert sample(models, tmp_path, *RUN) == whole
    said = " ".join(capsys.readouterr().err.split())
    assert "run.json cannot be read: written again, the images are of this run" in said
    assert "64 of 64 images are there" in said


def test_a_full_disk_stops_the_run_and_nothing_is_lost(
    models: tuple[str, str],
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "class0001_00002" in self.name:
            write(self, data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(sample_folder.Path, "write_bytes", full)
        assert main(words(models, tmp_path / "out", *RUN, "--npz")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device; make room and give the same command again" in error
    assert len(list((tmp_path / "out").glob("class*.png"))) == PER_CLASS + 2
    assert not list((tmp_path / "out").glob(".*"))
    assert sample(models, tmp_path / "out", *RUN, "--npz") == whole


def test_unconditional_greedy_and_preset(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sample(models, tmp_path / "a", "--classes", "none", "--per-class", "2", "--top-k", "1")
    assert sorted(images) == ["class0004_00000.png", "class0004_00001.png", "grid.png", "run.json"]
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.size == (2 * SIDE + 2, SIDE)
    pixels = [np.asarray(Image.open(tmp_path / "a" / f"class0004_0000{i}.png")) for i in range(2)]
    assert np.array_equal(*pixels)
    preset = ("--classes", "1", "--per-class", "1", "--preset", "XL", "--temperature", "0.9")
    settings = json.loads(sample(models, tmp_path / "b", *preset)["run.json"])["settings"]
    assert (settings["cfg_scale"], settings["temperature"], settings["top_k"]) == (2.35, 0.9, 0)


def test_class_lists() -> None:
    assert parse_classes("all", 3) == [0, 1, 2]
    assert parse_classes("none", 3) == [3]
    assert parse_classes("3,7, 20-22,3", 30) == [3, 7, 20, 21, 22]
    for text in ("", "x", "1-", "-1", "5-3", "30", "1;2"):
        with pytest.raises(ValueError, match="classes: expected"):
            parse_classes(text, 30)


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Share.of_environment() == Share(0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE, LOCAL_RANK: expected numbers as torchrun sets"):
        Share.of_environment()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Share.of_environment() == Share(3, 4, 1)


def test_only_whole_pngs_have_a_label(whole: dict[str, bytes], tmp_path: Path) -> None:
    data = whole["class0002_00001.png"]
    run = json.loads(whole["run.json"])["run"]
    cases: list[tuple[bytes, Any]] = [
        (data, f"{run} 33"),
        (whole["grid.png"], ""),
        (data + b"x", None),
        (b"GIF89a", None),
        *((data[:cut], None) for cut in range(0, len(data), 7)),
    ]
    for content, expected in cases:
        (tmp_path / "a.png").write_bytes(content)
        assert read_label(tmp_path / "a.png") == expected


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((2, 2, 3), np.uint8)], "images: expected 2, got 1"),
        ([np.zeros((2, 2, 1), np.uint8)] * 2, r"images: expected uint8 \[H, W, 3\], got uint8 \[2, 2, 1\]"),
        (
            [np.zeros((2, i, 3), np.uint8) for i in (2, 3)],
            r"images: expected all of \[2, 2, 3\], got \[2, 3, 3\]",
        ),
    ],
    ids=["too few", "grey", "sizes"],
)
def test_a_wrong_npz_is_not_left_behind(images: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "a.npz", images, 2)
    assert list(tmp_path.iterdir()) == []
