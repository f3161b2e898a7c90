"""The script behind the embedded set: class-balanced, repeatable, and only from the known source."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from ibq_fast.data import fashion_mnist
from ibq_fast.data.fashion_mnist import make as script


def _write_source(folder: Path) -> dict[str, np.ndarray]:
    """Fifty images per split with shuffled labels, as gzipped IDX files; the arrays by file name."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix in ("train", "t10k"):
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = rng.integers(0, 256, (50, 28, 28), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = rng.permutation(np.arange(50, dtype=np.uint8) % 10)
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.tobytes()))
    return arrays


def test_made_set_loads_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    arrays = _write_source(source)
    digests = {
        name: hashlib.sha256(gzip.decompress((source / name).read_bytes())).hexdigest() for name in arrays
    }
    monkeypatch.setattr(script, "SOURCES", digests)
    monkeypatch.setattr(script, "TRAIN_PER_CLASS", 3)
    monkeypatch.setattr(script, "TEST_PER_CLASS", 2)
    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        script.make(source, out)
    for name in ("train.xz", "test.xz", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    loaded = fashion_mnist("train", folder=tmp_path / "one")
    images, labels = arrays["train-images-idx3-ubyte.gz"], arrays["train-labels-idx1-ubyte.gz"]
    assert len(loaded) == 30
    for i in range(30):
        image, label = loaded[i]
        assert label == i % 10
        np.testing.assert_array_equal(image[0, 2:-2, 2:-2], images[labels == label][i // 10])


def test_another_source_is_refused(tmp_path: Path) -> None:
    _write_source(tmp_path / "source")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: expected content of sha256 c59f468a"):
        script.make(tmp_path / "source", tmp_path)
