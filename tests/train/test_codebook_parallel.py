"""A codebook split over processes computes what one process with all codes and all features does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

import ibq_fast.codebook_parallel.shards as shards_module
import ibq_fast.kmeans as kmeans_module
from ibq_fast.codebook_parallel import CodebookShards, collect, parallel_index_backprop
from ibq_fast.ops.entropy import entropy_of_mean
from ibq_fast.ops.index_backprop import reference as index_backprop_reference
from ibq_fast.quantizer import IndexBackpropQuantizer, VectorQuantizer

K, D = 37, 6  # no even split
ROWS = (5, 0, 7, 3)  # of each process
TWINS = (4, 33)  # equal codes of different shards

CASES: dict[str, dict[str, Any]] = {
    "dot": {},
    "peaked": {"logit_scale": 30.0, "entropy_temperature": 0.2},
    "euclidean": {"similarity": "euclidean", "logit_scale": 0.7},
    "cosine": {"similarity": "cosine", "logit_scale": 4.0, "commitment": "paper"},
    "learned": {"similarity": "euclidean", "logit_scale_kind": "learned"},
    "over all rows": {"entropy_reduce": "all", "logit_scale_kind": "learned", "similarity": "cosine"},
    "without entropies": {"sample_entropy_weight": 0.0, "codebook_entropy_weight": 0.0},
}


def quantizer_of(case: str, dtype: torch.dtype = torch.float64) -> IndexBackpropQuantizer:
    torch.manual_seed(3)
    settings = {"entropy_temperature": 0.5, **CASES[case]}
    quantizer = IndexBackpropQuantizer(codebook_size=K, dim=D, **settings).to(dtype)
    with torch.no_grad():
        quantizer.codebook[TWINS[1]] = quantizer.codebook[TWINS[0]]
    return quantizer


def rows_and_weights(world: int) -> tuple[list[Tensor], list[Tensor]]:
    """Each process's features, one of them best served by the twins; and what its output is weighed with."""
    torch.manual_seed(4)
    features = torch.randn(sum(ROWS[:world]), D, dtype=torch.float64)
    features[1] = 3.0 * quantizer_of("dot").codebook.detach()[TWINS[0]]
    weights = torch.randn(sum(ROWS[:world]), D, dtype=torch.float64)
    return list(features.split(ROWS[:world])), list(weights.split(ROWS[:world]))


