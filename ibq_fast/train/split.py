"""Training with a codebook that is split over processes: what differs from one that every process has.

The shard is a parameter of its process alone: DistributedDataParallel leaves it out, its gradient is averaged
here, and what is saved is the whole codebook with whole optimizer state and averages.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ibq_fast.codebook_parallel import CodebookShards, CollectedRows, collect

CODEBOOK = "quantizer.codebook"


class SplitCodebook:
    """Splits the codebook of ``tokenizer``, in place, before it has an optimizer and is wrapped."""

    def __init__(self, tokenizer: Any, shards: CodebookShards) -> None:
        self._shards = shards
        tokenizer.quantizer.split_codebook(shards)
        self._quantizer = tokenizer.quantizer
        # The name under which DistributedDataParallel looks for what it should not synchronise.
        tokenizer._ddp_params_and_buffers_to_ignore = [CODEBOOK]

    def average_gradient(self) -> None:
        """The shard's gradient of the sum of all losses becomes that of their mean, as the others'."""
        grad = self._quantizer.codebook.grad
        if self._shards.replicas is not None:
            dist.all_reduce(grad, group=self._shards.replicas)
        grad.div_(dist.get_world_size())

    def clip_grad_norm(self, module: nn.Module, max_norm: float) -> Tensor:
        """Clip by the norm over all weights, the whole codebook among them; returns that norm."""
        codebook = self._quantizer.codebook
        others = [p.grad for p in module.parameters() if p.grad is not None and p is not codebook]
        square = self._shards.sum(nn.utils.get_total_norm(codebook.grad).square())
        norm = (square + nn.utils.get_total_norm(others).square()).sqrt()
        nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
        return norm

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A network's ``state``, its codebook, moments and average to be collected by the main process."""

        def collected(tensor: Tensor) -> CollectedRows | Tensor:
            # Adam's count of steps is a scalar.
            return CollectedRows(self._shards, tensor) if tensor.dim() else tensor

        return _of_codebook(state, collected)

    def divided(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """``state`` with the own part of what is whole in it (see :meth:`rows_to_read`)."""
        whole = (self._shards.codebook_size,)

        def part(tensor: Tensor) -> Tensor:
            return self._shards.part(tensor) if tensor.shape[:1] == whole else tensor

        return _of_codebook(state, part)

    def rows_to_read(self, name: str, shape: Sequence[int]) -> slice | None:
        """The rows that this process needs of a checkpoint's tensor ``name``; None: all of them.

        Raises ValueError for another codebook size.
        """
        if CODEBOOK not in name or not shape:
            return None
        if shape[0] != self._shards.codebook_size:
            raise ValueError(
                f"checkpoint: {CODEBOOK}: expected {self._shards.codebook_size} codes, got {list(shape)}"
            )
        return slice(self._shards.start, self._shards.stop)

    def outline(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights ``own`` with the codebook's shape that of the whole one."""
        shape = (self._shards.codebook_size, *own[CODEBOOK].shape[1:])
        return {**own, CODEBOOK: own[CODEBOOK].new_empty(shape, device="meta")}

    def joined(self, tokenizer: nn.Module) -> nn.Module | None:
        """A copy of ``tokenizer`` with the whole codebook, on the CPU of the main process; None elsewhere."""
        codebook = collect(self._shards, self._quantizer.codebook)
        if codebook is None:
            return None
        own = self._quantizer.codebook
        whole: Any = copy.deepcopy(tokenizer, {id(own): own})  # but for the shard
        whole.quantizer.join_codebook(codebook)
        return whole.cpu()


def _of_codebook(state: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """``state`` of a network (see ``Trained.state``) with ``change`` applied to what is the codebook's."""
    model, optimizer, ema = dict(state["model"]), state["optimizer"], state["ema"]
    model[CODEBOOK] = change(model[CODEBOOK])
    if optimizer is not None and CODEBOOK in optimizer:
        moments = {name: change(value) for name, value in optimizer[CODEBOOK].items()}
        optimizer = {**optimizer, CODEBOOK: moments}
    if ema is not None and ema["average"]:
        average = {**ema["average"], CODEBOOK: change(ema["average"][CODEBOOK])}
        ema = {**ema, "average": average}
    return {**state, "model": model, "optimizer": optimizer, "ema": ema}
