"""First codes by k-means are of all processes' features and the same on each."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import run_ranks

from ibq_fast.quantizer import VectorQuantizer


def fit(folder: str) -> int:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    quantizer = VectorQuantizer(codebook_size=6, dim=3, init="kmeans", init_batches=2).train()
    for batch in range(2):  # each process and batch has features of its own place
        features = 0.1 * torch.randn(30, 3) + 100.0 * (1 + rank + 2 * batch)
        quantizer(features, channel_last=True)
    torch.save(quantizer.codebook.detach(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    return 0


def test_processes_agree_on_codes_of_all_their_features(tmp_path: Path) -> None:
    run_ranks(2, fit, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    # Starting from one process's rows the other's places are found too.
    nearest = torch.cdist(torch.tensor([[200.0] * 3, [400.0] * 3]), first).amin(1)
    assert (nearest < 120).all()
