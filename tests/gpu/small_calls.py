"""Every operator of every backend once or twice on small ragged shapes: what compute-sanitizer looks at.

``python tests/gpu/small_calls.py --device cuda``; a call that fails is named and the rest goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from calls import CALLS
from conftest import Device, subjects
from conftest_of_ops import make_operands

SIZES = ((33, 70, 19), (130, 257, 64))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = Device(parser.parse_args().device)
    failed = 0
    for subject in subjects(device.name, tuple(CALLS)):
        if subject.backend == "composite":
            continue  # PyTorch's kernels, not ours
        dtype = torch.float32 if subject.dtype == torch.int64 else subject.dtype
        for size in SIZES:
            try:
                CALLS[subject.op](device.put(make_operands(*size, dtype=dtype, bias=True)), subject.backend)
                device.wait()
            except Exception as error:  # the others have to be looked at too
                failed += 1
                sys.stdout.write(f"FAILED {subject} {size}: {type(error).__name__}: {error}\n")
        sys.stdout.write(f"called {subject}\n")
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
