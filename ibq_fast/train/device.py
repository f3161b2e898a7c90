"""The accelerate object of a run: device, precision, processes."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, set_seed

from ibq_fast.train.config import RunConfig


def build_accelerator(run: RunConfig) -> Accelerator:
    """An Accelerator on ``run.device``, and the seed set (each process its own stream).

    Raises ValueError when the device asked for is not there.
    """
    # accelerate keeps the first Accelerator's precision for the process; a second run may ask for another.
    # The process group is left standing.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    waiting = InitProcessGroupKwargs(timeout=timedelta(minutes=run.collective_minutes))
    accelerator = Accelerator(
        cpu=run.device == "cpu", mixed_precision=run.mixed_precision, kwargs_handlers=[waiting]
    )
    kind = accelerator.device.type
    if run.device not in ("auto", kind):
        raise ValueError(f"run.device: expected a machine with {run.device}, accelerate found only {kind}")
    if run.fsdp and accelerator.num_processes == 1:
        raise ValueError("run.fsdp: expected several processes (torchrun), got one")
    if run.fsdp and run.mixed_precision == "fp16":
        raise ValueError("run.mixed_precision: expected no or bf16 with run.fsdp, got fp16")
    set_seed(run.seed, device_specific=accelerator.num_processes > 1)
    return accelerator
