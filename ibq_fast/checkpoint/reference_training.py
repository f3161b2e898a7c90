"""Training state of published tokenizer checkpoints, in and out.

The middle form is the one that training checkpoints have here (:mod:`ibq_fast.checkpoint.training`), parts by
name:

    tokenizer      model (live weights), ema (their averages, or None), optimizer (moments by name, or None)
    discriminator  the same, where there is one
    published      what has no place of its own here and is written back as it came: averages of the
                   discriminator, other tensors, epoch, and the hyperparameters of the optimizers' groups

What cannot be restored, because one side does not keep it: the published files have neither LeCam's averages
nor the state of random generators and data; the loop counters, callbacks and learning-rate schedulers of
their training framework are not carried over, nor is its gradient scaler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_fast.checkpoint.reference import (
    average_name,
    discriminator_weights,
    published_order,
    reference_name,
    tokenizer_weights,
)

Parts = dict[str, Any]

_DISCRIMINATOR = "loss.discriminator.main."
_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
# What the published files call their framework's version; loading refuses a file without one.
FRAMEWORK = "2.2.0"
# The published recipe, for states that come without their own hyperparameters.
_GROUP = {"lr": 1e-4, "betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 0.0}


def read_training(
    state: Mapping[str, Tensor],
    beside: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    path: Path,
    *,
    levels: int,
) -> tuple[int, Parts]:
    """(step, parts) of a published tokenizer checkpoint: its ``state`` dict and the entries ``beside`` it.

    ``expected``: the tokenizer's parameters by own name, with the shapes they must have. Raises ValueError
    naming ``path`` and the entry for what is missing or does not fit.
    """
    used = {reference_name(own, levels) for own in expected}
    live = tokenizer_weights(state, expected, path, levels=levels, ema=False)
    ema = None
    if any(name.startswith("model_ema.") for name in state):
        average = tokenizer_weights(state, expected, path, levels=levels, ema=True)
        decay, updates = (state.get(name) for name in _COUNTERS)
        ema = {
            "decay": 0.999 if decay is None else float(decay),
            "updates": 0 if updates is None else int(updates),
            "average": average,
        }
        used |= {average_name(reference_name(own, levels)) for own in expected} | set(_COUNTERS)
    order = published_order(expected, levels)
    networks: list[tuple[str, dict[str, Tensor], Sequence[str], Any]] = [("tokenizer", live, order, ema)]
    if any(name.startswith(_DISCRIMINATOR) for name in state):
        critic = discriminator_weights(state, path)
        used |= {name.replace("layers.", _DISCRIMINATOR) for name in critic}
        networks.append(("discriminator", critic, _trained(critic), None))
    optimizers = list(beside.get("optimizer_states") or ())
    parts: Parts = {}
    groups = []
    for i, (name, weights, names, average_state) in enumerate(networks):
        moments = None
        if i < len(optimizers):
            group, moments = _read_optimizer(optimizers[i], names, weights, f"{path}: optimizer_states[{i}]")
            groups.append(group)
        parts[name] = {"model": weights, "optimizer": moments, "ema": average_state, "scaler": None}
    parts["published"] = {
        "tensors": {name: tensor for name, tensor in state.items() if name not in used},
        "epoch": int(beside.get("epoch", 0)),
        "groups": groups,
    }
    return int(beside.get("global_step", 0)), parts


def write_training(step: int, parts: Mapping[str, Any], *, levels: int) -> dict[str, Any]:
    """The contents of a published tokenizer checkpoint, ready for ``torch.save``: inverse of
    :func:`read_training`.

    Every tensor keeps its bits. A tokenizer without averages is written as its own average: the published
    evaluation reads the averages and silently keeps random weights where it finds none.
    """
    tokenizer, critic = parts["tokenizer"], parts.get("discriminator")
    published = parts.get("published") or {"tensors": {}, "epoch": 0, "groups": []}
    weights = {name: t for name, t in tokenizer["model"].items() if not _only_ours(name)}
    order = published_order(weights, levels)
    ema = tokenizer["ema"]
    averages = ema["average"] if ema is not None and ema["average"] else weights
    rest = dict(published["tensors"])
    live, mean = {}, {}
    for own in order:
        live[reference_name(own, levels)] = weights[own]
        mean[average_name(reference_name(own, levels))] = averages[own]
    if critic is not None:
        for own, tensor in critic["model"].items():
            name = own.replace("layers.", _DISCRIMINATOR)
            live[name] = tensor
            if own in _trained(critic["model"]):
                mean[average_name(name)] = rest.pop(average_name(name), tensor)
    counters = (
        torch.tensor(ema["decay"] if ema else 0.999, dtype=torch.float32),
        torch.tensor(ema["updates"] if ema else 0, dtype=torch.int32),
    )
    state = {**live, **rest, **dict(zip(_COUNTERS, counters, strict=True)), **mean}
    optimizers = []
    for i, network in enumerate(network for network in (tokenizer, critic) if network is not None):
        if network["optimizer"] is None:
            break
        names = order if i == 0 else _trained(network["model"])
        group = published["groups"][i] if i < len(published["groups"]) else _GROUP
        optimizers.append(_write_optimizer(network["optimizer"], names, group))
    return {
        "epoch": published["epoch"],
        "global_step": step,
        "pytorch-lightning_version": FRAMEWORK,
        "state_dict": {name: alone(tensor) for name, tensor in state.items()},
        "optimizer_states": optimizers,
        "lr_schedulers": [],
    }


def _read_optimizer(
    optimizer: Any, names: Sequence[str], weights: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(hyperparameters of its only group, moments by own name)."""
    try:
        (group,) = optimizer["param_groups"]
        numbers, entries = list(group["params"]), optimizer["state"]
        moments = {names[numbers.index(i)]: dict(entry) for i, entry in entries.items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{where}: expected the state of one Adam over {len(names)} parameters") from error
    if len(numbers) != len(names):
        raise ValueError(f"{where}: expected {len(names)} parameters, got {len(numbers)}")
    for name, entry in moments.items():
        entry["step"] = torch.as_tensor(entry.get("step", 0.0), dtype=torch.float32)
        for key in ("exp_avg", "exp_avg_sq"):
            found = entry.get(key)
            if not isinstance(found, Tensor) or found.shape != weights[name].shape:
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{where}: {key} of {name}: expected {list(weights[name].shape)}, got {got}")
    return {key: value for key, value in group.items() if key != "params"}, moments


def _write_optimizer(
    moments: Mapping[str, Mapping[str, Tensor]], names: Sequence[str], group: Mapping[str, Any]
) -> dict[str, Any]:
    template = torch.optim.Adam([torch.zeros(())]).state_dict()["param_groups"][0]
    return {
        "state": {
            i: {key: alone(value) for key, value in moments[name].items()}
            for i, name in enumerate(names)
            if name in moments
        },
        "param_groups": [{**template, **group, "params": list(range(len(names)))}],
    }


def _trained(discriminator: Mapping[str, Tensor]) -> list[str]:
    """The discriminator's parameters, in order: all but the running statistics of its batch norms."""
    return [name for name in discriminator if name.rsplit(".", 1)[1] in ("weight", "bias")]


def _only_ours(name: str) -> bool:
    return name.startswith("quantizer.") and name != "quantizer.codebook"


def alone(tensor: Tensor) -> Tensor:
    """A tensor that is stored alone: on the CPU, contiguous, not a view into something larger."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
