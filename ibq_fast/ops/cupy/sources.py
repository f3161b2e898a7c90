"""The CUDA sources that are compiled at run time: where they are, and what identifies them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]
_FOLDERS = ("common", "cuda")
_ENDINGS = (".h", ".cuh")


@functools.cache
def root() -> Path:
    """The folder that holds ``cuda/`` and ``common/``: in the wheel, else beside the package in a checkout.

    Raises FileNotFoundError when neither has it.
    """
    candidates = (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels")
    for folder in candidates:
        if (folder / "cuda" / "search_kernel.cuh").is_file():
            return folder
    raise FileNotFoundError(f"CUDA sources: expected them in {' or '.join(map(str, candidates))}")


def files() -> list[Path]:
    """Every header that a kernel may include, sorted."""
    return sorted(
        path for folder in _FOLDERS for path in (root() / folder).iterdir() if path.suffix in _ENDINGS
    )


@functools.cache
def fingerprint() -> str:
    """Changes when any source does: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
