"""The published tokenizer recipes: each loads and makes one step on the CPU, with its own codebook."""

from __future__ import annotations

import gc
import io
import resource
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

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
    root = shards if name.startswith("pretrain") else str(photos)
    config = load_config(
        TokenizerRun,
        CONFIGS / f"{name}.yaml",
        run__dir=str(tmp_path / "run"),
        run__device="cpu",
        data__root=root,
        data__val_root=root,
        data__batch_size=1,
        data__num_workers=0,
        perceptual="none",  # LPIPS's trunk is a download
        **reduced,
    )
    quantizer = config.model.quantizer
    assert (quantizer.codebook_size, quantizer.dim) == (codes, 256)
    assert quantizer.sample_entropy_weight == quantizer.codebook_entropy_weight == 1.0
    task = TokenizerTask(config, build_accelerator(config.run))
    before = {key: p.detach().clone() for key, p in task.parameters().items() if p.numel() < 10**6}
    terms = task.update(0, 0.0)
    assert terms["sample_entropy"] > 0
    assert terms["codebook_entropy"] > 0
    assert terms["discriminator"] > 0
    assert terms["adversarial"] > 0
    moved = [key for key, p in task.parameters().items() if key in before and not p.equal(before[key])]
    assert any(key.startswith("discriminator.") for key in moved)
    assert {"tokenizer.encoder.conv_in.weight", "tokenizer.decoder.conv_out.weight"} <= set(moved)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: one step, peak of the process so far {peak:.2f} GiB\n")
    assert peak < 12
    del task, before, terms
    gc.collect()
