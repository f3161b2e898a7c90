"""Whole evaluations: the same figures however they are cut, interrupted or spread; reports and commands."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import exit_codes, run_ranks, start_ranks
from tiny import tiny_tokenizer

import ibq_fast.evaluate.streaming
import ibq_fast.evaluate.tokenizer
from ibq_fast.cli import main
from ibq_fast.data import fashion_mnist, to_float, to_uint8
from ibq_fast.evaluate.frechet import frechet_distance
from ibq_fast.evaluate.generator import Reference, evaluate_generator
from ibq_fast.evaluate.moments import Moments
from ibq_fast.evaluate.opening import processes
from ibq_fast.evaluate.protocols import PROTOCOLS, find_protocol
from ibq_fast.evaluate.similarity import pixel_errors
from ibq_fast.evaluate.sources import ArraySource, tensor_source
from ibq_fast.evaluate.tokenizer import evaluate_tokenizer
from ibq_fast.evaluate.trunks import Weights, build_trunk

PROTOCOL = find_protocol("uint8-bicubic", trunks=("efficientnet_lite0",), lpips=())
SIDE = 16
IMAGES = 230  # four blocks, the last one ragged


def source(count: int = IMAGES) -> ArraySource:
    images = fashion_mnist("test").images[:count, :, 8:24, 8:24].expand(-1, 3, -1, -1)
    return tensor_source(images, "photographs")


def evaluate(out: Path, **options: Any) -> dict[str, Any]:
    made = evaluate_tokenizer(tiny_tokenizer(), source(), PROTOCOL, out, pictures=False, **options)
    return {} if made is None else dict(made.report["figures"])


def in_a_process(out: Path, kill_after: int | None = None) -> int:
    """What torchrun starts; ``kill_after`` so many blocks this process ends like a lost machine's."""
    with processes("cpu"):
        if kill_after is not None:
            count, save = 0, ibq_fast.evaluate.streaming._save

            def saved_then_killed(*arguments: Any) -> None:
                nonlocal count
                save(*arguments)
                count += 1
                if count == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            ibq_fast.evaluate.streaming._save = saved_then_killed
        evaluate(out, save_seconds=0.0)
    return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate(tmp_path_factory.mktemp("whole") / "out")


def figures(out: Path) -> dict[str, Any]:
    assert not (out / "progress").exists()
    found: dict[str, Any] = json.loads((out / "report.json").read_text())["figures"]
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a == pytest.approx(b, rel=1e-6, abs=0)


def test_figures_are_those_of_the_plain_formulas(whole: dict[str, Any]) -> None:
    tokenizer, images = tiny_tokenizer(), source().block(0, IMAGES).images
    codes = tokenizer.encode(images)
    copies = to_uint8(tokenizer.decode(codes))
    errors = pixel_errors(images, copies)
    assert whole["psnr"] == pytest.approx(float(errors.psnr.mean()))
    assert whole["l1"] == pytest.approx(float(errors.l1.mean()))
    assert whole["psnr_of_mean_error"] == pytest.approx(10 * np.log10(255**2 / float(errors.mse.mean())))
    assert whole["codes_used"] == len(codes.unique())
    trunk = build_trunk("efficientnet_lite0", Weights(), torch.device("cpu"))
    both = []
    for side in (images, copies):
        both.append(Moments(trunk.width))
        both[-1].update(trunk(to_float(side)).pooled)
    expected = frechet_distance(both[0].gaussian(), both[1].gaussian())
    assert whole["frechet_efficientnet_lite0"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [17, 64])
def test_the_batch_size_changes_nothing(whole: dict[str, Any], tmp_path: Path, size: int) -> None:
    same(evaluate(tmp_path, batch_size=size), whole)


@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_processes_changes_nothing(whole: dict[str, Any], tmp_path: Path, world: int) -> None:
    run_ranks(world, in_a_process, tmp_path)
    same(figures(tmp_path), whole)


def test_killed_and_taken_up_by_other_processes(whole: dict[str, Any], tmp_path: Path) -> None:
    assert exit_codes(start_ranks(1, in_a_process, tmp_path, 2)) == [-signal.SIGKILL]
    assert not (tmp_path / "report.json").exists()
    lines: list[str] = []
    # A killed process of two, with one block more; then the rest alone.
    assert -signal.SIGKILL in exit_codes(start_ranks(2, in_a_process, tmp_path, 1), 20.0)
    same(evaluate(tmp_path, say=lines.append), whole)
    assert re.fullmatch(r"taken up: [23] of 4 blocks were measured before", lines[0])


def test_progress_of_something_else_is_thrown_away(whole: dict[str, Any], tmp_path: Path) -> None:
    measure, blocks = ibq_fast.evaluate.tokenizer._Meter.__call__, 0

    def stopped(self: Any, *arguments: Any) -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 3:
            raise KeyboardInterrupt
        measure(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ibq_fast.evaluate.tokenizer._Meter, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path, save_seconds=0.0)
    lines: list[str] = []
    protocol = replace(PROTOCOL, features_of="float")
    evaluate_tokenizer(tiny_tokenizer(), source(), protocol, tmp_path, pictures=False, say=lines.append)
    assert "progress of another evaluation, thrown away" in lines[0]


