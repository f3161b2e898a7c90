"""Tar shards: every good sample once per epoch, broken ones skipped and named, resumed to the sample."""

from __future__ import annotations

import io
import itertools
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ibq_fast.data.shards
from ibq_fast.data import Batch, DataConfig, DataError, ShardLoader, build_loader
from ibq_fast.data.shard_order import Progress, ShardOrder
from ibq_fast.data.shard_reader import ShardSample, find_shards

SIDE, SHARDS, PER_SHARD = 4, 8, 25
SAMPLES = SHARDS * PER_SHARD
BROKEN = {
    3: ("truncated or corrupt", "png"),
    41: ("not an image", "jpg"),
    77: ("the sample has no image file", "cls"),
    100: ("the file is empty", "png"),
    124: ("truncated or corrupt", "png"),
    125: ("the file is empty", "jpg"),
    199: ("the sample has no image file", "json"),
}


def png(number: int) -> bytes:
    """A picture that says which it is."""
    pixels = np.full((SIDE, SIDE, 3), number, np.uint8)
    pixels[0, 0] = 255 - number  # what a mirrored picture has on its other side
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def files_of(number: int) -> dict[str, bytes]:
    label = {"cls": str(number % 10).encode()}
    if number % 3 == 1:
        label = {"json": json.dumps({"label": number % 10, "caption": "…"}).encode()}
    if number in BROKEN:
        reason, extension = BROKEN[number]
        if extension in ("cls", "json"):
            return {"txt": b"no picture", **label}
        content = {
            "truncated or corrupt": png(number)[:60],
            "not an image": b"words",
            "the file is empty": b"",
        }
        return {extension: content[reason], **label}
    return {"png": png(number), **label}


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, content in files.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 samples in eight shards, seven of them broken."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_shard(root / f"train-{shard:04}.tar", {f"{number:05}": files_of(number) for number in numbers})
    return root


def config(folder: Path, **options: Any) -> DataConfig:
    settings = {
        "kind": "shards",
        "root": f"{folder}/train-{{0000..0007}}.tar",
        "resolution": SIDE,
        "crop": "center",
        "flip": False,
        "batch_size": 4,
        "num_workers": 0,
        "shuffle_buffer": 12,
        "max_bad_fraction": 0.05,
    }
    return DataConfig(**{**settings, **options})


def loaders(folder: Path, world: int, workers: int, **options: Any) -> list[ShardLoader]:
    data = config(folder, num_workers=workers, **options)
    built = [build_loader(data, "train", seed=5, rank=rank, world_size=world) for rank in range(world)]
    assert all(isinstance(loader, ShardLoader) for loader in built)
    return built  # type: ignore[return-value]


def numbers(batches: list[Batch]) -> list[int]:
    return [number for batch in batches for number in batch.images[:, 0, -1, -1].tolist()]


def state_of(ranks: list[ShardLoader]) -> dict[str, Any]:
    """What rank 0 of a distributed run saves."""
    lanes = [loader.state_dict()["lanes"] for loader in ranks]
    return ranks[0].state_dict(lambda mine: list(itertools.chain(*lanes)))


GOOD = Counter(number for number in range(SAMPLES) if number not in BROKEN)


