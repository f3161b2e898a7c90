"""A model with whatever training state came with it, from any place that can hold one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ibq_fast.checkpoint.configs import config_from_dict
from ibq_fast.checkpoint.pretrained import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    model_name,
    read_config,
    read_weights,
    resolve,
)
from ibq_fast.checkpoint.reference import load_reference_file, tokenizer_state
from ibq_fast.checkpoint.reference_training import read_training
from ibq_fast.checkpoint.training import MANIFEST, latest_checkpoint, load_checkpoint

if TYPE_CHECKING:
    from ibq_fast.tokenizer.config import TokenizerConfig

Kind = Literal["tokenizer", "generator"]
CHECKPOINTS = "checkpoints"
RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Snapshot:
    """kind: what the model is. config: its settings. step: optimiser steps behind it (0 where unknown).

    parts: as in a training checkpoint; ``parts[kind]`` has at least ``model`` (weights under the model's own
    names), and ``optimizer`` and ``ema``, each None where it was not kept.
    """

    kind: Kind
    config: Any
    step: int
    parts: Mapping[str, Any]

    def weights(self, which: Literal["ema", "live"] | None = None) -> dict[str, Tensor]:
        """The averaged or the live weights; None takes the averaged ones where there are any.

        Buffers and whatever is not averaged come from the live ones. Raises ValueError for "ema" without
        averages.
        """
        network = self.parts[self.kind]
        average = (network["ema"] or {}).get("average")
        if which == "ema" and not average:
            raise ValueError("ema: expected averaged weights, the source has one set of weights only")
        live: dict[str, Tensor] = dict(network["model"])
        return live if which == "live" or not average else {**live, **average}


def load_snapshot(
    source: str | Path, kind: Kind | None = None, *, revision: str | None = None, **overrides: Any
) -> Snapshot:
    """Read ``source``: a model's directory, a run's directory or one of its checkpoints, a checkpoint file of
    the published implementation, or a hub id.

    ``kind`` insists on a tokenizer or a generator (of a published generator's file, "tokenizer" takes its
    first stage). ``overrides``: as for ``from_pretrained``. Raises FileNotFoundError and ValueError, naming
    the file and what is wrong in it.
    """
    path = resolve(source, revision)
    if path.is_file():
        return _published(path, kind, overrides)
    if overrides:
        raise ValueError(
            f"{', '.join(sorted(overrides))}: expected only with a published checkpoint, got the directory "
            f"{str(path)!r}, which records its own settings"
        )
    if (path / MANIFEST).is_file():
        run = path.parent.parent
        config_file = next(
            (f for f in (run / CONFIG_NAME, run / RUN_CONFIG) if f.is_file()), run / RUN_CONFIG
        )
        found = _trained(path, config_file, kind)
    elif (path / CONFIG_NAME).is_file():
        newest = latest_checkpoint(path / CHECKPOINTS)
        found = _own(path)
        if newest is not None:
            found = _completed(found, _trained(newest, path / CONFIG_NAME, kind), path)
    else:
        newest = latest_checkpoint(path / CHECKPOINTS)
        if newest is None:
            raise FileNotFoundError(
                f"{path}: expected a model's directory ({CONFIG_NAME}, {WEIGHTS_NAME}) or a run's "
                f"({RUN_CONFIG}, {CHECKPOINTS}/), got neither"
            )
        found = _trained(newest, path / RUN_CONFIG, kind)
    if kind is not None and found.kind != kind:
        raise ValueError(f"{path}: expected a {kind}, got a {found.kind}")
    return found


def _published(path: Path, kind: Kind | None, overrides: dict[str, Any]) -> Snapshot:
    from ibq_fast.checkpoint.reference_generator import from_reference_layout, infer_config
    from ibq_fast.tokenizer.model import expected_weights, published_config

    state, beside = load_reference_file(path)
    generator = any(name.startswith("transformer.") for name in state) or "tok_emb.weight" in state
    if kind == "generator" or (kind is None and generator):
        _only(overrides, ("num_heads", "grid"), "generator")
        weights = from_reference_layout(state, path)
        config: Any = infer_config(weights, path, **overrides)
        return Snapshot("generator", config, int(beside.get("global_step", 0)), {"generator": _bare(weights)})
    _only(overrides, ("resolution", "dropout", "quantizer"), "tokenizer")
    state = tokenizer_state(state, path)
    config = published_config(state, path, **overrides)
    levels = len(config.channel_multipliers)
    if generator:  # its optimizer is the generator's
        beside = {}
    step, parts = read_training(state, beside, expected_weights(config), path, levels=levels)
    return Snapshot("tokenizer", config, step, parts)


def _own(path: Path) -> Snapshot:
    kind, config = _read_settings(path / CONFIG_NAME)
    if not (path / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{path / WEIGHTS_NAME}: no such file; the directory has no weights")
    return Snapshot(kind, config, 0, {kind: _bare(read_weights(path / WEIGHTS_NAME))})


def _completed(own: Snapshot, trained: Snapshot, path: Path) -> Snapshot:
    """``trained``, once it is clear that the directory's weights come from it."""
    found = own.parts[own.kind]["model"]
    for candidate in (trained.weights(), trained.weights("live")):
        if all(torch.equal(t, candidate[name]) for name, t in found.items() if name in candidate):
            return trained
    raise ValueError(
        f"{path}: its {WEIGHTS_NAME} is not of the training state in {CHECKPOINTS}/; remove one of the two"
    )


