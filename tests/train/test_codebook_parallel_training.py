"""Training with a codebook that is split over processes is the training of one process."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_processes import largest_difference, steady, trained

from ibq_fast import Tokenizer
from ibq_fast.checkpoint import tensor_tree
from ibq_fast.checkpoint.training import latest_checkpoint, load_checkpoint
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.train import GeneratorRun, TokenizerRun, read_metrics, train_generator, train_tokenizer
from ibq_fast.train.__main__ import main
from ibq_fast.train.split import SplitCodebook

CODES = 17  # no even split


def split_run(config: TokenizerRun, batch: int, parallel: bool | int) -> TokenizerRun:
    """Ten steps that are clipped, with a learned scale and averages."""
    config = steady(config, batch, "all")
    quantizer = replace(
        config.model.quantizer, codebook_size=CODES, similarity="euclidean", logit_scale_kind="learned"
    )
    schedule = replace(config.optim.schedule, kind="constant")
    return replace(
        config,
        run=replace(config.run, steps=10, codebook_parallel=parallel, save_every=5, eval_every=5, pictures=3),
        model=replace(config.model, quantizer=quantizer),
        optim=replace(config.optim, clip_norm=0.05, schedule=schedule),
    )


def writing_once_in_vain(arguments: list[str]) -> int:
    """A run whose first checkpoint meets a full disk, in the middle of the codebook."""
    opened, codebook = tensor_tree.open_for_writing, CODES * 8 * 4
    failed: list[Path] = []

    class Full:
        def __init__(self, path: Path) -> None:
            self._file = opened(path)
            self._room = codebook if not failed and path.name == "tokenizer.safetensors" else 1 << 40
            self._path = path

        def write(self, data: Any) -> None:
            self._room -= len(data)
            if self._room < 0:
                failed.append(self._path)
                raise OSError(errno.ENOSPC, "No space left on device")
            self._file.write(data)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    tensor_tree.open_for_writing = Full  # type: ignore[assignment]
    code = main(arguments)
    assert len(failed) == (1 if os.environ["RANK"] == "0" else 0)
    return code


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = one["tokenizer"], other["tokenizer"]
    assert largest_difference(first["model"], second["model"]) <= 1e-5
    assert largest_difference(first["ema"]["average"], second["ema"]["average"]) <= 1e-5
    for name, entry in first["optimizer"].items():
        assert largest_difference(entry, second["optimizer"][name]) <= 1e-4, name
    assert torch.equal(one["progress"]["usage"]["counts"], other["progress"]["usage"]["counts"])


def test_split_codebooks_train_as_a_whole_one(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    # Five held-out images: with batches of two the processes have not as many of them.
    few = tmp_path / "few"
    shutil.copytree(str(tokenizer_run.data.root), few)
    for image in sorted(few.rglob("*.png"))[5:]:
        image.unlink()
    data = replace(tokenizer_run.data, val_root=str(few))
    given = replace(tokenizer_run, data=data, run=replace(tokenizer_run.run, eval_batches=8))
    one, one_log = trained(split_run(given, 4, False), tmp_path / "one", 1)
    two, two_log = trained(split_run(given, 2, True), tmp_path / "two", 2, work=writing_once_in_vain)
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 1  # of step 10; that of 5 failed
    assert_same(one, two)
    held_out = [read_metrics(tmp_path / name, "eval") for name in ("one", "two")]
    for first, second in zip(*held_out, strict=True):
        for name in ("psnr", "l1", "utilisation", "perplexity"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), (first["step"], name)
    assert any(figures["grad_norm"] > 0.05 for figures in one_log)
    for first, second in zip(one_log, two_log, strict=True):
        for name in set(first) - {"split", "time", "images_per_second"}:
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), (first["step"], name)
    # What two have written is a model like any other.
    models = [Tokenizer.from_pretrained(tmp_path / name / "tokenizer") for name in ("one", "two")]
    assert largest_difference(*(m.state_dict() for m in models)) <= 1e-5
    # It goes on in one process, and in four, of which two each share a codebook.
    resumed = {}
    for world, parallel in ((1, "true"), (4, "2")):
        folder = tmp_path / f"resumed {world}"
        shutil.copytree(tmp_path / "two", folder)
        options = [f"--run.codebook_parallel={parallel}", f"--data.batch_size={4 // world}"]
        options += ["--run.steps=13", f"--run.dir={folder}", "--resume"]
        run_ranks(world, main, ["tokenizer", f"--config={folder / 'given.yaml'}", *options])
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        resumed[world] = load_checkpoint(newest)
        assert resumed[world]["step"] == 13
    assert_same(resumed[1], resumed[4])


@pytest.mark.parametrize(
    ("options", "quantizer", "message"),
    [
        (
            {"codebook_parallel": 2},
            {},
            r"codebook_parallel: expected several processes \(torchrun\), got one",
        ),
        ({"codebook_parallel": True}, {"kind": "vq"}, r"expected model\.quantizer\.kind ibq, got vq"),
        ({"codebook_parallel": True, "fsdp": True}, {}, r"run\.fsdp: expected false for a tokenizer"),
        (
            {"codebook_parallel": True, "mixed_precision": "fp16"},
            {},
            r"run\.mixed_precision: expected no or bf16 with run\.codebook_parallel, got fp16",
        ),
    ],
)
def test_what_cannot_be_split(
    options: dict[str, Any], quantizer: dict[str, Any], message: str, tokenizer_run: TokenizerRun
) -> None:
    model = replace(tokenizer_run.model, quantizer=QuantizerConfig(codebook_size=16, dim=8, **quantizer))
    with pytest.raises(ValueError, match=message):
        train_tokenizer(replace(tokenizer_run, run=replace(tokenizer_run.run, **options), model=model))


def test_a_generator_has_no_codebook_to_split(generator_run: GeneratorRun) -> None:
    with pytest.raises(ValueError, match=r"run\.codebook_parallel: expected false for a generator, got True"):
        train_generator(replace(generator_run, run=replace(generator_run.run, codebook_parallel=True)))
    with pytest.raises(ValueError, match=r"run\.codebook_parallel: expected true, false or a number"):
        replace(generator_run.run, codebook_parallel=-1)


def test_another_codebook_size_is_refused_before_it_is_read() -> None:
    split = object.__new__(SplitCodebook)
    split._shards = SimpleNamespace(codebook_size=37, start=18, stop=37)  # type: ignore[assignment]
    names = ("/model/quantizer.codebook", "/optimizer/quantizer.codebook/exp_avg")
    assert [split.rows_to_read(name, [37, 6]) for name in names] == [slice(18, 37)] * 2
    assert split.rows_to_read("/optimizer/quantizer.codebook/step", []) is None
    assert split.rows_to_read("/model/quantizer.log_scale", [1]) is None
    with pytest.raises(
        ValueError, match=r"checkpoint: quantizer\.codebook: expected 37 codes, got \[40, 6\]"
    ):
        split.rows_to_read(names[0], [40, 6])
