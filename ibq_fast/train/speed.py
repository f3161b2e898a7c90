"""Options of a run that change how a model is computed and not what it computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ibq_fast.train.config import RunConfig


def prepare(model: nn.Module, parts: Iterable[nn.Module], run: RunConfig) -> None:
    """Apply ``run``'s options to ``model``, in place and before its optimizer is built.

    ``parts``: what is compiled, each by itself: one compilation serves all parts of one shape, and weights
    keep their names. Raises ValueError for a backend that torch.compile does not know.
    """
    if run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.compile:
        known = torch.compiler.list_backends(exclude_tags=())
        if run.compile_backend not in known:
            raise ValueError(
                f"run.compile_backend: expected one of {', '.join(known)}, got {run.compile_backend!r}"
            )
        for part in parts:
            part.compile(backend=run.compile_backend)