def test_every_good_sample_once_per_epoch_over_2_ranks_with_2_workers(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = loaders(folder, 2, 2)
    logged: list[str] = []
    for epoch in range(2):
        with caplog.at_level(logging.WARNING):
            parts = [list(loader) for loader in ranks]
        logged = logged or list(caplog.messages)
        seen = [numbers(part) for part in parts]
        assert all(len(part) >= 40 for part in seen)
        assert Counter(seen[0] + seen[1]) == GOOD, epoch
        for batch in itertools.chain(*parts):
            assert batch.images.dtype == torch.uint8
            labels = [number % 10 for number in batch.images[:, 0, -1, -1].tolist()]
            assert batch.labels.tolist() == labels
    found = {int(sample.key): sample for loader in ranks for sample in loader.bad}
    assert set(found) == set(BROKEN)
    for number, sample in found.items():
        assert sample.shard == f"{folder}/train-{number // PER_SHARD:04}.tar"
        assert sample.reason.startswith(BROKEN[number][0])
        line = f"bad sample skipped: {sample.shard}: {sample.key}: {sample.reason}"
        assert logged.count(line) == 1
    reports = [[(loader._counts, list(loader._bad.items()))] for loader in ranks]
    for loader in ranks:
        assert loader.share_faults(lambda mine: list(itertools.chain(*reports))) == {"bad_images": 7.0}


def test_order_is_new_in_each_epoch_and_mixes_shards(folder: Path) -> None:
    (loader,) = loaders(folder, 1, 0)
    first, second = numbers(list(loader)), numbers(list(loader))
    assert first != second
    assert first != sorted(first)
    neighbours = [a // PER_SHARD == b // PER_SHARD for a, b in itertools.pairwise(first)]
    assert 0.2 < np.mean(neighbours) < 0.98


def test_batches_without_end_are_full_and_lose_nothing(folder: Path) -> None:
    (loader,) = loaders(folder, 1, 0)
    batches = list(itertools.islice(loader.forever(), 193))
    assert {len(batch.labels) for batch in batches} == {4}
    assert Counter(numbers(batches)) == Counter(dict.fromkeys(GOOD, 4))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resample", [False, True])
def test_resumed_equals_unbroken(workers: int, resample: bool, folder: Path) -> None:
    options: Any = {"resample": resample, "crop": "random_resized", "flip": True}
    (unbroken,) = loaders(folder, 1, workers, **options)
    expected = list(itertools.islice(unbroken.forever(), 60))
    for stop in (1, 17, 50):
        (first,) = loaders(folder, 1, workers, **options)
        list(itertools.islice(first.forever(), stop))
        state = json.loads(json.dumps(first.state_dict()))
        (second,) = loaders(folder, 1, workers, **options)
        second.load_state_dict(state)
        rest = list(itertools.islice(second.forever(), 60 - stop))
        for ours, theirs in zip(rest, expected[stop:], strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (4, 0), (4, 2), (2, 0)])
def test_2_processes_resume_on_others_without_loss_or_double(world: int, workers: int, folder: Path) -> None:
    ranks = loaders(folder, 2, 2)
    parts = [list(itertools.islice(loader.forever(), 13)) for loader in ranks]
    before = numbers(parts[0]) + numbers(parts[1])
    assert all(loader.epoch == 0 for loader in ranks)
    state = json.loads(json.dumps(state_of(ranks)))
    resumed = loaders(folder, world, workers)
    for loader in resumed:
        loader.load_state_dict(state)
    after = [number for loader in resumed for number in numbers(list(loader))]
    assert Counter(before + after) == GOOD
    again = [number for loader in resumed for number in numbers(list(loader))]
    assert Counter(again) == GOOD


SIZES = st.lists(st.integers(1, 9), min_size=6, max_size=9)
TOPOLOGIES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(sizes=SIZES, topologies=TOPOLOGIES, buffer=st.integers(0, 12), data=st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_the_numbers_of_lanes_each_sample_once(
    sizes: list[int], topologies: list[int], buffer: int, data: st.DataObject
) -> None:
    """Runs of any length on any number of lanes, one after the other, over two epochs and a bit."""

    def read(url: str) -> Iterator[ShardSample]:
        return iter([ShardSample(str(i), {}) for i in range(sizes[int(url)])])

    shards = [str(i) for i in range(len(sizes))]
    order = ShardOrder(len(sizes), 3, buffer, False)
    seen: Counter[tuple[int, int, int]] = Counter()
    state: dict[str, Any] | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ibq_fast.data.shards, "read_shard", read)
        for lanes in [*topologies, 1]:
            progress = Progress(lanes) if state is None else Progress.restored(state, lanes)
            stream = object.__new__(ibq_fast.data.shards._ShardStream)
            stream.shards, stream.order, stream.progress = shards, order, progress
            stream.endless, stream.last_epoch = True, 0
            for lane in range(lanes):
                ends: list[tuple[int, int]] = []
                most = 4 * sum(sizes) if lanes == 1 else data.draw(st.integers(0, sum(sizes)))
                for unit, ordinal, _ in itertools.islice(stream._shuffled(lane, ends), most):
                    seen[order.epoch(unit), order.shard(unit), ordinal] += 1
                    progress.handed_out(unit, ordinal)
                    for end in ends:
                        progress.ended(*end)
                    ends.clear()
                    progress.advance(lane)
            states = list(itertools.chain(*(progress.state_dict(range(i, i + 1)) for i in range(lanes))))
            state = json.loads(
                json.dumps({"head": progress.head, "following": progress.following, "lanes": states})
            )
    assert set(seen.values()) == {1}
    last = order.epoch(progress.unit(0, progress.lanes[0].index))  # where the one lane of the end is
    assert last >= 3
    for epoch in range(last):
        assert sum(e == epoch for e, _, _ in seen) == sum(sizes), "an epoch that is over is whole"


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_good_sample_once_each_time(workers: int, folder: Path) -> None:
    data = config(folder, val_root=f"{folder}/train-*.tar", num_workers=workers, batch_size=16)
    ranks = [build_loader(data, "val", seed=0, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(2):
        seen = [number for loader in ranks for number in numbers(list(loader))]
        assert Counter(seen) == GOOD


def test_shards_from_pipes_globs_and_lists(folder: Path) -> None:
    cat = f"pipe:cat {folder}/train-{{0000..0003}}.tar"
    rest = f"{folder}/train-000[4-7].tar"
    assert len(find_shards(f"{cat}::{rest}")) == SHARDS
    (loader,) = loaders(folder, 1, 0, root=f"{cat}::{rest}")
    assert Counter(numbers(list(loader))) == GOOD


def test_broken_shards_are_named_and_the_rest_is_read(folder: Path, tmp_path: Path) -> None:
    for name in ("train-0000.tar", "train-0001.tar", "train-0002.tar"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    whole = (tmp_path / "train-0001.tar").read_bytes()
    (tmp_path / "train-0001.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (tmp_path / "train-0002.tar").write_bytes(b"")
    (loader,) = loaders(tmp_path, 1, 0, root=f"{tmp_path}/*.tar::pipe:cat {tmp_path}/none.tar")
    seen = Counter(numbers(list(loader)))
    assert set(range(25)) - set(BROKEN) <= set(seen) < set(range(50))
    assert set(seen.values()) == {1}
    broken = [
        (Path(s.shard).name, s.key)
        for s in loader.bad
        if s.reason.startswith("the shard cannot be read to its end: ")
    ]
    assert {name for name, _ in broken} == {"train-0001.tar", "train-0002.tar", "none.tar"}
    assert dict(broken)["train-0001.tar"].startswith("(after 000")


def test_samples_without_labels_and_with_bad_ones(tmp_path: Path) -> None:
    samples = {
        "a": {"png": png(1)},
        "b": {"png": png(2), "cls": b"7"},
        "c": {"png": png(3), "cls": b"seven"},
        "d": {"png": png(4), "json": b"[]"},
        "e": {"png": png(5), "json": b"{}"},
    }
    write_shard(tmp_path / "s.tar", samples)
    (loader,) = loaders(tmp_path, 1, 0, root=f"{tmp_path}/s.tar")
    batches = list(loader)
    assert dict(zip(numbers(batches), torch.cat([b.labels for b in batches]).tolist(), strict=True)) == {
        1: -1,
        2: 7,
        5: -1,
    }
    assert {(s.key, s.reason.split(":")[0]) for s in loader.bad} == {
        ("c", "the label is not an integer"),
        ("d", "the label is not an integer"),
    }


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", {f"{i:03}": {"png": b""} for i in range(30)})
    (loader,) = loaders(tmp_path, 1, 0, root=f"{tmp_path}/s.tar", max_bad_fraction=0.01)
    with pytest.raises(DataError, match=r"of \d+ samples were bad, more than max_bad_fraction 0\.01.*s\.tar"):
        next(loader.forever())


def test_too_few_shards(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="num_workers: expected at most one for each of 8 shards, got 3 on each of 4"
    ):
        loaders(folder, 4, 3)
    assert len(loaders(folder, 4, 3, resample=True)) == 4


def test_missing_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none-01\.tar: expected a tar shard, got nothing of that name"):
        find_shards(f"{tmp_path}/none-{{01..02}}.tar")


def test_other_shards_begin_the_epoch_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (loader,) = loaders(folder, 1, 0)
    list(itertools.islice(loader.forever(), 5))
    (other,) = loaders(folder, 1, 0, root=f"{folder}/train-{{0000..0006}}.tar")
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(loader.state_dict())
    assert "data: other shards than the checkpoint's: the epoch begins anew" in caplog.text
    assert len(numbers(list(other))) == 175 - 6
