"""Ascend NPUs, which PyTorch drives through the package torch-npu.

PyTorch imports an installed torch-npu by itself, and ``import torch`` fails with it where Ascend's driver or
toolkit is missing. So wherever torch-npu is installed, ``import ibq_fast`` imports PyTorch first, keeps what
torch-npu has to say, and goes on without it. Nothing here imports PyTorch elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib import metadata

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
INSTALL = "pip install 'ibq_fast[npu]', on a machine with Ascend's driver and CANN toolkit"

_failure: str | None = None


def load() -> None:
    """Import PyTorch and, unless its autoload is switched off, torch-npu; a failure of the latter is kept."""
    global _failure
    if "torch" in sys.modules or os.environ.get(AUTOLOAD, "1") != "1" or not installed():
        return
    os.environ[AUTOLOAD] = "0"
    try:
        torch = importlib.import_module("torch")
    finally:
        del os.environ[AUTOLOAD]
    try:
        torch._import_device_backends()
    except Exception as error:  # whatever a library that does not fit this machine raises
        cause = error.__cause__ or error
        _failure = (
            f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
        )


def installed() -> bool:
    """Whether torch-npu is installed, working or not."""
    return importlib.util.find_spec("torch_npu") is not None


def unavailable() -> str | None:
    """Why no NPU can be used here, or None."""
    if not installed():
        return f"torch-npu is not installed ({INSTALL})"
    if _failure is not None:
        return (
            f"torch-npu {_version()} is installed but does not load ({_failure}); it needs Ascend's driver "
            "and CANN toolkit (source its set_env.sh), and is better uninstalled where there is no NPU"
        )
    torch = importlib.import_module("torch")
    if not hasattr(torch, "npu"):
        return (
            f"torch-npu {_version()} is installed but was not loaded ({AUTOLOAD}={os.environ.get(AUTOLOAD)})"
        )
    if not torch.npu.is_available():
        return f"torch-npu {_version()} finds no NPU (npu-smi info shows what the driver sees)"
    return None


def _version() -> str:
    try:
        return metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        return "(version unknown)"