def parts_of(out: Any, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    values = {name: value.detach() for name, value in out._asdict().items()}
    return out.quantization_loss + out.entropy_loss + (weight * out.z_q).sum(), values


def whole_result(case: str, world: int) -> tuple[list[dict[str, Tensor]], list[Tensor], dict[str, Tensor]]:
    """What one process computes: each one's values, its dz, and the gradients of Σ_r L_r."""
    quantizer = quantizer_of(case)
    rows, weights = rows_and_weights(world)
    rows = [r.clone().requires_grad_() for r in rows]
    together = quantizer(torch.cat(rows), channel_last=True)
    total, values = torch.zeros((), dtype=torch.float64), []
    for own, weight in zip(rows, weights, strict=True):
        out = quantizer(own, channel_last=True)
        if quantizer.config.entropy_reduce == "all":
            c = quantizer.config
            entropy = (
                c.sample_entropy_weight * out.sample_entropy
                - c.codebook_entropy_weight * together.codebook_entropy
            )
            out = out._replace(codebook_entropy=together.codebook_entropy, entropy_loss=entropy)
        loss, found = parts_of(out, weight)
        total = total + loss
        values.append(found)
    total.backward()
    grads = {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    return values, [r.grad if r.grad is not None else torch.zeros_like(r) for r in rows], grads


def split_result(world: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    shards_module.PIECE, kmeans_module.PIECE = 5, 8  # rows that travel, or are drawn, at a time
    rank = dist.get_rank()
    rows, weights = rows_and_weights(world)
    results: dict[str, Any] = {}
    for size in {world, 2}:
        shards = CodebookShards(K, size)
        for case in CASES:
            quantizer = quantizer_of(case)
            quantizer.split_codebook(shards)
            own = rows[rank].clone().requires_grad_()
            loss, values = parts_of(quantizer(own, channel_last=True), weights[rank])
            loss.backward()
            assert quantizer.codebook.grad is not None
            grads = {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
            if shards.replicas is not None:
                dist.all_reduce(grads["codebook"], group=shards.replicas)
            grads["codebook"] = collect(shards, grads["codebook"])
            for name in grads:
                if name != "codebook":
                    dist.all_reduce(grads[name])
            with torch.no_grad():
                values["encoded"] = quantizer.encode(own, channel_last=True)
                values["decoded"] = quantizer.decode(values["indices"], channel_last=True)
                values["logits"] = quantizer.logits(own, channel_last=True)
                values["unseen"] = quantizer.eval()(own, channel_last=True).codebook_entropy
            results[f"{case}, {size}"] = (values, own.grad, grads)
    if world == 2:
        results["inits"] = inits()
        results["float32"] = in_float32()
        results["refused"] = refused()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


INITS = ("normal", "scaled", "features", "kmeans")


def inits() -> dict[str, tuple[Tensor, Tensor | None]]:
    """The codes after the first steps, whole and split, of features that are fewer and more than they are."""
    found = {}
    for init in INITS:
        for count in (10, 40):
            codebooks: list[Tensor | None] = []
            for split in (False, True):
                torch.manual_seed(dist.get_rank())
                quantizer = IndexBackpropQuantizer(codebook_size=K, dim=D, init=init, init_batches=2).train()
                if split:
                    shards = CodebookShards(K)
                    quantizer.split_codebook(shards)
                features = [
                    torch.randn(count, D, generator=torch.Generator().manual_seed(i)) for i in range(2)
                ]
                torch.manual_seed(dist.get_rank() + 5)
                if not split and init in ("normal", "scaled"):
                    dist.broadcast(quantizer.codebook.data, 0)  # as DistributedDataParallel does
                for batch in features:
                    quantizer(batch + dist.get_rank(), channel_last=True)
                codebook = quantizer.codebook.detach()
                codebooks.append(collect(shards, codebook) if split else codebook)
            found[f"{init}, {count}"] = tuple(codebooks)
    return found


N32, K32, D32, TAU = 24, 300, 16, 0.01


def operands(spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """z, codebook and weights of the outputs, exact in float32; all but the first row as they come."""
    torch.manual_seed(7)
    z, codebook, weight = (torch.randn(n, D32, dtype=torch.float64) for n in (2 * N32, K32, 2 * N32))
    return z.float().double(), (spread * codebook).float().double(), weight.float().double()


def in_float32() -> dict[float, Any]:
    """dz, of both, and dE of a step in float32, logits of some tens to hundreds over τ = 0.01."""
    rank = dist.get_rank()
    shards = CodebookShards(K32)
    found = {}
    for spread in (1.0, 6.0):
        z, codebook, weight = (t.float() for t in operands(spread))
        own = z.split(N32)[rank].clone().requires_grad_()
        shard = shards.part(codebook).clone().requires_grad_()
        out = parallel_index_backprop(shards, own, shard, temperature=TAU, over_all_rows=True)
        loss = (out.z_q * weight.split(N32)[rank]).sum() + out.sample_entropy - out.codebook_entropy
        loss.backward()
        assert own.grad is not None
        assert shard.grad is not None
        found[spread] = (shards.gather(own.grad, [N32, N32]), collect(shards, shard.grad))
    return found


def plain(spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same by the formula with N×K tensors: of Σ_r L_r, dz and dE."""
    z, codebook, weight = (t.to(dtype) for t in operands(spread))
    z.requires_grad_()
    codebook.requires_grad_()
    z_q, _, _, _, _, row_entropy, mean_prob, *_ = index_backprop_reference(z, codebook, None, 1.0, 0.0, TAU)
    loss = (z_q * weight).sum() + row_entropy.sum() / N32 - 2 * entropy_of_mean(mean_prob)
    loss.backward()
    assert z.grad is not None
    assert codebook.grad is not None
    return z.grad.double(), codebook.grad.double()


def refused() -> list[str]:
    """What each wrong setting is told."""
    quantizer = IndexBackpropQuantizer(codebook_size=K, dim=D)
    shards = CodebookShards(K)
    quantizer.split_codebook(shards)
    other = IndexBackpropQuantizer(codebook_size=K + 1, dim=D)
    vq = VectorQuantizer(codebook_size=K, dim=D)
    restarting = IndexBackpropQuantizer(codebook_size=K, dim=D, restart_after=1)
    calls: list[Callable[[], Any]] = [
        lambda: CodebookShards(K, 3),
        lambda: CodebookShards(1),
        lambda: quantizer.split_codebook(shards),
        lambda: other.split_codebook(shards),
        lambda: vq.split_codebook(shards),
        lambda: restarting.split_codebook(shards),
    ]
    said = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


REFUSED = [
    "codebook_parallel: expected a divisor of the 2 processes, from 2 on, got 3",
    "codebook_parallel: expected a code for each of 2 processes, got 1",
    "codebook_parallel: expected a whole codebook, got one that is split already",
    f"shards: expected a split of {K + 1} codes, got {K}",
    "codebook_parallel: expected a quantizer of kind ibq, got 'vq'",
    "restart_after: expected 0 with a split codebook, got 1",
]


@pytest.mark.parametrize("world", [2, 4])
def test_values_and_gradients_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run_ranks(world, split_result, world, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    if world == 2:
        assert ranks[0]["refused"] == ranks[1]["refused"] == REFUSED
        check_inits(ranks[0]["inits"])
        check_float32(ranks[0]["float32"])
    close = {"rtol": 1e-9, "atol": 1e-12}
    for case in CASES:
        values, grad_rows, grads = whole_result(case, world)
        quantizer = quantizer_of(case).eval()
        rows, _ = rows_and_weights(world)
        for size in {world, 2}:
            results = [rank[f"{case}, {size}"] for rank in ranks]
            for r, (found, grad, _) in enumerate(results):
                for name, value in values[r].items():
                    torch.testing.assert_close(found[name], value, **close)
                if rows[r].numel():
                    torch.testing.assert_close(grad, grad_rows[r], **close)
                assert torch.equal(found["encoded"], values[r]["indices"])
                torch.testing.assert_close(found["decoded"], values[r]["z_q"], **close)
                torch.testing.assert_close(
                    found["logits"], quantizer.logits(rows[r], channel_last=True), **close
                )
                alone = quantizer(rows[r], channel_last=True).codebook_entropy.detach()
                torch.testing.assert_close(found["unseen"], alone, **close)
            for name, grad in grads.items():
                torch.testing.assert_close(results[0][2][name], grad, **close)
            # the equal codes of different shards: the lower index wins
            assert results[0][0]["indices"][1] == TWINS[0]


def check_inits(found: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (whole, split) in found.items():
        if name.startswith("kmeans"):  # sums over the processes in another order
            torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert torch.equal(split, whole), name
    assert len(found) == 2 * len(INITS)


def check_float32(found: dict[float, tuple[Tensor, Tensor]]) -> None:
    """At most twice as far from float64 as the plain formula in float32; rows peaked and less so."""
    for spread, grads in found.items():
        truths, eagers = plain(spread, torch.float64), plain(spread, torch.float32)
        for ours, truth, eager in zip(grads, truths, eagers, strict=True):
            floor = 4 * torch.finfo(torch.float32).eps * float(truth.abs().max())
            error, bound = (ours - truth).abs().max(), (eager - truth).abs().max()
            assert error <= 2 * bound + floor, (spread, float(error), float(bound))


def test_one_process_cannot_split() -> None:
    with pytest.raises(
        ValueError, match=r"codebook_parallel: expected several processes \(torchrun\), got one"
    ):
        CodebookShards(K)
