"""The published tokenizer recipes: each loads and makes one step on the CPU, with its own codebook."""

from __future__ import annotations

import io
import json
import multiprocessing
import resource
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import ranks  # noqa: F401  (its server of processes has imported what is needed)
import torch

from ibq_fast.checkpoint.configs import config_to_dict
from ibq_fast.train import TokenizerRun, load_config
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.tokenizer import TokenizerTask

CONFIGS = Path(__file__).parents[2] / "configs"
# Full width and attention only where it is the point: the largest codebook, at 64 of its 256 pixels.
SMALL = {
    "model__resolution": 32,
    "data__resolution": 32,
    "model__base_channels": 32,
    "model__num_res_blocks": 1,
    "model__attention_resolutions": (2,),
    "loss__discriminator_channels": 8,
}
FULL_WIDTH = {"model__resolution": 64, "data__resolution": 64, "model__attention_resolutions": (4,)}
RECIPES: list[tuple[str, int, dict[str, Any]]] = [
    ("imagenet256_ibq_1024", 1024, SMALL),
    ("imagenet256_ibq_8192", 8192, SMALL),
    ("imagenet256_ibq_16384", 16384, SMALL),
    ("imagenet256_ibq_262144", 262144, FULL_WIDTH),
    ("pretrain256_ibq_16384", 16384, SMALL),
    ("pretrain256_ibq_262144", 262144, SMALL),
]


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The photographs as two tar files."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(photos.rglob("*.png"))
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, file in enumerate(files[shard::2]):
                content = file.read_bytes()
                entry = tarfile.TarInfo(f"{number:04d}.png")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(folder / "*.tar")


def one_step(name: str, settings: dict[str, Any], report: str) -> None:
    """One update of a recipe; what it saw goes into the file ``report``."""
    torch.set_num_threads(1)
    config = load_config(TokenizerRun, CONFIGS / f"{name}.yaml", **settings)
    task = TokenizerTask(config, build_accelerator(config.run))
    before = {key: p.detach().clone() for key, p in task.parameters().items() if p.numel() < 10**6}
    terms = task.update(0, 0.0)
    moved = [key for key, p in task.parameters().items() if key in before and not p.equal(before[key])]
    seen = {
        "quantizer": config_to_dict(config.model.quantizer),
        "terms": {key: float(value) for key, value in terms.items()},
        "moved": moved,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    Path(report).write_text(json.dumps(seen))


@pytest.mark.parametrize(("name", "codes", "reduced"), RECIPES, ids=[recipe[0] for recipe in RECIPES])
def test_one_step(
    name: str,
    codes: int,
    reduced: dict[str, Any],
    photos: Path,
    shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a process of its own, so that its peak of memory is its own."""
    root = shards if name.startswith("pretrain") else str(photos)
    settings = {
        "run__dir": str(tmp_path / "run"),
        "run__device": "cpu",
        "data__root": root,
        "data__val_root": root,
        "data__batch_size": 1,
        "data__num_workers": 0,
        "perceptual": "none",  # LPIPS's trunk is a download
        **reduced,
    }
    process = multiprocessing.get_context("forkserver").Process(
        target=one_step, args=(name, settings, str(tmp_path / "report"))
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    seen = json.loads((tmp_path / "report").read_text())
    quantizer, terms, moved = seen["quantizer"], seen["terms"], seen["moved"]
    assert (quantizer["codebook_size"], quantizer["dim"]) == (codes, 256)
    assert quantizer["sample_entropy_weight"] == quantizer["codebook_entropy_weight"] == 1.0
    for term in ("sample_entropy", "codebook_entropy", "discriminator", "adversarial"):
        assert terms[term] > 0, term
    assert any(key.startswith("discriminator.") for key in moved)
    assert {"tokenizer.encoder.conv_in.weight", "tokenizer.decoder.conv_out.weight"} <= set(moved)
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: one step, peak {seen['peak']:.2f} GiB\n")
    assert seen["peak"] < 12
