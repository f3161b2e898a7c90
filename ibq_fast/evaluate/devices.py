"""Which device a command runs on."""

from __future__ import annotations

import torch

from ibq_fast import npu


def pick_device(name: str) -> torch.device:
    """``auto``: the accelerator that is there, else the CPU. Raises ValueError when there is no ``name``."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    if name.partition(":")[0] == "npu" and (absent := npu.unavailable()):
        raise ValueError(f"device: expected one that is available, got {name!r}: {absent}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one that is available, got {name!r}: {reason}") from error
    return device
