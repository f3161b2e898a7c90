"""No N×K tensor: peak memory of a training step at a size where eager code needs gigabytes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ibq_fast.ops import available_backends

D = 256
# Rows, codes and the limit in MB, of which 1 KB a code is the codebook's gradient. Eager code needs over ten
# times N x K x 4 bytes: 10 GB and 700 MB. The native kernels' workspace ends at 256 MB whatever the sizes.
CASES = {"native": (1024, 262144, 600), "composite": (256, 65536, 300)}

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
quantizer = IndexBackpropQuantizer(codebook_size=int(sys.argv[2]), dim={D})
z = torch.randn(int(sys.argv[1]) // 256, {D}, 16, 16, requires_grad=True)
before = resident("VmRSS")
step(quantizer, z)
assert quantizer.codebook.grad.abs().sum() > 0
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", available_backends())
def test_training_step_stays_far_below_n_times_k(backend) -> None:
    rows, codes, limit = CASES[backend]
    environment = {**os.environ, "IBQ_FAST_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rows), str(codes)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    extra = float(done.stdout)
    assert 4 * codes * D / 2**20 <= extra < limit, f"{extra:.0f} MB"
