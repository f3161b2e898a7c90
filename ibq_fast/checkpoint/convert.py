"""Conversion between the own format and the published implementation's checkpoints, either way.

Nothing that both sides can hold is lost: into the own format a published checkpoint becomes ``config.json``
and ``model.safetensors`` (what ``from_pretrained`` loads) with everything else it had (live weights,
averages, discriminator, optimizers) as a training checkpoint beside them, from which a run can start
(``run.init_from``) and the published file can be written again bit for bit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ibq_fast.checkpoint.pretrained import build_and_load, sync, umask
from ibq_fast.checkpoint.reference_generator import to_reference_layout
from ibq_fast.checkpoint.reference_training import FRAMEWORK, alone, write_training
from ibq_fast.checkpoint.snapshot import CHECKPOINTS, Kind, Snapshot, load_snapshot, with_codes_set
from ibq_fast.checkpoint.training import save_checkpoint

Say = Callable[[str], None]
_SECONDS_BETWEEN_LINES = 5.0


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["own", "reference"] = "own",
    weights: Literal["ema", "live"] | None = None,
    kind: Kind | None = None,
    first_stage: str | Path | None = None,
    force: bool = False,
    say: Say = lambda line: None,
    **overrides: Any,
) -> Path:
    """Write ``source`` (see :func:`~ibq_fast.checkpoint.snapshot.load_snapshot`) to ``destination``.

    to: "own" makes a directory, "reference" one file in the published layout.
    weights: keep this one set and nothing else; None keeps everything, and the model's own weights are the
        averaged ones where there are any.
    first_stage: the tokenizer that a generator's published file is to carry.
    force: replace what is at ``destination``.

    ``destination`` appears whole or not at all. Raises FileExistsError when it is there already, ValueError
    for what the other side cannot express, and what ``load_snapshot`` raises.
    """
    target = Path(destination)
    if os.path.lexists(target) and not force:
        raise FileExistsError(f"{target}: exists; expected a new path, or --force to replace it")
    say(f"reading {source}")
    snapshot = load_snapshot(source, kind, **overrides)
    if weights is not None:
        snapshot = _one_set(snapshot, weights)
    if first_stage is not None and (to != "reference" or snapshot.kind != "generator"):
        raise ValueError("first_stage: expected only when a generator is written in the published layout")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        made = staging / target.name
        if to == "own":
            with _watched(staging, _size(snapshot.parts), f"writing {target}", say):
                _write_own(snapshot, made)
        else:
            contents = _published(snapshot, first_stage)
            with _watched(staging, _size(contents), f"writing {target}", say):
                torch.save(contents, made)
            made.chmod(0o666 & ~umask())
            sync(made)
        _put(made, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync(target.parent)
    return target


def _one_set(snapshot: Snapshot, weights: Literal["ema", "live"]) -> Snapshot:
    chosen = {"model": snapshot.weights(weights), "optimizer": None, "ema": None, "scaler": None}
    return Snapshot(snapshot.kind, snapshot.config, snapshot.step, {snapshot.kind: chosen})


def _write_own(snapshot: Snapshot, folder: Path) -> None:
    from ibq_fast.generator import Generator
    from ibq_fast.tokenizer import Tokenizer

    classes: dict[Kind, Any] = {"tokenizer": Tokenizer, "generator": Generator}
    weights = snapshot.weights()
    if snapshot.kind == "tokenizer":
        weights = with_codes_set(snapshot.config, weights)
    with torch.random.fork_rng(devices=[]):
        model = build_and_load(classes[snapshot.kind], snapshot.config, weights, Path(snapshot.kind))
    model.save_pretrained(folder)
    network = snapshot.parts[snapshot.kind]
    if len(snapshot.parts) > 1 or network["ema"] is not None or network["optimizer"] is not None:
        save_checkpoint(folder / CHECKPOINTS, snapshot.step, snapshot.parts)


def _published(snapshot: Snapshot, first_stage: str | Path | None) -> dict[str, Any]:
    if snapshot.kind == "tokenizer":
        _check_expressible(snapshot.config.quantizer)
        levels = len(snapshot.config.channel_multipliers)
        return write_training(snapshot.step, snapshot.parts, levels=levels)
    weights = to_reference_layout(snapshot.weights())
    state = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    if first_stage is not None:
        tokenizer = load_snapshot(first_stage, "tokenizer")
        _check_expressible(tokenizer.config.quantizer)
        levels = len(tokenizer.config.channel_multipliers)
        parts = {"tokenizer": {**tokenizer.parts["tokenizer"], "model": tokenizer.weights(), "ema": None}}
        stage = write_training(0, parts, levels=levels)["state_dict"]
        live = {name: t for name, t in stage.items() if not name.startswith("model_ema.")}
        state |= {f"first_stage_model.{name}": tensor for name, tensor in live.items()}
    return {
        "epoch": 0,
        "global_step": snapshot.step,
        "pytorch-lightning_version": FRAMEWORK,
        "state_dict": {name: alone(tensor) for name, tensor in state.items()},
    }


def _check_expressible(quantizer: Any) -> None:
    if quantizer.kind != "ibq" or quantizer.similarity != "dot":
        raise ValueError(
            "to: the published layout knows index backpropagation with dot-product logits only, got "
            f"kind {quantizer.kind!r} with similarity {quantizer.similarity!r}: its indices would differ"
        )


def _put(made: Path, target: Path) -> None:
    """``made`` becomes ``target``; what was there is put aside first and deleted after."""
    if not os.path.lexists(target) or (made.is_file() and not target.is_dir()):
        os.replace(made, target)
        return
    aside = made.with_name(made.name + ".replaced")
    os.replace(target, aside)
    try:
        os.replace(made, target)
    except OSError:
        os.replace(aside, target)
        raise


def _size(tree: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(_size(value) for value in tree.values())
    return sum(_size(value) for value in tree) if isinstance(tree, (list, tuple)) else 0


@contextmanager
def _watched(folder: Path, total: int, what: str, say: Say) -> Iterator[None]:
    """Says how far writing below ``folder`` has come, every few seconds."""
    say(f"{what} ({total / 2**20:,.0f} MiB)")
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_LINES):
            written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            say(f"{what}: {written / 2**20:,.0f} of {total / 2**20:,.0f} MiB")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
