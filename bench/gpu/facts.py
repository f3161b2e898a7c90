"""What a figure of a GPU has to be told with: its name, driver, architecture, the versions and the commit."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import torch

from bench.machine import commit, versions

COMMIT = "IBQ_FAST_COMMIT"


@dataclass(frozen=True)
class Facts:
    """gpu, driver: as nvidia-smi names them. architecture: ``"sm_90"``. version: of the libraries."""

    gpu: str
    driver: str
    architecture: str
    version: str
    commit: str


def gather(device: str) -> Facts:
    """The facts of this machine; made-up ones for a rehearsal on the CPU."""
    version = ", ".join(f"{name} {value}" for name, value in versions().items() if value)
    if device != "cuda":
        return Facts("none (rehearsal)", "none", "cpu", version, the_commit())
    major, minor = torch.cuda.get_device_capability()
    return Facts(torch.cuda.get_device_name(), _driver(), f"sm_{major}{minor}", version, the_commit())


def the_commit() -> str:
    """``IBQ_FAST_COMMIT`` where it is set (a copied tree has no git), else what git says, else "unknown"."""
    given = os.environ.get(COMMIT)
    if given:
        return given
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split()[0] if done.stdout.split() else "unknown"
