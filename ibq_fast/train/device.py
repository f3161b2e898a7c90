"""The accelerate object of a run: device, precision, processes.

Under torchrun, accelerate connects the processes: by NCCL on GPUs, HCCL on NPUs, Gloo on CPUs.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, set_seed

from ibq_fast import npu
from ibq_fast.train.config import RunConfig


def build_accelerator(run: RunConfig) -> Accelerator:
    """An Accelerator on ``run.device``, and the seed set (each process its own stream).

    Raises ValueError when the device asked for is not there.
    """
    # accelerate keeps the first Accelerator's precision for the process; a second run may ask for another.
    # The process group is left standing.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    cpu = run.device == "cpu"
    timeout = timedelta(minutes=run.collective_minutes)
    kind = PartialState(cpu=cpu, timeout=timeout).device.type
    if run.device not in ("auto", kind):
        reason = npu.unavailable() if run.device == "npu" else None
        because = f": {reason}" if reason else ""
        raise ValueError(
            f"run.device: expected a machine with {run.device}, accelerate found only {kind}{because}"
        )
    waiting = InitProcessGroupKwargs(timeout=timeout)
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision(run, kind), kwargs_handlers=[waiting])
    if run.fsdp and accelerator.num_processes == 1:
        raise ValueError("run.fsdp: expected several processes (torchrun), got one")
    if run.fsdp and accelerator.mixed_precision == "fp16":
        raise ValueError("run.mixed_precision: expected no or bf16 with run.fsdp, got fp16")
    if run.codebook_parallel and accelerator.mixed_precision == "fp16":
        raise ValueError("run.mixed_precision: expected no or bf16 with run.codebook_parallel, got fp16")
    set_seed(run.seed, device_specific=accelerator.num_processes > 1)
    return accelerator


def precision(run: RunConfig, kind: str) -> str:
    """accelerate's ``mixed_precision`` for a run on a device type: bf16 on an NPU unless the run says."""
    if run.mixed_precision != "auto":
        return run.mixed_precision
    return "bf16" if kind == "npu" else "no"
