"""Codes set from features, by k-means or as restarts, are of all processes' features and the same on each."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_ranks

from ibq_fast.quantizer import IndexBackpropQuantizer, VectorQuantizer


def fit(folder: str) -> int:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    quantizer = VectorQuantizer(codebook_size=6, dim=3, init="kmeans", init_batches=2).train()
    for batch in range(2):  # each process and batch has features of its own place
        features = 0.1 * torch.randn(30, 3) + 100.0 * (1 + rank + 2 * batch)
        quantizer(features, channel_last=True)
    torch.save(quantizer.codebook.detach(), Path(folder) / f"{rank}.pt")
    torch.save(restarted(rank), Path(folder) / f"restarted_{rank}.pt")
    dist.destroy_process_group()
    return 0


def restarted(rank: int) -> torch.Tensor:
    """Codes 0 and 1 are chosen by one process each, 2 and 3 by none."""
    quantizer = IndexBackpropQuantizer(
        codebook_size=4, dim=3, similarity="euclidean", restart_after=2
    ).train()
    places = torch.tensor([1.0, 2.0, 500.0, 600.0])
    with torch.no_grad():
        quantizer.codebook.copy_(places.unsqueeze(1).expand(4, 3))
    for _ in range(3):
        quantizer(0.1 * torch.randn(30, 3) + 1.0 + rank, channel_last=True)
    return quantizer.codebook.detach()


def test_processes_agree_on_codes_of_all_their_features(tmp_path: Path) -> None:
    run_ranks(2, fit, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    # Starting from one process's rows the other's places are found too.
    nearest = torch.cdist(torch.tensor([[200.0] * 3, [400.0] * 3]), first).amin(1)
    assert (nearest < 120).all()
    first, second = (torch.load(tmp_path / f"restarted_{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert first[:2].tolist() == [[1.0] * 3, [2.0] * 3], "in use by one process: not idle"
    assert bool((first[2:] < 3).all()), "idle on both: moved to a feature"
