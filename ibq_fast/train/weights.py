"""One trained module with its optimizer, and its averaged weights if there are any."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from ibq_fast.checkpoint.pretrained import check_weights
from ibq_fast.train.ema import WeightAverage
from ibq_fast.train.optimizer import (
    OptimConfig,
    build_optimizer,
    load_moments,
    moments_by_name,
    set_rates,
)
from ibq_fast.train.sharding import shard, sharded_like, whole
from ibq_fast.train.split import SplitCodebook


class Trained:
    """``module`` as accelerate prepared it, ``bare`` without the wrapper that synchronises gradients.

    One update is: :meth:`set_rates`, a backward pass per micro-batch inside :meth:`micro`, :meth:`apply`.

    ``sharded``: the parts of ``module`` that are gathered one at a time; the weights are then spread over the
    processes (see :mod:`ibq_fast.train.sharding`), and gradients are synchronised in every micro-batch. None:
    each process has them all.

    ``split``: what it takes to train a tokenizer whose codebook is spread, and nothing else of it.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimConfig,
        accelerator: Accelerator,
        *,
        averaged: bool,
        sharded: list[nn.Module] | None = None,
        split: SplitCodebook | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._config = config
        self._sharded = sharded is not None
        self._split = split
        if self._sharded and config.ema_on_cpu:
            raise ValueError(
                "optim.ema_on_cpu: expected false with run.fsdp, which spreads the averages anyway"
            )
        # First, because a device that is no part of PyTorch (an NPU) gets new parameters, and an optimizer
        # built before would go on updating the old ones.
        module.to(accelerator.device)
        if sharded is None:
            self.module, self._optimizer = accelerator.prepare(
                module, build_optimizer(config, module.parameters())
            )
        else:
            self._whole = copy.deepcopy(module).to("meta")
            self.module = accelerator.prepare_model(module, evaluation_mode=True)  # device and autocast only
            shard(self.module, sharded)
            self._optimizer = accelerator.prepare(build_optimizer(config, module.parameters()))
        self.bare: nn.Module = module if self._sharded else accelerator.unwrap_model(self.module)
        self.average = (
            WeightAverage(self.bare, config.ema_decay, on_cpu=config.ema_on_cpu)
            if averaged and config.ema_decay > 0
            else None
        )
        self.rate = config.lr

    def set_rates(self, step: int, progress: float, total_steps: int | None) -> None:
        """Learning rate and weight decay of the coming update."""
        self.rate = set_rates(self._optimizer, self._config, step, progress, total_steps)

    @contextmanager
    def micro(self, index: int) -> Iterator[None]:
        """Around the backward pass of micro-batch ``index``: only the last one synchronises gradients."""
        last = index == self._config.accumulate - 1
        with nullcontext() if last else self._accelerator.no_sync(self.module):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of ``loss`` / number of micro-batches."""
        self._accelerator.backward(loss / self._config.accumulate)

    def apply(self) -> torch.Tensor | None:
        """Clip, update, clear gradients, average. Returns the gradient's norm when it is clipped."""
        norm = None
        if self._split is not None:
            self._split.average_gradient()
            if self._config.clip_norm > 0:
                norm = self._split.clip_grad_norm(self.bare, self._config.clip_norm)
        elif self._config.clip_norm > 0:
            norm = self._accelerator.clip_grad_norm_(self.module.parameters(), self._config.clip_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        # A gradient scaler meets infinite gradients by design and skips the update: no alarm then.
        return None if self._accelerator.scaler is not None else norm

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The bare module in eval mode, with averaged weights where there are any."""
        was_training = self.bare.training
        with self.average.applied() if self.average is not None else nullcontext():
            self.bare.eval()
            try:
                yield self.bare
            finally:
                self.bare.train(was_training)

    @contextmanager
    def exporting(self) -> Iterator[nn.Module | None]:
        """As :meth:`evaluating`, with all weights in one place: on the main process, None on the others.

        All processes call it together.
        """
        with self.evaluating() as model:
            main = self._accelerator.is_main_process
            if self._sharded:
                weights = whole(model.state_dict(), main)
                model = copy.deepcopy(self._whole).to_empty(device="cpu").eval() if main else model
                if main:
                    model.load_state_dict(weights)
                    model.to(self._accelerator.device)
            if self._split is not None:
                yield self._split.joined(model)
            else:
                yield model if main else None

    def state(self) -> dict[str, Any]:
        """Whole tensors, complete on the main process; all processes call it together."""
        scaler = self._accelerator.scaler
        state = {
            "model": self.bare.state_dict(),
            "optimizer": moments_by_name(self._optimizer, self.bare),
            "ema": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        if self._split is not None:
            return self._split.whole(state)
        return whole(state, self._accelerator.is_main_process) if self._sharded else state

    def start_from(self, state: Mapping[str, Any], source: str, may_lack: Collection[str] = ()) -> None:
        """Load another run's or a published model's state as the beginning of this one.

        Raises ValueError, naming ``source`` and the weight, where it does not fit. Weights in ``may_lack``
        keep their own values where the state has none; an optimizer or average it lacks starts afresh.
        """
        own = self.bare.state_dict()
        model = {**{name: own[name] for name in may_lack}, **state["model"]}
        check_weights(own if self._split is None else self._split.outline(own), model, Path(source))
        ema = state["ema"]
        if ema is not None and ema["average"]:
            ema = {**ema, "average": {**{name: own[name] for name in may_lack}, **ema["average"]}}
        self.load_state({**state, "model": model, "ema": ema, "scaler": None})

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state does not fit the module.

        A state from elsewhere may lack the optimizer or the average (None): they start afresh.
        """
        if self._sharded:
            state = self._divided(state)
        if self._split is not None:
            state = self._split.divided(state)
        try:
            self.bare.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"checkpoint: expected weights of this config's model: {error}") from error
        if state["optimizer"] is not None:
            load_moments(self._optimizer, self.bare, state["optimizer"])
        if self.average is not None and state["ema"] is not None:
            self.average.load_state_dict(state["ema"])
        if self._accelerator.scaler is not None and state["scaler"]:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def _divided(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` of whole tensors, sharded as the module is."""
        own = self.bare.state_dict()

        def divided(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: sharded_like(t, own[name]) if name in own else t for name, t in tensors.items()}

        def alike(entry: dict[str, torch.Tensor], weight: torch.Tensor) -> dict[str, torch.Tensor]:
            return {k: sharded_like(v, weight) if v.shape == weight.shape else v for k, v in entry.items()}

        ema, moments = state["ema"], state["optimizer"]
        return {
            **state,
            "model": divided(state["model"]),
            "optimizer": moments and {name: alike(entry, own[name]) for name, entry in moments.items()},
            "ema": ema and {**ema, "average": divided(ema["average"])},
        }
