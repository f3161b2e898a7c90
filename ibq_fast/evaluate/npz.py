"""The sample batch that the ADM suite's evaluator reads: ``arr_0`` uint8 [N, H, W, 3] in an .npz file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def write_npz(path: str | Path, images: Iterable[np.ndarray[Any, Any]], count: int) -> Path:
    """Write ``count`` images uint8 [H, W, 3], one at a time, as ``np.savez`` would write the whole array.

    One image is in memory at a time. The file appears whole or not at all. Raises ValueError for another
    number of images, shapes that differ or another dtype, and OSError when the disk is full.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with (
            zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            shape: tuple[int, ...] | None = None
            written = 0
            for image in images:
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise ValueError(
                        f"images: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
                    )
                if shape is None:
                    shape = image.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                if image.shape != shape:
                    raise ValueError(f"images: expected all of {list(shape)}, got {list(image.shape)}")
                member.write(np.ascontiguousarray(image).data)
                written += 1
            if written != count:
                raise ValueError(f"images: expected {count}, got {written}")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target
