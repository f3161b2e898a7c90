"""compute-sanitizer over every GPU kernel of every backend on small shapes: memcheck, then racecheck.

    gpu_sanitize.py [--device cuda|cpu] [--tools memcheck,racecheck] [--seconds 40]

Ends with 0 when nothing was found, 1 when something was, 3 when compute-sanitizer is missing or refuses this
machine. --device cpu calls the same programs without it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "gpu" / "small_calls.py"
UNAVAILABLE = 3
FOUND = 9
REFUSALS = ("Device not supported", "Unable to find", "requires")


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: on the PATH, or in the toolkit's folder."""
    for candidate in (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"):
        if candidate and Path(candidate).is_file():
            return candidate
    return None


def check(tool: str, device: str, seconds: float) -> int:
    """Run one tool; 0, 1 or UNAVAILABLE, with a line that says which."""
    command = [sys.executable, str(PROGRAM), "--device", device]
    if device == "cuda":
        sanitizer = find_sanitizer()
        if sanitizer is None:
            print(f"{tool}: compute-sanitizer was not found")
            return UNAVAILABLE
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *command]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as stopped:
        reached = (stopped.stdout or b"").decode(errors="replace").count("\ncalled ")
        print(f"{tool}: stopped after {seconds:.0f} s, {reached} subjects were called")
        return UNAVAILABLE
    said = done.stdout + done.stderr
    if device == "cuda" and any(word in said for word in REFUSALS) and "called " not in said:
        print(f"{tool}: refused: {said.strip().splitlines()[0][:200]}")
        return UNAVAILABLE
    called = sum(line.startswith("called ") for line in said.splitlines())
    if done.returncode == 0:
        print(f"{tool}: {called} subjects called, nothing found")
        return 0
    print(f"{tool}: {called} subjects called, exit code {done.returncode}")
    print("\n".join(line for line in said.splitlines() if not line.startswith("called "))[-4000:])
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tools", default="memcheck,racecheck")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each tool")
    options = parser.parse_args()
    results = [check(tool, options.device, options.seconds) for tool in options.tools.split(",")]
    return 1 if 1 in results else max(results, default=0)


if __name__ == "__main__":
    sys.exit(main())
