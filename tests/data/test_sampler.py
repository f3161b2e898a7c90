"""Every image once, disjoint over ranks, in an order that is a function of seed and epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_fast.data import ResumableBatchSampler

sizes = st.integers(1, 60)
batches = st.integers(1, 17)
worlds = st.integers(1, 5)


def _epoch(sampler: ResumableBatchSampler, epoch: int = 0, step: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in sampler.batches(epoch, step)]


@given(size=sizes, batch=batches, world=worlds, shuffle=st.booleans(), epoch=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_ranks_are_disjoint_and_complete(
    size: int, batch: int, world: int, shuffle: bool, epoch: int
) -> None:
    seen: list[int] = []
    for rank in range(world):
        sampler = ResumableBatchSampler(
            size, batch, seed=4, shuffle=shuffle, drop_last=False, rank=rank, world_size=world
        )
        mine = _epoch(sampler, epoch)
        assert len(mine) == len(sampler)
        assert all(1 <= len(one) <= batch for one in mine)
        seen += itertools.chain(*mine)
    assert sorted(seen) == list(range(size))


@given(size=sizes, batch=batches, world=worlds)
@settings(max_examples=40, deadline=None)
def test_training_ranks_have_the_same_number_of_full_batches(size: int, batch: int, world: int) -> None:
    if size < batch * world:
        with pytest.raises(
            ValueError, match=f"batch_size: expected at most {size // world} for {size} images"
        ):
            ResumableBatchSampler(size, batch, world_size=world)
        return
    ranks = [_epoch(ResumableBatchSampler(size, batch, rank=r, world_size=world)) for r in range(world)]
    assert {len(rank) for rank in ranks} == {size // (batch * world)}
    seen = [index for rank in ranks for one in rank for index in one]
    assert len(seen) == len(set(seen)) == size // (batch * world) * batch * world


def test_steps_do_not_depend_on_the_number_of_ranks() -> None:
    one = _epoch(ResumableBatchSampler(50, 12, seed=2), 3)
    two = [_epoch(ResumableBatchSampler(50, 6, seed=2, rank=rank, world_size=2), 3) for rank in range(2)]
    assert one == [left + right for left, right in zip(*two, strict=True)]


def test_any_step_can_be_the_first() -> None:
    sampler = ResumableBatchSampler(100, 7, seed=9)
    whole = _epoch(sampler, 5)
    for step in range(len(sampler) + 1):
        assert _epoch(ResumableBatchSampler(100, 7, seed=9), 5, step) == whole[step:]


def test_order_is_new_in_each_epoch_and_seed() -> None:
    orders = [
        list(itertools.chain(*_epoch(ResumableBatchSampler(64, 8, seed=seed), epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    together = np.mean([abs(np.corrcoef(a, b)[0, 1]) for a in orders for b in orders if a is not b])
    assert together < 0.3


REFUSED = {
    "batch_size": ((10, 0), {}, "batch_size: expected at least 1, got 0"),
    "rank": ((10, 1), {"rank": 2, "world_size": 2}, r"rank: expected one of 0..1 \(world_size 2\), got 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments(name: str) -> None:
    args, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ResumableBatchSampler(*args, **options)


def test_step_out_of_range() -> None:
    with pytest.raises(IndexError, match=r"step: expected one of 0\.\.4, got 5"):
        ResumableBatchSampler(10, 2).batch(0, 5)