def test_the_published_rounding(tmp_path: Path) -> None:
    """PSNR of images that both went through float32 and were cut off, as the published evaluation's are."""
    protocol = replace(PROTOCOLS["reference-256"], resolution=SIDE, trunks=(), lpips=())
    made = evaluate_tokenizer(tiny_tokenizer(), source(20), protocol, tmp_path, pictures=False)
    assert made is not None
    tokenizer, images = tiny_tokenizer(), source().block(0, 20).images.numpy()
    x = torch.from_numpy((images / 127.5 - 1.0).astype(np.float32))
    copies = tokenizer.decode(tokenizer.encode(x), clamp=True)
    a, b = (((side + 1) / 2 * 255.0).to(torch.uint8) for side in (x, copies))
    assert not np.array_equal(a.numpy(), images)
    assert made.figures["psnr"] == pytest.approx(float(pixel_errors(a, b).psnr.mean()), rel=1e-12)
    assert made.report["deviations"] == ["20 images, where the protocol has 50,000"]


def test_generated_images_against_images_and_against_their_statistics(tmp_path: Path) -> None:
    everything = source(200)
    protocol = replace(PROTOCOL, resolution=SIDE, neighbour_images=60)
    samples = tensor_source(torch.from_numpy(everything.array[:100].copy()).flip(-1), "mirrored")
    options: dict[str, Any] = {"device": torch.device("cpu")}
    made = evaluate_generator(samples, Reference(everything), protocol, tmp_path / "a", **options)
    assert made is not None
    assert all(value is not None for value in made["figures"].values())
    assert 0 < made["figures"]["recall_efficientnet_lite0"] <= 1
    words = ["evaluate", "generator", "--samples", str(tmp_path / "s.npz"), "--device", "cpu"]
    np.savez(tmp_path / "s.npz", np.ascontiguousarray(samples.array.transpose(0, 2, 3, 1)))
    trunk = ["--trunk", "efficientnet_lite0", "--out", str(tmp_path / "b")]
    statistics = tmp_path / "a" / "reference_efficientnet_lite0.npz"
    assert main([*words, *trunk, "--reference", str(statistics)]) == 0
    again = json.loads((tmp_path / "b" / "report.json").read_text())
    for name in ("frechet", "spatial_frechet", "class_score"):
        name = f"{name}_efficientnet_lite0"
        assert again["figures"][name] == pytest.approx(made["figures"][name], rel=1e-6)
    assert "statistics alone" in again["missing"]["precision_efficientnet_lite0"]
    assert main([*words, "--out", str(tmp_path / "c"), "--reference", str(statistics)]) == 1
    assert main([*words, *trunk, "--resize", "none", "--reference", str(statistics)]) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_and_identical_sets(count: int, tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, resolution=SIDE, neighbours=1)
    made = evaluate_generator(
        source(count), Reference(source(count)), protocol, tmp_path, device=torch.device("cpu")
    )
    assert made is not None
    found = made["figures"]
    if count == 1:
        assert found["frechet_efficientnet_lite0"] is None
        assert made["missing"]["precision_efficientnet_lite0"] == "takes more than 1 images of each set"
    else:
        assert found["frechet_efficientnet_lite0"] == pytest.approx(0.0, abs=1e-9)
        assert found["precision_efficientnet_lite0"] == 1.0
    assert found["class_score_efficientnet_lite0"] == pytest.approx(1.0, abs=1e-12)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_tokenizer().save_pretrained(tmp_path / "model"))
    (tmp_path / "photos").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "x.png").write_bytes(b"broken")
    words = ["evaluate", "tokenizer", "--tokenizer", model, "--device", "cpu", str(tmp_path / "photos")]
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main([*words, "--out", a]) == 0
    assert main([*words, "--out", b, "--resize", "bilinear-opencv", "--trunk", "none"]) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["images"]["count"] == 3
    assert report["images"]["unreadable"][0][0].endswith("x.png")
    assert report["figures"]["lpips_alex"] is None  # no weights here
    assert "lpips_alex" in report["missing"]
    assert report["networks"]["efficientnet_lite0"]["sha256"]
    for name in ("reconstructions", "worst", "best", "usage", "codebook"):
        with Image.open(tmp_path / "a" / f"{name}.png") as picture:
            assert min(picture.size) >= 32
    text = (tmp_path / "a" / "report.md").read_text()
    for word in ("| psnr |", "bicubic-antialiased", "worst.png", "x.png", "ibq_fast", "Missing:"):
        assert word in text
    capsys.readouterr()
    assert main(["evaluate", "compare", a, a]) == 0
    assert capsys.readouterr().err == ""
    assert main(["evaluate", "compare", a, b]) == 0
    said = capsys.readouterr()
    assert "| psnr |" in said.out
    assert "protocol.resize: bicubic-antialiased / bilinear-opencv" in said.err
    assert main(["evaluate", "compare", a, b, "--strict"]) == 1
    assert main(["evaluate", "compare", a, str(tmp_path / "photos" / "0.png")]) == 1
    assert main([*words, "--out", a, "--protocol", "best"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: protocol: expected one of")


@pytest.mark.parametrize("word", ["tokenizer", "generator", "compare"])
def test_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", word, "--help"])
    text = capsys.readouterr().out
    assert "examples:\n  ibq-fast evaluate" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "torch" in sys.modules  # this process has it; see test_cli for one that has not
