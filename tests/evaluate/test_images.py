"""Pictures and figures: PSNR, grids, plots, code usage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from ibq_fast.evaluate import (
    CodebookUsage,
    image_grid,
    psnr,
    reconstruction_grid,
    save_png,
    usage_figures,
    usage_plot,
)


def test_psnr_is_per_image() -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    copies = images.clone()
    copies[1] += 255
    copies[2, 0] += 10
    expected = [math.inf, 0.0, 10 * math.log10(255**2 / (100 / 3))]
    assert psnr(images, copies).tolist() == pytest.approx(expected)


def test_a_grid_holds_every_image_where_it_belongs() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 6) * 10
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 2 * 4 + 2, 3 * 6 + 2 * 2)
    assert grid[:, 5 + 3, 6 + 2 + 1].tolist() == [40, 40, 40]
    assert grid[0, 4].unique().tolist() == [255]
    assert grid[0, 6:, 16:].unique().tolist() == [255]  # no sixth image


def test_reconstructions_stand_below_their_originals() -> None:
    images = torch.full((3, 3, 2, 2), 10, dtype=torch.uint8)
    grid = reconstruction_grid(images, images + 90, columns=2)
    assert grid[0, ::4, 0].tolist() == [10, 100, 10, 100]


def test_png_and_plot_are_readable(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    with Image.open(save_png(image, tmp_path / "deep" / "a.png")) as read:
        assert read.size == (7, 5)
    with Image.open(usage_plot(torch.tensor([0, 5, 9, 1]), tmp_path / "usage.png")) as read:
        assert read.size[0] > 400


def test_usage_figures() -> None:
    assert usage_figures(torch.tensor([3, 3, 0, 0])) == pytest.approx({"utilisation": 0.5, "perplexity": 2.0})
    assert usage_figures(torch.zeros(4, dtype=torch.int64)) == {"utilisation": 0.0, "perplexity": 0.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: psnr(x, x[:1]),
            r"copies: expected uint8 \[2, 3, 4, 4\], got torch.uint8 \[1, 3, 4, 4\]",
        ),
        (lambda x: psnr(x.float(), x), r"images: expected uint8 \[B, 1 or 3, H, W\], got torch.float32"),
        (lambda x: image_grid(x[:0]), "images: expected at least one, got none"),
        (lambda x: save_png(x, "a.png"), r"image: expected uint8 \[1 or 3, H, W\]"),
        (lambda x: usage_plot(x, "a.png"), r"counts: expected int64 \[K\]"),
    ],
)
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_usage_over_batches_is_that_of_the_set() -> None:
    indices = torch.tensor([[0, 0, 3], [3, 3, 3]])
    usage = CodebookUsage(5)
    assert usage.figures() == {"utilisation": 0.0, "perplexity": 0.0}
    for batch in indices:
        usage.update(batch)
    assert usage.counts.tolist() == [2, 0, 0, 4, 0]
    assert usage.dead_codes().tolist() == [1, 2, 4]
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert usage.figures() == pytest.approx({"utilisation": 0.4, "perplexity": math.exp(entropy)})
    with pytest.raises(ValueError, match="codebook_size: expected at least 1, got 0"):
        CodebookUsage(0)


def test_usage_adds_up_over_processes(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        usage = CodebookUsage(3)
        usage.update(torch.tensor([1, 1]))
        usage.all_reduce()
        assert usage.counts.tolist() == [0, 2, 0]
    finally:
        torch.distributed.destroy_process_group()
