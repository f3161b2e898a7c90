"""Loaders: resumed equals unbroken, with any number of workers; bad images are seen from here."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import pytest
import torch

import ibq_fast.data.image_folder
from ibq_fast.data import (
    Batch,
    DataConfig,
    DataError,
    InMemoryImages,
    Loader,
    Position,
    ResumableBatchSampler,
    build_loader,
)

WORKERS = (0, 2)


def _config(root: Path | None, **options: object) -> DataConfig:
    if root is None:
        return DataConfig(**{"kind": "fashion_mnist", "resolution": 32, "batch_size": 1000, **options})
    return DataConfig(
        **{"root": str(root), "resolution": 16, "batch_size": 5, "crop": "random_resized", **options}
    )


def _take(loader: Loader, count: int) -> list[Batch]:
    batches = loader.forever()
    return [next(batches) for _ in range(count)]


def _equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(left, right, strict=True)
    )


def test_batches_are_uint8_and_int64(photos: Path) -> None:
    for root, side, channels in ((photos, 16, 3), (None, 32, 1)):
        loader = build_loader(_config(root, channels=channels, num_workers=0), "train", seed=0)
        images, labels = next(iter(loader))
        assert images.shape == (loader.sampler.batch_size, channels, side, side)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("kind", ["in memory", 0, 2])
def test_resumed_equals_unbroken(kind: str | int, photos: Path) -> None:
    def build() -> Loader:
        if isinstance(kind, int):
            return build_loader(_config(photos, num_workers=kind), "train", seed=3)
        pixels = torch.arange(24 * 6, dtype=torch.uint8).reshape(24, 1, 2, 3)
        images = InMemoryImages(pixels, torch.arange(24), ("any",), channels=3, flip=True, seed=3)
        return Loader(images, ResumableBatchSampler(24, 5, seed=3), train=True)

    unbroken = _take(build(), 10)
    for stop in (1, 4, 7):
        first = build()
        before = _take(first, stop)
        state = first.state_dict()
        second = build()
        second.load_state_dict(state)
        assert _equal(before + _take(second, 10 - stop), unbroken)


def test_augmentation_is_the_same_for_any_number_of_workers(damaged: tuple[Path, set[Path]]) -> None:
    root, _ = damaged
    runs = [
        _take(build_loader(_config(root, num_workers=n, max_bad_fraction=0.5), "train", seed=1), 9)
        for n in (0, 1, 2)
    ]
    assert _equal(runs[0], runs[1])
    assert _equal(runs[0], runs[2])


def test_two_ranks_see_what_one_sees(photos: Path) -> None:
    one = _take(build_loader(_config(photos, batch_size=8, num_workers=0), "train", seed=1), 6)
    ranks = [
        _take(
            build_loader(_config(photos, batch_size=4, num_workers=0), "train", seed=1, rank=r, world_size=2),
            6,
        )
        for r in range(2)
    ]
    joined = [
        Batch(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]))
        for a, b in zip(*ranks, strict=True)
    ]
    assert _equal(one, joined)


def test_skipped_part_is_not_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = ibq_fast.data.image_folder.decode_image

    def counted(path: Path, *args: object, **options: object) -> object:
        decoded.append(path)
        return original(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ibq_fast.data.image_folder, "decode_image", counted)
    loader = build_loader(_config(photos, num_workers=0), "train", seed=0)
    loader.set_position(100, 3)
    assert len(list(loader)) == 1
    assert len(decoded) == 5


@pytest.mark.parametrize("workers", WORKERS)
def test_global_random_state_is_left_alone(workers: int, photos: Path) -> None:
    state = torch.random.get_rng_state()
    _take(build_loader(_config(photos, num_workers=workers), "train", seed=0), 5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_position_counts_what_was_handed_out(photos: Path) -> None:
    loader = build_loader(_config(photos, num_workers=2), "train", seed=0)
    assert len(loader) == 4
    batches = loader.forever()
    positions = []
    for _ in range(5):
        next(batches)
        positions.append(tuple(loader.position))
    assert positions == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert loader.state_dict() == {"epoch": 1, "step": 1, "seed": 0, "size": 24, "global_batch": 5}
    loader.set_position(2, 9)
    assert loader.position == Position(4, 1)
    with pytest.raises(ValueError, match="position: expected epoch and step of at least 0, got -1 and 0"):
        loader.set_position(-1)


@pytest.mark.parametrize(
    ("batch", "expected"), [(3, (1, 4)), (6, (1, 2)), (12, (1, 1)), (24, (2, 0)), (5, (1, 3))]
)
def test_position_carries_over_to_another_batch_size(
    batch: int, expected: tuple[int, int], photos: Path
) -> None:
    state = {"epoch": 1, "step": 2, "seed": 0, "size": 24, "global_batch": 6}
    loader = build_loader(_config(photos, batch_size=batch, num_workers=0), "train", seed=0)
    loader.load_state_dict(state)
    assert loader.position == expected


def test_a_changed_set_is_said(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = build_loader(_config(photos, num_workers=0), "train", seed=0)
    with caplog.at_level(logging.WARNING):
        loader.load_state_dict({**loader.state_dict(), "size": 23})
    assert "data: size is 24, the checkpoint's 23: new order of images" in caplog.text


@pytest.mark.parametrize("workers", WORKERS)
def test_evaluation_sees_every_image_once_in_order_each_time(workers: int, photos: Path) -> None:
    config = _config(photos, val_root=str(photos), num_workers=workers)
    loader = build_loader(config, "val", seed=0)
    next(iter(loader))
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 4]
        assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_evaluation_ranks_are_disjoint_and_complete() -> None:
    config = _config(None, batch_size=300)
    ranks = [build_loader(config, "val", seed=0, rank=rank, world_size=3) for rank in range(3)]
    seen = torch.cat([batch.images for loader in ranks for batch in loader]).flatten(1)
    assert len(seen) == 2000
    assert len(torch.unique(seen, dim=0)) == len(torch.unique(ranks[0].dataset.images.flatten(1), dim=0))


@pytest.mark.parametrize("workers", WORKERS)
def test_bad_images_of_workers_are_counted_here(
    workers: int, damaged: tuple[Path, set[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    root, bad = damaged
    loader = build_loader(
        _config(root, num_workers=workers, max_bad_fraction=0.2, batch_size=8), "train", seed=0
    )
    with caplog.at_level(logging.WARNING):
        for batch in _take(loader, 6):
            assert len(batch.labels) == 8
    assert {path for path, _ in loader.dataset.bad} == bad
    for path in bad:
        assert sum(str(path) in message for message in caplog.messages) == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_evaluation_leaves_bad_images_out(workers: int, damaged: tuple[Path, set[Path]]) -> None:
    root, _ = damaged
    config = _config(root, val_root=str(root), num_workers=workers, max_bad_fraction=0.2, batch_size=1)
    batches = list(build_loader(config, "val", seed=0))
    assert len(batches) == 20, "no empty batches"
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 7 + [1] * 7 + [2] * 6


@pytest.mark.parametrize("workers", WORKERS)
def test_too_many_bad_images_stop_the_run_here(workers: int, damaged: tuple[Path, set[Path]]) -> None:
    root, _ = damaged
    loader = build_loader(_config(root, num_workers=workers, max_bad_fraction=0.1), "train", seed=0)
    with pytest.raises(DataError, match=r"of 24 images are bad, more than max_bad_fraction 0\.1") as caught:
        _take(loader, 10)
    assert "Traceback" not in str(caught.value), "a sentence for people, not a worker's trace"
    start = time.monotonic()
    del loader, caught
    gc.collect()
    assert time.monotonic() - start < 4, "no worker is waited for"


def test_closed_loader_starts_again(photos: Path) -> None:
    loader = build_loader(_config(photos, num_workers=2), "train", seed=0)
    batches = loader.forever()
    first = [next(batches) for _ in range(2)]
    loader.close()
    loader.close()
    rest = _take(loader, 3)
    assert _equal(first + rest, _take(build_loader(_config(photos, num_workers=0), "train", seed=0), 5))


def test_training_set_smaller_than_a_step(photos: Path) -> None:
    with pytest.raises(
        ValueError, match="batch_size: expected at most 12 for 24 images on 2 processes, got 13"
    ):
        build_loader(_config(photos, batch_size=13), "train", seed=0, world_size=2)
