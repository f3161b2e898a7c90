"""No N×K tensor: peak memory of a training step at a size where eager code needs gigabytes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ibq_fast.ops import available_backends

K, D = 65536, 256
LIMIT_MB = 300

# A quarter of the rows for the slow backend: eager code would still need seven times 64 MB beside the gradient.
ROWS = {"native": 1024, "composite": 256}

PROGRAM = f"""
import sys, torch
from ibq_fast import IndexBackpropQuantizer

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

torch.manual_seed(0)
small = IndexBackpropQuantizer(codebook_size=64, dim={D})
def step(quantizer, z):
    out = quantizer(z)
    (out.z_q.square().sum() + out.quantization_loss + out.entropy_loss).backward()
step(small, torch.randn(1, {D}, 4, 4, requires_grad=True))
quantizer = IndexBackpropQuantizer(codebook_size={K}, dim={D})
z = torch.randn(int(sys.argv[1]) // 256, {D}, 16, 16, requires_grad=True)
before = resident("VmRSS")
step(quantizer, z)
assert quantizer.codebook.grad.abs().sum() > 0
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", available_backends())
def test_training_step_stays_below_300_mb(backend) -> None:
    environment = {**os.environ, "IBQ_FAST_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROWS[backend])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    extra = float(done.stdout)
    assert 4 * K * D / 2**20 <= extra < LIMIT_MB, f"{extra:.0f} MB"
