"""How images reach a measurement: resizing, rounding, sample files, weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibq_fast.data import DataError
from ibq_fast.evaluate.protocols import PROTOCOLS, differences, find_protocol
from ibq_fast.evaluate.resize import Resizer
from ibq_fast.evaluate.sources import FolderSource, find_files, open_npz_images
from ibq_fast.evaluate.statistics import load_statistics
from ibq_fast.evaluate.streaming import batches
from ibq_fast.evaluate.trunks import UnavailableError, Weights

OPENCV_DOWN = [[44, 45, 101], [72, 29, 221], [121, 139, 20]]
OPENCV_UP = [
    [0, 0, 3, 6, 11, 19, 27, 28],
    [5, 6, 11, 16, 21, 25, 29, 30],
    [38, 41, 60, 78, 79, 61, 43, 40],
    [71, 76, 109, 141, 137, 97, 57, 50],
    [88, 93, 121, 149, 141, 96, 52, 45],
    [90, 91, 97, 103, 91, 60, 29, 24],
    [92, 89, 73, 57, 40, 23, 6, 3],
    [92, 88, 69, 49, 32, 17, 2, 0],
]


def test_the_published_resize_is_opencvs() -> None:
    """Values that cv2.resize (4.14, INTER_LINEAR) gives: down, and up past both borders."""
    pixels = (np.arange(35).reshape(5, 7) ** 2 * 7 % 256).astype(np.uint8)
    assert Resizer(3, "bilinear-opencv")(Image.fromarray(pixels))[0].tolist() == OPENCV_DOWN
    assert Resizer(8, "bilinear-opencv")(Image.fromarray(pixels[:3, :3]))[0].tolist() == OPENCV_UP


@pytest.mark.parametrize("resize", ["bicubic-antialiased", "bilinear-antialiased", "bilinear-opencv", "none"])
def test_an_image_of_the_right_size_stays_as_it_is(resize: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    prepared = Resizer(9, resize)(Image.fromarray(pixels))  # type: ignore[arg-type]
    assert np.array_equal(prepared.permute(1, 2, 0).numpy(), pixels)
    if resize == "none":
        with pytest.raises(DataError, match="expected 8 x 8 pixels, got 9 x 9"):
            Resizer(8, resize)(Image.fromarray(pixels))


def test_sample_files_are_mapped(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "s.npz", images, np.arange(5))
    source = open_npz_images(tmp_path / "s.npz")
    assert isinstance(source.array, np.memmap)
    assert np.array_equal(source.block(1, 4).images.permute(0, 2, 3, 1).numpy(), images[1:4])
    assert source.block(4, 9).indices.tolist() == [4]
    np.savez_compressed(tmp_path / "c.npz", images)
    np.savez(tmp_path / "f.npz", images.astype(np.float32))
    np.savez(tmp_path / "n.npz", other=images)
    (tmp_path / "z.npz").write_bytes(b"no")
    for name, message in (
        ("c", "arr_0 is compressed"),
        ("f", r"expected uint8 \[N, H, W, 1 or 3\], got float32"),
        ("n", "expected an array arr_0 of images, found none"),
        ("z", "not a readable .npz file"),
    ):
        with pytest.raises(DataError, match=message):
            open_npz_images(tmp_path / f"{name}.npz")
    with pytest.raises(DataError, match="expected images of 16 x 16 pixels, got 8 x 8"):
        open_npz_images(tmp_path / "s.npz", 16)
    assert load_statistics(tmp_path / "s.npz") is None
    with pytest.raises(DataError, match="not a readable"):
        load_statistics(tmp_path / "z.npz")


def test_a_folder_names_what_cannot_be_read(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    source = FolderSource(list(find_files([tmp_path])), Resizer(8, "none"), 3, description="x")
    block = source.block(0, 64)
    assert block.indices.tolist() == [0, 2]
    assert [Path(name).name for name, _ in block.unreadable] == ["1.png"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    again = FolderSource(list(find_files([moved])), Resizer(8, "none"), 3, description="y")
    assert again.digest == source.digest
    padded = list(batches(block, 1))
    assert [(len(images), indices.tolist()) for images, indices in padded] == [(16, [0, 2])]
    assert torch.equal(padded[0][0][2], block.images[1])


def test_protocols_say_when_they_are_changed() -> None:
    assert find_protocol("reference-256", resize=None) == PROTOCOLS["reference-256"]
    assert find_protocol("uint8-bicubic", resolution=64).name == "uint8-bicubic"
    changed = find_protocol("reference-256", resize="bicubic-antialiased", trunks=("inception",))
    assert changed.name == "reference-256, changed: resize"
    lines = differences(changed.record(), PROTOCOLS["reference-256"].record())
    assert lines[-1] == "resize: bicubic-antialiased / bilinear-opencv"
    for setting, message in (
        ({"resize": "nearest"}, "resize: expected one of"),
        ({"trunks": ("vgg",)}, "trunks: expected some of"),
        ({"crop_size": 3}, "no such setting: crop_size"),
    ):
        with pytest.raises(ValueError, match=message):
            find_protocol("reference-256", **setting)
    with pytest.raises(ValueError, match="protocol: expected one of uint8-bicubic"):
        find_protocol("reference")


def test_weights_are_given_found_or_fetched_with_their_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UnavailableError, match=r"alexnet-owt-7be5be79.pth: --lpips-alex PATH, or --fetch"):
        Weights().locate("lpips_alex")
    cached = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"truncated")  # its checksum is wrong: not taken
    with pytest.raises(UnavailableError, match="--fetch"):
        Weights().locate("lpips_alex")
    source = tmp_path / "elsewhere.pth"
    source.write_bytes(b"not the weights")
    asked: list[str] = []
    download = torch.hub.download_url_to_file

    def from_disk(url: str, *rest: object, **options: object) -> None:
        asked.append(url)
        download(source.as_uri(), *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.hub, "download_url_to_file", from_disk)
    with pytest.raises(UnavailableError, match="could not be fetched: invalid hash value"):
        Weights(fetch=True).locate("lpips_alex")
    assert asked == ["https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"]
    with pytest.raises(FileNotFoundError, match="inception: no such file"):
        Weights({"inception": tmp_path / "none"})
    with pytest.raises(ValueError, match="not a readable file of weights"):
        Weights({"inception": source}).read("inception")
