"""The table of tiles: complete, honest about what was measured, and rewritten as it stands by the tuner."""

from __future__ import annotations

import json

import pytest
import torch

from ibq_fast.ops.triton import plan, tune

GPUS = ("sm_80", "sm_90", "sm_100", "npu")
KEYS = ("2", "2 wide", "4", "4 wide")


@pytest.mark.parametrize("architecture", [*GPUS, plan.INTERPRETER])
@pytest.mark.parametrize("kernel", plan.KERNELS)
@pytest.mark.parametrize("key", KEYS)
def test_every_entry_is_a_tile(architecture, kernel, key) -> None:
    width, *wide = key.split()
    assert plan.entry(architecture, kernel, int(width), bool(wide)).rows >= 16


def test_unmeasured_tables_say_so() -> None:
    table = plan.load_table()
    assert set(table) == {*GPUS, plan.INTERPRETER}
    for name in GPUS:
        assert table[name]["measured"] == plan.NOT_MEASURED


def test_tiles_fit_the_dimension() -> None:
    for dimension, depth in ((1, 16), (33, 64), (256, 256)):
        blocks = plan.fit("sm_90", "joint", 2, dimension)
        assert (blocks.whole, blocks.depth, blocks.chunks) == (True, depth, 1)
    blocks = plan.fit("sm_90", "row_gradient", 2, 1000)
    assert (blocks.whole, blocks.out, blocks.chunks) == (False, 256, 4)
    with pytest.raises(ValueError, match="expected an entry sm_70/joint/2, got none"):
        plan.fit("sm_70", "joint", 2, 8)
    with pytest.raises(ValueError, match="rows: expected a power of two from 16 on, got 48"):
        plan.Tile(48, 32, 64, 64, 4, 2)


@pytest.mark.parametrize("tiles", [1, 7, 128, 2048])
@pytest.mark.parametrize("others", [1, 3, 131, 132, 140, 264, 5000])
def test_splits_cover_every_tile_and_fill_the_device(tiles, others, monkeypatch) -> None:
    monkeypatch.setattr(plan, "units", lambda device: 132)
    count, each = plan.splits(tiles, others, 1, torch.device("cuda"))
    assert (count - 1) * each < tiles <= count * each
    assert count == 1 or count * others <= 2 * 132 + others
    if tiles == 2048 and others < 264:
        assert count * others >= 132


def test_the_tuner_writes_the_table_as_it_stands() -> None:
    assert tune.dump(plan.load_table()) == plan.TABLE.read_text()


def test_the_tuner_keeps_the_fastest_tile_that_agrees() -> None:
    fast, wrong, large, slow = (plan.Tile(rows, 32, 64, 64, 4, 2) for rows in (16, 32, 64, 128))
    entry: dict = {}
    times = {16: 2.0, 32: 1.0, 128: 3.0}

    def run() -> tuple[torch.Tensor]:
        if entry["rows"] == large.rows:
            raise MemoryError
        return (torch.full((3,), 5.0 if entry["rows"] == wrong.rows else 1.0),)

    tiles, truth = (slow, wrong, large, fast), (torch.ones(3),)
    found = tune.best(entry, tiles, run, truth, 1e-3, lambda _: times[entry["rows"]], (MemoryError,))
    assert found == (fast, 2.0)
    assert entry == json.loads(json.dumps(entry))
    assert entry["rows"] == 16
    with pytest.raises(RuntimeError, match="at least one candidate tile"):
        tune.best(entry, (wrong,), run, (torch.ones(3),), 1e-3, lambda _: 0.0, ())


def test_the_tuner_says_that_there_is_no_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    assert "tiles are measured on a GPU, and PyTorch sees none here" in capsys.readouterr().err


@pytest.mark.parametrize("key", KEYS)
def test_candidates_hold_what_the_table_starts_from(key) -> None:
    tried = {(tile.warps, tile.stages) for tile in tune.candidates(key)}
    assert {(8, 2), (8, 3)} <= tried
