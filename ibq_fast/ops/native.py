"""Loads the C++ extension, which registers the operators of namespace ``ibq_fast``.

A missing or broken extension is no error here: everything works through the composite backend, and
:data:`UNAVAILABLE` keeps the reason, which the backend table, its warning and ``ibq-fast doctor`` show.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

NAMESPACE = "ibq_fast"


def _load() -> str | None:
    """Import the extension; the reason why it cannot be used, or None."""
    if importlib.util.find_spec("ibq_fast._C") is None:
        return "the C++ extension is not built (python setup.py build_ext --inplace)"
    try:
        importlib.import_module("ibq_fast._C")
    except ImportError as error:
        return f"the C++ extension does not load with torch {torch.__version__}: {error}"
    return None


UNAVAILABLE: str | None = _load()


def registered(op: str) -> bool:
    """Whether the loaded extension defines operator ``op``."""
    return UNAVAILABLE is None and hasattr(getattr(torch.ops, NAMESPACE), op)


def device_types(op: str) -> tuple[str, ...]:
    """Device types (``"cpu"``, ``"cuda"``) for which the loaded extension holds a kernel of ``op``."""
    if not registered(op):
        return ()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return tuple(device for device, key in keys.items() if has_kernel(f"{NAMESPACE}::{op}", key))


def tile_grid(n: int, k: int, device_type: str) -> tuple[int, int]:
    """Row tiles and code blocks of ``tile_bound`` for [n, k] in the device's kernels; zeros for small k."""
    from ibq_fast import _C

    rows, codes, smallest = _C.cuda_tile_shape() if device_type == "cuda" else _C.tile_shape()[:3]
    if k < smallest:
        return 0, 0
    return (n + rows - 1) // rows, (k + codes - 1) // codes


def candidate_bytes(n: int, k: int, d: int) -> int:
    """Bytes of ``candidates`` for [n, d] x [k, d] in the CPU kernels in use; 0 for small k."""
    from ibq_fast import _C

    rows, codes, smallest, most = _C.tile_shape()
    if k < smallest:
        return 0
    tiles = ((n + rows - 1) // rows) * ((k + codes - 1) // codes)
    return torch.sym_min(64 + 4 * rows * codes * tiles, torch.sym_max(most, 4 * k * d))


def release_memory() -> int:
    """Free what the CPU operators keep between steps for their next large gradient; returns its bytes.

    A gradient of 32 MB or more comes from a buffer that is kept when the gradient is freed (three at most),
    so that a training step does not fault in and zero fresh pages every time. 0 without the extension.
    """
    if UNAVAILABLE is not None:
        return 0
    from ibq_fast import _C

    return int(_C.release_memory())
