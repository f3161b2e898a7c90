"""Training checkpoints: what is read is what was written, and nothing half-written is ever taken for whole."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_fast.checkpoint import tensor_tree, training
from ibq_fast.checkpoint.training import (
    CheckpointWriteError,
    DamagedCheckpointError,
    check_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(d): torch.rand(3, 5, generator=generator).mul(7).to(d) for d in DTYPES}
    odd = {
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "transposed": torch.rand(4, 6, generator=generator).T,
    }
    return {
        "tensors": tensors,
        "odd": odd,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "betas": (0.5, 0.9)},
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save_checkpoint(
        tmp_path, 7, {"model": state(), "progress": {"seconds": 0.1 + 0.2, "none": None}}
    )
    loaded = load_checkpoint(folder)
    assert loaded["step"] == 7
    assert same(loaded["model"], state())
    assert same(loaded["progress"], {"seconds": 0.1 + 0.2, "none": None})


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=8)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text(max_size=8) | st.integers() | st.sampled_from(["$tensor", "$tuple", "a/b"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(tree=TREES)
@settings(max_examples=200, deadline=None)
def test_any_nesting_survives_json(tree: Any) -> None:
    plain, tensors = tensor_tree.flatten({"x": tree})
    assert same(tensor_tree.unflatten(json.loads(json.dumps(plain)), tensors), {"x": tree})


def test_paths_that_look_alike_stay_apart() -> None:
    tree = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    assert same(tensor_tree.unflatten(*tensor_tree.flatten(tree)), tree)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(2, dtype=torch.complex64)])
def test_what_cannot_be_written_is_named(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state/deep/1"):
        save_checkpoint(tmp_path, 1, {"part": {"deep": [0, value]}})
    assert list(tmp_path.iterdir()) == []


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step, {"model": state()}, keep_last=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000015", "step-00000020"]


def test_a_second_checkpoint_of_a_step_does_not_touch_the_first(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 5, {"model": state(1)})
    second = save_checkpoint(tmp_path, 5, {"model": state(2)})
    assert same(load_checkpoint(first)["model"], state(1))
    assert latest_checkpoint(tmp_path) == second


def damage_truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_remove(folder: Path) -> None:
    (folder / "model.json").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / training.MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_manifest])
def test_a_damaged_checkpoint_is_passed_over_and_said(damage: Any, tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, 5, {"model": state()})
    bad = save_checkpoint(tmp_path, 10, {"model": state()})
    damage(bad)
    with pytest.raises(DamagedCheckpointError, match="step-00000010"):
        check_checkpoint(bad)
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append) == good
    assert len(said) == 1
    assert "step-00000010" in said[0]


def test_a_damaged_checkpoint_set_aside_no_longer_counts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"model": state()})
    damage_flip(save_checkpoint(tmp_path, 10, {"model": state()}))
    latest_checkpoint(tmp_path, lambda message: None, set_aside=True)
    newest = save_checkpoint(tmp_path, 7, {"model": state()}, keep_last=1)
    assert list_checkpoints(tmp_path) == [newest]
    assert (tmp_path / "damaged-step-00000010").is_dir()


def test_an_unfinished_checkpoint_is_ignored_and_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-00000009").mkdir()
    (tmp_path / ".writing-step-00000009" / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    folder = save_checkpoint(tmp_path, 10, {"model": state()})
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", training.MANIFEST])
def test_a_full_disk_leaves_older_checkpoints_and_nothing_half_written(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save_checkpoint(tmp_path, 5, {"model": state()})
    full_disk_for(file, monkeypatch)
    with pytest.raises(CheckpointWriteError, match="step 10 was not written, No space left") as raised:
        save_checkpoint(tmp_path, 10, {"model": state()}, keep_last=1)
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [older]
    assert same(load_checkpoint(older)["model"], state())


def full_disk_for(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing ``file`` meets the kernel's own ENOSPC."""

    def open_full(path: Path) -> Any:
        return open("/dev/full" if path.name == file else path, "wb")

    monkeypatch.setattr(tensor_tree, "open_for_writing", open_full)
    monkeypatch.setattr(training, "open_for_writing", open_full)


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = save_checkpoint(tmp_path, 1, {"model": state()})
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["/tensors/torch.bfloat16"], state()["tensors"]["torch.bfloat16"])


def test_what_was_loaded_outlives_its_files(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, {"model": state()})
    loaded = load_checkpoint(folder)["model"]
    (folder / "model.safetensors").write_bytes(b"")
    assert same(loaded, state())
