"""Which device a command runs on."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """``auto``: the accelerator that is there, else the CPU. Raises ValueError when ``name`` is not usable."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that is available, got {name!r}: {reason}") from error
    return device
