"""Optimizers from configs: which parameters decay, which rate they run at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ibq_fast.train.schedule import ScheduleConfig, learning_rate_factor, weight_decay_at


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated.

    Args:
        kind: adam, or adamw with decoupled weight decay on matrices only (two or more dimensions).
        lr: peak learning rate.
        betas: decay of the averages of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: at the start.
        weight_decay_end: at the end, reached along a half cosine (null: it stays).
        clip_norm: largest norm of the gradient (0: no clipping).
        accumulate: micro-batches per update.
        ema_decay: of the averaged weights that are evaluated and exported (0: none are kept).
        ema_on_cpu: keep the averages in the CPU's memory; each update then copies the weights there.
        schedule: of the learning rate.
    """

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    eps: float = 1e-8
    weight_decay: float = 0.0
    weight_decay_end: float | None = None
    clip_norm: float = 0.0
    accumulate: int = 1
    ema_decay: float = 0.0
    ema_on_cpu: bool = False
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate}")
        if self.clip_norm < 0:
            raise ValueError(f"clip_norm: expected 0 (off) or more, got {self.clip_norm}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        if self.kind == "adam" and (self.weight_decay or self.weight_decay_end):
            raise ValueError(f"weight_decay: expected 0 with kind adam (use adamw), got {self.weight_decay}")


def by_steps(config: OptimConfig, batches: int | None) -> OptimConfig:
    """``config`` with its schedule in updates; ``batches``: of a process in an epoch (None: not known).

    Raises ValueError for drops by epoch where that is not known.
    """
    steps = None if batches is None else batches / config.accumulate
    return replace(config, schedule=config.schedule.in_steps(steps))


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam or AdamW; the groups' ``decays`` says whether :func:`set_rates` gives them weight decay.

    On the CPU matrices and vectors take PyTorch's fused one, which reads and writes each weight once where
    the plain one makes a dozen passes: for a codebook of 262,144 x 256 on one core 0.04 s instead of 0.42 s.
    Not so convolutions: it walks through memory, and is wrong where a weight and its gradient are laid out
    differently (channels last). On other devices PyTorch chooses.
    """
    trained = [p for p in parameters if p.requires_grad]
    fused = True if trained and all(p.device.type == "cpu" for p in trained) else None
    decayed = {"weight_decay": config.weight_decay, "decays": True}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 2], "fused": False if fused else None, **decayed},
        {"params": [p for p in trained if p.dim() == 2], "fused": fused, **decayed},
        {
            "params": [p for p in trained if p.dim() < 2],
            "fused": fused,
            "weight_decay": 0.0,
            "decays": False,
        },
    ]
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    used = [g for g in groups if g["params"]]
    return kind(used, lr=config.lr, betas=config.betas, eps=config.eps)


def moments_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the optimizer remembers of each of ``module``'s parameters (Adam: step, exp_avg, exp_avg_sq).

    By name and not by number: a resumed run may group its parameters otherwise.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {order[i]: dict(entry) for i, entry in optimizer.state_dict()["state"].items()}


def load_moments(
    optimizer: torch.optim.Optimizer, module: nn.Module, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Inverse of :func:`moments_by_name`; rates stay as they are.

    Raises ValueError for a name that ``module`` does not have and for another shape.
    """
    parameters = dict(module.named_parameters())
    for name, entry in moments.items():
        if name not in parameters:
            raise ValueError(f"optimizer state: expected the model's parameters, got {name!r}")
        for key, value in entry.items():
            if value.dim() and value.shape != parameters[name].shape:
                raise ValueError(
                    f"optimizer state: {name}.{key}: expected {list(parameters[name].shape)}, "
                    f"got {list(value.shape)}"
                )
    names = {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {i: dict(moments[name]) for i, name in enumerate(order) if name in moments}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, progress: float, total_steps: int | None
) -> float:
    """Set learning rate and weight decay for the update after ``step`` finished ones; returns the rate."""
    rate = config.lr * learning_rate_factor(config.schedule, step, progress, total_steps)
    decay = weight_decay_at(config.weight_decay, config.weight_decay_end, progress)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate
