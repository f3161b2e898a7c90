"""Checkpoints of the published implementation, read without unpickling objects."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor


def load_reference_state(path: Path) -> dict[str, Tensor]:
    """The flat dict of tensors in a checkpoint file (its ``state_dict`` entry where it has one), on the CPU.

    Raises ``ValueError`` naming the file when it is truncated or corrupt, holds pickled objects besides
    tensors and plain containers, or has no tensors by name.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from error
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: truncated or corrupt, not a readable checkpoint: {error}") from error
    state = contents.get("state_dict", contents) if isinstance(contents, dict) else contents
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"{path}: expected a dict of tensors, or one under 'state_dict', got {type(state).__name__}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {name!r}: expected a tensor by name, got {type(value).__name__}")
    return dict(state)


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"[Uu]nsupported class ([\w.]+)", message)
    if found is None:
        detail = re.search(r"WeightsUnpickler error: ([^\n]*)", message)
        reason = detail.group(1) if detail else message.splitlines()[0]
        return f"{path}: truncated or corrupt, not a readable checkpoint: {reason}"
    return (
        f"{path}: refused: it holds a pickled object ({found.group(1)}), and rebuilding that could run code "
        "from the file; save the checkpoint again with tensors and plain containers only"
    )
