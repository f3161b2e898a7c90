"""What the extension's CuPy queue calls: device limits, memory filled, kernels launched.

Everything goes to torch's current stream of the device at the time of the call. A kernel is compiled and
loaded at its first launch on a device, so a CUDA graph is captured after a call outside of it, as PyTorch
asks for anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from ibq_fast.ops.cupy import compiler

# What a block has without asking for more.
_PLAIN_SHARED_BYTES = 48 * 1024


class Launcher:
    """The object behind ``ibq_fast._C.set_cupy_launcher``. ``device`` is a CUDA device's index."""

    def limits(self, device: int) -> tuple[int, int, int]:
        """Multiprocessors, bytes of shared memory of each, and the most that one block may have."""
        return _limits(_checked(device))

    def fill(self, device: int, address: int, byte: int, size: int) -> None:
        """Set ``size`` bytes at ``address`` to ``byte``."""
        cupy = _cupy()
        with cupy.cuda.Device(_checked(device)):
            cupy.cuda.runtime.memsetAsync(address, byte, size, _stream(device))

    def launch(
        self,
        device: int,
        source: str,
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: tuple[bytes, ...],
    ) -> None:
        """Launch kernel ``name`` of ``kernels/cuda/<source>``; ``arguments`` are its parameters' bytes."""
        cupy = _cupy()
        with cupy.cuda.Device(_checked(device)), cupy.cuda.ExternalStream(_stream(device), device):
            kernel = _kernel(device, source, name)
            if shared_bytes > _PLAIN_SHARED_BYTES:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            kernel((blocks,), (threads,), parameters(arguments), shared_mem=shared_bytes)


def parameters(arguments: tuple[bytes, ...]) -> tuple[np.ndarray, ...]:
    """Kernel parameters as CuPy takes values of any type: host arrays, copied bit by bit."""
    return tuple(np.frombuffer(bytearray(data), dtype=np.uint8) for data in arguments)


def _checked(device: int) -> int:
    if device < 0:
        raise ValueError("the cupy backend takes CUDA tensors only")
    return device


def _stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _limits(device: int) -> tuple[int, int, int]:
    attributes = _cupy().cuda.Device(device).attributes
    names = ("MultiProcessorCount", "MaxSharedMemoryPerMultiprocessor", "MaxSharedMemoryPerBlockOptin")
    first, second, third = (int(attributes[name]) for name in names)
    return first, second, third


@functools.cache
def _kernel(device: int, source: str, name: str) -> Any:
    """The loaded kernel of one device; an object of its own each, because it keeps per-device settings."""
    target = compiler.architecture(*torch.cuda.get_device_capability(device))
    found = compiler.compiled(source, name, target)
    return _cupy().RawModule(path=str(found.path)).get_function(found.symbol)


@functools.cache
def _cupy() -> Any:
    import cupy

    return cupy
