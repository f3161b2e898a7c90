"""A codebook split over processes computes what one process with all codes and all features does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from ibq_fast.codebook_parallel import CodebookShards, collect
from ibq_fast.quantizer import IndexBackpropQuantizer

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
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_values_and_gradients_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run_ranks(world, split_result, world, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
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
