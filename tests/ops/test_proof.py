"""Kernels on a GPU are chosen unasked only where a committed result shows them right."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch

from ibq_fast import doctor, ops
from ibq_fast.ops import backends, proof

OP = "codebook_search"


def check(**changes: object) -> proof.Check:
    row = proof.Check(OP, "native", "sm_90", "float32", True, "2026-01-02", "abc", "NVIDIA H100", "580.1")
    return dataclasses.replace(row, **changes)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A table as it would be beside an H100 with native kernels built, and made-up committed results."""
    monkeypatch.setattr(backends, "_forced_here", None)
    monkeypatch.setattr(backends, "_forced_by_environment", None)
    monkeypatch.setattr(backends, "_SAID", set())
    native, *others = backends._TABLE[OP]
    on_gpu = dataclasses.replace(native, devices=("cpu", "cuda"))
    monkeypatch.setitem(backends._TABLE, OP, (on_gpu, *others))

    def pretend(*checks: proof.Check, architectures: tuple[str, ...] = ("sm_90",)) -> None:
        monkeypatch.setattr(proof, "committed", lambda: proof.newest(checks))
        monkeypatch.setattr(proof, "architectures", lambda: architectures)

    return pretend


def chosen(dtype: torch.dtype = torch.float32, requested: str | None = None) -> str:
    return backends.select(OP, "cuda", dtype, requested).namespace


def test_without_a_result_a_kernel_has_to_be_asked_for(gpu) -> None:
    gpu()
    with pytest.warns(
        UserWarning, match="no committed result shows native kernels right on sm_90 in float32"
    ):
        assert chosen() == "ibq_fast_composite"
    assert chosen(requested="native") == "ibq_fast"


def test_a_passing_result_makes_it_the_default(gpu) -> None:
    gpu(check())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "ibq_fast"


@pytest.mark.parametrize(
    "other",
    [{"op": "code_histogram"}, {"backend": "cupy"}, {"architecture": "sm_80"}, {"dtype": "bfloat16"}],
)
def test_a_result_about_something_else_does_not(gpu, other) -> None:
    gpu(check(**other))
    with pytest.warns(UserWarning, match="no committed result"):
        assert chosen() == "ibq_fast_composite"


def test_the_newest_result_decides(gpu) -> None:
    gpu(check(), check(passed=False, date="2026-02-03"))
    with pytest.warns(
        UserWarning, match="native kernels failed on sm_90 in float32 .2026-02-03, NVIDIA H100"
    ):
        assert chosen() == "ibq_fast_composite"
    gpu(check(passed=False), check(date="2026-02-04"))
    assert chosen() == "ibq_fast"


def test_every_architecture_that_is_here_has_to_be_proven(gpu) -> None:
    gpu(check(), architectures=("sm_80", "sm_90"))
    with pytest.warns(UserWarning, match="right on sm_80"):
        assert chosen() == "ibq_fast_composite"
    gpu(check(), check(architecture="sm_80"), architectures=("sm_80", "sm_90"))
    assert chosen() == "ibq_fast"


def test_the_report_says_why(gpu) -> None:
    gpu()
    reasons = {row.backend: row.reason for row in ops.backend_report("cuda") if row.op == OP}
    assert "no committed result shows native kernels right on sm_90" in reasons["native"]


def test_doctor_tells_what_has_been_proven(monkeypatch) -> None:
    checks = [check(), check(op="code_histogram", dtype="int64"), check(architecture="sm_80", passed=False)]
    monkeypatch.setattr(proof, "committed", lambda: proof.newest(checks))
    report = doctor.report()
    assert "sm_90  native     codebook_search (float32), code_histogram (int64)" in report
    assert "sm_80  native     failed: codebook_search (float32)" in report
    monkeypatch.setattr(proof, "committed", dict)
    assert "none: no GPU kernel is chosen unless it is asked for" in doctor.report()


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "checks.csv"
    assert proof.read(file) == []
    rows = [check(), check(passed=False, gpu="a, b")]
    proof.append(rows[:1], file)
    proof.append(rows[1:], file)
    assert proof.read(file) == rows


@pytest.mark.parametrize("text", ["op,backend\n", ",".join(proof.COLUMNS) + "\na,b,c,d,yes,e,f,g,h\n"])
def test_a_wrong_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "checks.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match="expected"):
        proof.read(file)


def test_the_committed_file_is_whole() -> None:
    known = {row.op for row in ops.backend_report()}
    for row in proof.read():
        assert row.op in known
        assert row.backend in backends.NAMES
        assert row.commit
        assert row.gpu
        assert row.driver
