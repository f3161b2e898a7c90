"""Which kernels committed results have shown to be right, and on which GPU architectures.

``gpu_checks.csv``, beside this file and in every wheel, is written by the GPU suite (``make gpu``): a row for
each operator, backend, architecture and dtype that it held against float64. Only what this file says is
believed: a kernel without a passing row is not chosen on a GPU unless it is asked for.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

FILE = Path(__file__).with_name("gpu_checks.csv")


@dataclass(frozen=True)
class Check:
    """One operator of one backend, held against float64 on one GPU.

    architecture: ``"sm_90"``. dtype: ``"bfloat16"``. passed: whether every check of the operator did; its
    gradient's are among them. date: ISO 8601. commit: what was checked. gpu, driver: where.
    """

    op: str
    backend: str
    architecture: str
    dtype: str
    passed: bool
    date: str
    commit: str
    gpu: str
    driver: str

    @property
    def subject(self) -> tuple[str, str, str, str]:
        return self.op, self.backend, self.architecture, self.dtype


COLUMNS = tuple(field.name for field in fields(Check))


def read(path: Path = FILE) -> list[Check]:
    """The rows of a file of checks, oldest first; none where there is no file.

    Raises ValueError for other columns, and for a ``passed`` that is neither true nor false.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        checks = []
        for row in reader:
            passed = row.pop("passed")
            if passed not in ("true", "false") or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected a whole row with passed true or false"
                )
            checks.append(Check(passed=passed == "true", **row))
    return checks


def append(checks: Iterable[Check], path: Path = FILE) -> None:
    """Add ``checks`` to the file, which is made with its header where it does not exist."""
    fresh = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for check in checks:
            writer.writerow({**asdict(check), "passed": str(check.passed).lower()})


def newest(checks: Iterable[Check]) -> dict[tuple[str, str, str, str], Check]:
    """The last row about each operator, backend, architecture and dtype."""
    return {check.subject: check for check in checks}


@functools.cache
def committed() -> dict[tuple[str, str, str, str], Check]:
    """The newest rows of the file that came with this package."""
    return newest(read())


@functools.cache
def architectures() -> tuple[str, ...]:
    """Architectures of all CUDA devices that this process sees, sorted."""
    if not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"sm_{major}{minor}" for major, minor in sorted(found))


@torch.compiler.assume_constant_result
def doubt(op: str, backend: str, dtype: str) -> str | None:
    """Why the backend's kernel of ``op`` is not trusted on the CUDA devices here, or None.

    With GPUs of several architectures it has to be right on each.
    """
    seen = architectures()
    for architecture in seen:
        check = committed().get((op, backend, architecture, dtype))
        if check is None:
            return f"no committed result shows {backend} kernels right on {architecture} in {dtype}"
        if not check.passed:
            return f"{backend} kernels failed on {architecture} in {dtype} ({check.date}, {check.gpu})"
    return None if seen else f"{backend} kernels have been checked on no device that is here"
