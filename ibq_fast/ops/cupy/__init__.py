"""The CUDA kernels compiled at run time by CuPy, for machines with a driver and no nvcc.

``kernels/cuda`` goes through NVRTC (:mod:`.compiler`), and the extension's own launchers, those that nvcc's
kernels have, plan every launch and hand it to :mod:`.launcher`. The operators are in the namespace
``ibq_fast_cupy``, with the schemas of ``ibq_fast``. Nothing here imports CuPy before the first launch.
Never run on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from ibq_fast.ops import native
from ibq_fast.ops.cupy.launcher import Launcher

NAMESPACE = "ibq_fast_cupy"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


_set_launcher = (
    None
    if native.UNAVAILABLE is not None
    else getattr(importlib.import_module("ibq_fast._C"), "set_cupy_launcher", None)
)
if _set_launcher is not None:
    _set_launcher(Launcher())


def _reason() -> str | None:
    """Why CuPy's kernels cannot be used here, or None."""
    if native.UNAVAILABLE is not None:
        return f"its launchers are in the C++ extension, and {native.UNAVAILABLE}"
    if _set_launcher is None:
        return "the built extension has no launchers for it: build it again"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'ibq_fast[cupy]')"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None


UNAVAILABLE: str | None = _reason()


def registered(op: str) -> bool:
    """Whether the extension launches ``op`` through CuPy."""
    name = f"{NAMESPACE}::{op}"
    return (
        _set_launcher is not None
        and hasattr(getattr(torch.ops, NAMESPACE), op)
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    )
