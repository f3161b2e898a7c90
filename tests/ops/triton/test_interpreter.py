"""The kernels' results, by running ``interpreted/`` under Triton's interpreter; refusals outside of it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ibq_fast.ops import backend_report, backends, codebook_search, triton

FOLDER = Path(__file__).parent / "interpreted"
INSTALLED = importlib.util.find_spec("triton") is not None


def test_the_kernels_agree_with_float64_under_the_interpreter() -> None:
    if not INSTALLED:
        assert triton.UNAVAILABLE == "Triton is not installed (pip install triton)"
        return
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_table_says_why_triton_does_not_serve_the_cpu() -> None:
    rows = [row for row in backend_report() if row.backend == "triton"]
    assert len(rows) == 6
    expected = "this build has no triton kernels for cpu" if INSTALLED else triton.UNAVAILABLE
    assert {row.reason for row in rows} == {expected}
    with pytest.raises(ValueError, match=r"'triton' .the backend argument. cannot serve codebook_search"):
        codebook_search(torch.zeros(2, 3), torch.zeros(4, 3), backend="triton")


def test_triton_is_never_chosen_unasked() -> None:
    """No committed result shows it right on a GPU yet."""
    found = [row for rows in backends._TABLE.values() for row in rows if row.name == "triton"]
    assert len(found) >= 6
    for row in found:
        for device in ("cuda", "npu"):
            doubt = row.hesitation(device, torch.float32)
            assert doubt is not None
            assert doubt.endswith("have to be asked for")
