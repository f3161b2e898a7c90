"""Statistics of a reference set in a file: means and covariances of its features, what they are of, a hash.

The file is ``.npz`` with the arrays that ADM's reference batches have, ``mu`` and ``sigma`` of the pooled
features, ``mu_s`` and ``sigma_s`` of the spatial ones, so either program reads the other's; ``count`` and
``record`` (JSON: images, preparation, trunk and its hash) are there when this one wrote it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ibq_fast.data import DataError
from ibq_fast.evaluate.moments import Gaussian


@dataclass(frozen=True)
class Statistics:
    """``pooled`` and ``spatial`` Gaussians (None where a file has none) and the ``record`` of what they are
    of, empty when the file has none."""

    pooled: Gaussian
    spatial: Gaussian | None
    record: Mapping[str, Any]

    def sha256(self) -> str:
        """Of the numbers alone."""
        digest = hashlib.sha256()
        for gaussian in (self.pooled, self.spatial):
            if gaussian is not None:
                digest.update(gaussian.mean.numpy().tobytes())
                digest.update(gaussian.covariance.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> Path:
        """Write the ``.npz`` file."""
        arrays: dict[str, Any] = {"mu": self.pooled.mean.numpy(), "sigma": self.pooled.covariance.numpy()}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean.numpy(), "sigma_s": self.spatial.covariance.numpy()}
        path.parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps(dict(self.record), sort_keys=True)
        arrays |= {"count": np.array(self.pooled.number), "record": np.array(record)}
        np.savez(path, allow_pickle=False, **arrays)
        return path


def load_statistics(path: Path) -> Statistics | None:
    """The statistics in a ``.npz`` file; None when it has no ``mu`` and ``sigma``.

    Raises DataError for a file that is none or whose arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            count = int(file["count"]) if "count" in file.files else None
            record = json.loads(str(file["record"])) if "record" in file.files else {}
            pooled = _gaussian(path, file["mu"], file["sigma"], count)
            both = {"mu_s", "sigma_s"} <= set(file.files)
            spatial = _gaussian(path, file["mu_s"], file["sigma_s"], count) if both else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, (DataError, FileNotFoundError)):
            raise
        raise DataError(f"{path}: not a readable .npz file: {error}") from error
    return Statistics(pooled, spatial, record)


def _gaussian(path: Path, mean: np.ndarray, covariance: np.ndarray, count: int | None) -> Gaussian:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{path}: expected mean [D] and covariance [D, D], got {mean.shape} and {covariance.shape}"
        )
    mean, covariance = (np.ascontiguousarray(x, dtype=np.float64) for x in (mean, covariance))
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance), count)
