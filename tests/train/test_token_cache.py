"""Token caches: a set is encoded once, in all its views, from folders and tar shards, and read back whole."""

from __future__ import annotations

import io
import resource
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ibq_fast.data import DataConfig, SquareCrop, SquareViews, build_view_loader
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig
from ibq_fast.train import TokenizerRun
from ibq_fast.train.token_cache import TokenCache, build_token_cache


def tokens_of(
    tokenizer: Tokenizer, data: DataConfig, folder: Path | None, said: list[str], **options: Any
) -> TokenCache:
    return build_token_cache(tokenizer, data, "train", folder, say=said.append, **options)


def make_tokenizer(model: TokenizerConfig) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(model).eval()


@pytest.fixture
def tokenizer(tokenizer_run: TokenizerRun) -> Tokenizer:
    return make_tokenizer(tokenizer_run.model)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of 24 x 16 in two classes, so that crops differ."""
    root = tmp_path_factory.mktemp("wide")
    random = np.random.default_rng(1)
    for number in range(8):
        (root / f"class{number % 2}").mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (16, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"class{number % 2}" / f"{number}.png")
    return root


def wide_config(root: Path | str, **options: Any) -> DataConfig:
    settings = {"root": str(root), "val_root": str(root), "resolution": 8, "batch_size": 3, "num_workers": 0}
    return DataConfig(**{**settings, **options})


def as_shards(folder: Path, root: Path, *, labels: bool = True, broken: bool = False) -> str:
    """The pictures below ``root`` as two tar files."""
    files = sorted(root.rglob("*.png"))
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, file in enumerate(files[shard::2]):
                content = {"png": file.read_bytes()}
                if labels:
                    content["cls"] = file.parent.name[-1].encode()
                if broken and number == shard == 1:
                    content["png"] = b"no picture"
                for extension, data in content.items():
                    entry = tarfile.TarInfo(f"{number:04d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return str(folder / "*.tar")


def rows(cache: TokenCache) -> list[tuple[int, bytes]]:
    """Label and tokens of every image, in an order of their own."""
    return sorted((int(cache.labels[i]), cache.stored[i].tobytes()) for i in range(len(cache)))


def test_written_once_and_mapped(tokenizer: Tokenizer, tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    data, said = tokenizer_run.data, list[str]()
    first = tokens_of(tokenizer, data, tmp_path / "tokens", said)
    again = tokens_of(tokenizer, data, tmp_path / "tokens", said)
    in_memory = tokens_of(tokenizer, data, None, said)
    assert isinstance(again.stored, np.memmap)
    assert again.stored.shape == (12, 2, 16, 1)  # one byte: 16 codes
    for other in (again, in_memory):
        assert np.array_equal(first.stored, other.stored)
        assert np.array_equal(first.labels, other.labels)
        assert first.classes == other.classes == ("flat", "rough")
    assert [message.split(":")[1].split()[0] for message in said] == ["encoding", "12", "encoding"]
    assert sorted(first.labels.tolist()) == [0] * 6 + [1] * 6
    tokens, labels = first.batch(3, np.array([5, 0]), seed=1)
    assert (tokens.shape, tokens.dtype) == ((2, 16), torch.int64)
    assert labels.tolist() == [0, 0]


def test_another_tokenizer_or_other_views_are_a_cache_of_their_own(
    tokenizer: Tokenizer, tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    said: list[str] = []
    plain = replace(tokenizer_run.data, flip=False)
    for data in (tokenizer_run.data, plain, replace(plain, batch_size=3, crop="center"), tokenizer_run.data):
        tokens_of(tokenizer, data, tmp_path / "tokens", said)
    tokens_of(tokenizer, plain, tmp_path / "tokens", said, crops=2)
    tokenizer.last_layer.data[0] += 1
    tokens_of(tokenizer, plain, tmp_path / "tokens", said)
    assert ["encoding" in message for message in said] == [True, True, False, False, True, True]


def test_a_full_disk_is_an_error_and_leaves_no_cache(
    tokenizer: Tokenizer, tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tokens_of(tokenizer, tokenizer_run.data, tmp_path / "tokens", [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []


def test_views_are_crops_and_their_mirror_images(tokenizer: Tokenizer, wide: Path) -> None:
    data = wide_config(wide, flip=True, crop="random")
    cache = tokens_of(tokenizer, data, None, [], crops=3)
    assert cache.views == 6
    loader = build_view_loader(data, "train", 3)
    squares = torch.cat([images for images, _ in loader])
    assert squares.shape == (8, 3, 3, 8, 8)
    everything = np.arange(8)
    for view in range(6):
        shown = squares[:, view // 2]
        expected = tokenizer.encode(shown.flip(-1) if view % 2 else shown).flatten(1)
        assert torch.equal(cache.tokens(everything, view), expected)
    # The first is what evaluation sees, the others differ from it and from each other.
    middle = tokens_of(tokenizer, replace(data, flip=False), None, [])
    assert torch.equal(middle.tokens(everything), cache.tokens(everything))
    assert not squares[:, 0].equal(squares[:, 1])
    assert not squares[:, 1].equal(squares[:, 2])
    # Epochs show all views in the end, held-out images have one.
    seen = {tuple(cache.batch(epoch, np.array([4]), seed=0)[0][0].tolist()) for epoch in range(60)}
    assert len(seen) == len({tuple(cache.tokens(np.array([4]), view)[0].tolist()) for view in range(6)}) > 1
    assert build_token_cache(tokenizer, data, "val", crops=3).views == 1


def test_views_do_not_depend_on_who_asks() -> None:
    crop = SquareCrop(8, "random_resized", flip=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3)).astype(np.uint8))
    first, again = (SquareViews(crop, 2)(picture, 0, epoch, 7) for epoch in (0, 5))
    other = SquareViews(crop, 2)(picture, 0, 0, 8)
    assert first.equal(again)
    assert first[0].equal(other[0])
    assert not first[1].equal(other[1])


@pytest.mark.parametrize(("codes", "size"), [(2, 1), (256, 1), (257, 2), (65536, 2), (1 << 18, 3)])
def test_tokens_take_as_many_bytes_as_their_codes_need(
    codes: int, size: int, tokenizer_run: TokenizerRun
) -> None:
    quantizer = QuantizerConfig(codebook_size=codes, dim=2, init="normal")
    tokenizer = make_tokenizer(replace(tokenizer_run.model, quantizer=quantizer))
    images: Tensor = torch.cat([images for images, _ in build_view_loader(tokenizer_run.data, "train")])
    expected = tokenizer.encode(images.flatten(0, 1)).flatten(1)
    cache = tokens_of(tokenizer, tokenizer_run.data, None, [])
    assert cache.stored.shape == (12, 2, 16, size)
    assert torch.equal(cache.tokens(np.arange(12)), expected)
    assert size < 3 or int(expected.max()) > 65535  # the third byte is in use


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_shards_give_the_cache_of_their_pictures(
    workers: int, tokenizer: Tokenizer, wide: Path, tmp_path: Path
) -> None:
    pattern = as_shards(tmp_path, wide)
    shards = wide_config(pattern, kind="shards", flip=True, num_workers=workers)
    cache = tokens_of(tokenizer, shards, tmp_path / "tokens", [])
    assert rows(cache) == rows(tokens_of(tokenizer, wide_config(wide, flip=True), None, []))
    assert cache.classes == ("0", "1")
    assert tokens_of(tokenizer, shards, tmp_path / "tokens", []).stored.shape == (8, 2, 16, 1)
    assert tokens_of(tokenizer, shards, None, [], crops=2).views == 4


def test_what_cannot_be_read_is_left_out(tokenizer: Tokenizer, wide: Path, tmp_path: Path) -> None:
    pattern = as_shards(tmp_path, wide, broken=True)
    cache = tokens_of(tokenizer, wide_config(pattern, kind="shards"), None, [])
    assert len(cache) == 7
    copies = tmp_path / "pictures" / "class0"
    copies.mkdir(parents=True)
    for file in (wide / "class0").iterdir():
        (copies / file.name).write_bytes(file.read_bytes())
    (copies / "0.png").write_bytes(b"no picture")
    data = wide_config(copies.parent, max_bad_fraction=0.5)
    assert len(tokens_of(tokenizer, data, tmp_path / "tokens", [])) == 3


def test_shards_without_labels_are_refused(tokenizer: Tokenizer, wide: Path, tmp_path: Path) -> None:
    data = wide_config(as_shards(tmp_path, wide, labels=False), kind="shards")
    with pytest.raises(ValueError, match=r"data\.root: expected a label .* got 8 of 8 without"):
        tokens_of(tokenizer, data, tmp_path / "tokens", [])


def test_views_that_cannot_be_drawn(wide: Path) -> None:
    with pytest.raises(ValueError, match="views: expected 1 with crop center"):
        build_view_loader(wide_config(wide, crop="center"), "train", 2)
    embedded = DataConfig(kind="fashion_mnist", resolution=32, channels=1)
    with pytest.raises(ValueError, match="views: expected 1 for fashion_mnist"):
        build_view_loader(embedded, "train", 2)
    with pytest.raises(ValueError, match="views: expected at least 1, got 0"):
        build_view_loader(embedded, "train", 0)