def _trained(folder: Path, config_file: Path, kind: Kind | None) -> Snapshot:
    parts = load_checkpoint(folder)
    found: Kind = "tokenizer" if "tokenizer" in parts else "generator"
    if kind is not None and found != kind:
        raise ValueError(f"{folder}: expected a {kind}, got a {found}")
    config = (
        _read_settings(config_file)[1] if config_file.name == CONFIG_NAME else _run_model(config_file, found)
    )
    if found == "generator":  # what is trained there is the loss around the generator
        parts["generator"] = renamed(parts["generator"], lambda name: name.removeprefix("generator."))
    return Snapshot(found, config, parts.pop("step"), parts)


def _read_settings(path: Path) -> tuple[Kind, Any]:
    from ibq_fast.generator.config import GeneratorConfig
    from ibq_fast.tokenizer.config import TokenizerConfig

    classes: dict[str, tuple[Kind, type]] = {
        "Tokenizer": ("tokenizer", TokenizerConfig),
        "Generator": ("generator", GeneratorConfig),
    }
    name = model_name(path)
    if name not in classes:
        raise ValueError(f"{path}: model: expected one of {', '.join(classes)}, got {name!r}")
    kind, config_class = classes[name]
    return kind, read_config(path, name, config_class)


def _run_model(path: Path, kind: Kind) -> Any:
    """The model's settings in a run's ``config.yaml``."""
    import yaml

    from ibq_fast.generator.config import GeneratorConfig
    from ibq_fast.tokenizer.config import TokenizerConfig

    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a training checkpoint needs its run's settings beside it"
        )
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        return config_from_dict(TokenizerConfig if kind == "tokenizer" else GeneratorConfig, model)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a run's settings with a section 'model': {error}") from error


def _bare(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": weights, "optimizer": None, "ema": None, "scaler": None}


def with_codes_set(config: TokenizerConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tokenizer's weights with the flag that its codes are not to be drawn from features again, where
    ``config`` has one, and without counters of idle codes where it has none.
    """
    name, waits = "quantizer.initialized", config.quantizer.init in ("features", "kmeans")
    unknown = {name: not waits, "quantizer.idle": config.quantizer.restart_after == 0}
    found = {key: tensor for key, tensor in weights.items() if not unknown.get(key)}
    return {**found, **({name: torch.ones((), dtype=torch.bool)} if waits and name not in found else {})}


def renamed(network: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """A network's part of a checkpoint with other names for its weights."""

    def strip(named: Mapping[str, Any]) -> dict[str, Any]:
        return {rename(name): value for name, value in named.items()}

    ema = network["ema"]
    return {
        **network,
        "model": strip(network["model"]),
        "optimizer": None if network["optimizer"] is None else strip(network["optimizer"]),
        "ema": None if ema is None else {**ema, "average": strip(ema["average"])},
    }


def _only(overrides: Mapping[str, Any], known: tuple[str, ...], kind: Kind) -> None:
    for name in overrides:
        if name not in known:
            raise ValueError(f"{name}: a published {kind} takes {', '.join(known)}")
