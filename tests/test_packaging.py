"""What a wheel has to carry beside Python files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_carries_the_cuda_sources_and_the_committed_results(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    package = tmp_path / "ibq_fast"
    assert (package / "ops" / "gpu_checks.csv").is_file()
    for folder in ("common", "cuda"):
        wanted = {p.name for p in (ROOT / "kernels" / folder).iterdir() if p.suffix in (".h", ".cuh")}
        assert {p.name for p in (package / "_kernels" / folder).iterdir()} == wanted
    found = "import ibq_fast.ops.cupy.sources as s; print(s.root())"
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {found}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()) == package / "_kernels"
