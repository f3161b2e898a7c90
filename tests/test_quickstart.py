"""The quick start: a tiny run writes all that a full one does, and its parts keep their promises."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ibq_fast.data.config
from ibq_fast.data import InMemoryImages, fashion_mnist
from ibq_fast.generator import Generator
from ibq_fast.quickstart import Options, clock, pictures, threads
from ibq_fast.quickstart.__main__ import build_parser, main
from ibq_fast.quickstart.classifier import recognise, train_classifier
from ibq_fast.quickstart.clock import StageClock
from ibq_fast.quickstart.measure import Samples
from ibq_fast.quickstart.report import summary
from ibq_fast.quickstart.targets import TARGETS, judge
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train import read_metrics

CPU = torch.device("cpu")
PICTURES = ("reconstructions.png", "samples.png", "usage.png", "curves.png")
TINY = [
    *("--steps-scale", "0.002", "--samples-per-class", "1", "--held-out", "40"),
    *("--tokenizer", "model.quantizer.codebook_size=64", "--generator", "model.vocab_size=64"),
    *("--generator", "model.depth=1", "--generator", "model.width=48"),
]


@pytest.fixture(scope="module")
def few_images() -> Any:
    """The embedded data set, cut to 200 training and 60 held-out images."""

    def few(split: Any, **options: Any) -> InMemoryImages:
        full = fashion_mnist(split, **options)
        count = 200 if split == "train" else 60
        return InMemoryImages(
            full.images[:count],
            full.labels[:count],
            full.classes,
            channels=full.channels,
            flip=full.flip,
            seed=full.seed,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ibq_fast.data.config, "fashion_mnist", few)
        yield


@pytest.fixture(scope="module")
def finished(few_images: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    assert main(["--out", str(out), *TINY]) == 0
    return out


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_a_run_writes_pictures_and_reports(finished: Path) -> None:
    for name in PICTURES:
        with Image.open(finished / name) as picture:
            picture.load()
            assert min(picture.size) > 100
    text = (finished / "report.md").read_text()
    for words in (*PICTURES, "plain VQ", "Ankle boot", "PSNR", "All of it".lower(), "Below target"):
        assert words in text


def test_the_report_holds_figures_times_protocol_and_machine(finished: Path) -> None:
    report = report_of(finished)
    assert [target["figure"] for target in report["targets"]] == ["psnr", "utilisation", "recognised"]
    assert report["met"] is False  # after three steps
    for name in ("IBQ", "plain VQ"):
        assert report["tokenizers"][name].keys() >= {
            "psnr",
            "ssim",
            "frechet_efficientnet_lite0",
            "utilisation",
            "perplexity",
        }
    for name in ("tokenizer", "vq", "generator"):
        evaluated = json.loads((finished / "evaluation" / name / "report.json").read_text())
        assert evaluated["protocol"]["resolution"] == 32
    assert (
        report["tokenizers"]["plain VQ"]["psnr"]
        == report_of(finished / "evaluation" / "vq")["figures"]["psnr"]
    )
    assert report["figures"]["samples_frechet_efficientnet_lite0"] > 0
    stages = ("tokenizer", "vq", "classifier", "generator", "measure")
    assert set(report["seconds"]) == {*stages, "total"}
    assert report["seconds"]["total"] >= sum(report["seconds"][stage] for stage in stages)
    assert report["steps"]["tokenizer"] == report["steps"]["vq"]
    assert report["protocol"]["samples"] == 10
    assert report["protocol"]["held_out_images"] == 40
    assert report["machine"]["cores"] >= 1
    assert 0.1 < report["peak_memory_gb"] < 4
    assert len(report["recognised_by_class"]) == 10


def test_the_models_load_and_the_comparison_is_plain_vq(finished: Path) -> None:
    ibq = Tokenizer.from_pretrained(finished / "tokenizer" / "tokenizer")
    vq = Tokenizer.from_pretrained(finished / "vq" / "tokenizer")
    assert (ibq.config.quantizer.kind, vq.config.quantizer.kind) == ("ibq", "vq")
    assert Generator.from_pretrained(finished / "generator" / "generator").config.grid == ibq.config.grid
    assert read_metrics(finished / "vq", "eval")


def test_a_second_run_replaces_the_first_and_strict_fails_below_target(finished: Path) -> None:
    assert main(["--out", str(finished), *TINY, "--skip-vq", "--strict"]) == 1
    report = report_of(finished)
    assert list(report["tokenizers"]) == ["IBQ"]
    assert not (finished / "vq").exists()


def test_a_folder_with_other_work_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "generator" / "weights"
    precious.parent.mkdir()
    precious.write_text("months of work")
    assert main(["--out", str(tmp_path), *TINY]) == 1
    assert "expected a new folder" in capsys.readouterr().err
    assert precious.read_text() == "months of work"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "model.width=3"], "model.width"),
        (["--tokenizer", "lr"], "expected section.field=value, got 'lr'"),
        (["--steps-scale", "0"], "steps_scale: expected a positive number, got 0.0"),
        (["--samples-per-class", "0"], "samples_per_class: expected at least 1, got 0"),
        (["--tokenizer-config", "no/such.yaml"], "no/such.yaml"),
        (["--tokenizer", "data.kind=image_folder", "--tokenizer", "data.root=nowhere"], "nowhere"),
    ],
)
def test_wrong_settings_say_which(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "run"), *words]) == 1
    assert message in capsys.readouterr().err


def test_the_command_line_gives_the_defaults_of_options() -> None:
    given = vars(build_parser().parse_args([]))
    default = Options()
    assert {
        name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name != "strict"
    } == vars(default)
    assert default.tokenizer_config.is_file()
    assert default.generator_config.is_file()


def test_targets_are_judged_each_for_itself() -> None:
    reached = {"psnr": 21.0, "utilisation": 0.84, "recognised": 0.9}
    verdicts = judge(reached)
    assert [verdict["met"] for verdict in verdicts] == [True, False, True]
    assert [target.least for target in TARGETS] == [21.0, 0.85, 0.70]
    text = summary({"met": False, "targets": verdicts})
    assert "Below target: codebook utilisation." in text
    assert "84.0% (target 85.0%, MISSED)" in text


def test_time_is_shared_by_expectation_and_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(clock.time, "monotonic", lambda: now.seconds)
    stages = StageClock({"a": 100.0, "b": 50.0, "c": 50.0}, total_seconds=400.0)
    assert stages.allowance("a") == 200.0
    with stages.stage("a", "first"):
        now.seconds = 300.0  # slower than allowed: the rest is shared anew
    assert stages.allowance("b") == 50.0
    with stages.stage("b", "second"):
        now.seconds = 1000.0
    assert stages.allowance("c") > 0
    assert stages.seconds == {"a": 300.0, "b": 700.0}


def test_recognition_counts_by_class() -> None:
    samples = Samples(torch.empty(4, 1, 1, 1), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 0, 1]))
    assert samples.recognised == 0.75
    assert samples.recognised_by_class(2) == [1.0, 0.5]


def test_the_classifier_learns_and_repeats_itself() -> None:
    images = torch.randint(
        0, 100, (256, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(256) % 2
    images[labels == 1, :, 4:12, 4:12] += 120
    before = torch.random.get_rng_state()
    runs = [
        train_classifier(
            images, labels, images, labels, classes=2, epochs=4, seed=1, device=CPU, max_seconds=60.0
        )
        for _ in range(2)
    ]
    assert runs[0].accuracy[-1] > 0.95
    assert len(runs[0].accuracy) == 4
    assert torch.equal(recognise(runs[0].model, images), recognise(runs[1].model, images))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert recognise(runs[0].model, images[:0]).shape == (0,)


def test_a_classifier_without_time_or_images() -> None:
    images, labels = torch.zeros(8, 1, 16, 16, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    ended = train_classifier(
        images, labels, images, labels, classes=2, epochs=1e6, seed=0, device=CPU, max_seconds=0.2
    )
    assert ended.accuracy
    with pytest.raises(ValueError, match=r"images: expected at least 2, got 1"):
        train_classifier(images[:1], labels[:1], images, labels, classes=2, epochs=1, seed=0, device=CPU)


def test_misrecognised_samples_are_framed(tmp_path: Path) -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    classes, seen = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 0, 1])
    pictures.samples_picture(tmp_path / "s.png", images, classes, seen, ("zero", "one"))
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    red = (pixels[..., 0] - pixels[..., 1:].max(axis=-1)) > 100
    assert red.any()
    assert red[: len(red) // 2].sum() < red[len(red) // 2 :].sum()  # in the row of class one alone


@pytest.mark.parametrize(
    ("most", "seconds", "chosen"),
    [
        (1, {1: 1.0}, 1),
        (2, {1: 1.0, 2: 0.6}, 2),
        (2, {1: 1.0, 2: 0.95}, 1),  # within chance
        (2, {1: 1.0, 2: 16.0}, 1),  # busy cores
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.38}, 4),
        (8, {1: 1.0, 2: 0.6, 4: 0.4, 8: 0.3}, 8),
        (8, {1: 1.0, 2: 2.0, 4: 0.1, 8: 0.1}, 1),  # stops at the first that does not help
    ],
)
def test_the_fastest_number_of_threads_is_used(most: int, seconds: dict[int, float], chosen: int) -> None:
    before = torch.get_num_threads()
    try:
        assert threads.choose_threads(most, lambda limit: seconds[torch.get_num_threads()]) == chosen
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("looks", "chosen"), [([2, 2], 2), ([1, 1], 1), ([2, 1, 2], 2), ([1, 4, 2], 2)])
def test_two_looks_at_the_threads_agree_or_the_middle_of_three_decides(
    looks: list[int], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    left = list(looks)
    monkeypatch.setattr(threads, "choose_threads", lambda most, seconds: left.pop(0))
    try:
        assert threads.use_fastest_threads(8) == chosen == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert not left


def test_measuring_threads_gives_up_at_its_limit() -> None:
    assert 0 < threads._seconds(0.0) < 5


FAULTS = """
import ctypes, resource
from ibq_fast.quickstart.freed_memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [libc.malloc(5 << 20) for _ in range(4)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, 5 << 20)
    for buffer in buffers:
        libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
print(kept, [faults() for _ in range(3)][-1])
"""


def test_freed_memory_is_kept() -> None:
    """Twenty megabytes that are freed and wanted again cost no page faults where malloc can be told."""
    out = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, faults = out.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    assert kept == "False" or int(faults) < 100
