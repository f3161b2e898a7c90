"""The GPU suite without a GPU: its whole control flow rehearsed, and what a stage that goes wrong leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import table
from ibq_fast.ops import proof

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gpu_stages  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_verdicts  # noqa: E402

STAGES = "build,check-native,search,step,cross_entropy,decode,sanitize"


@pytest.mark.slow
def test_the_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    """Everything but the compiled peers, whose compilation is long."""
    said: list[str] = []
    code = gpu_suite.main(["--device", "cpu", "--out", str(tmp_path), "--stages", STAGES], said.append)
    logs = "\n".join(f"{log.name}\n{log.read_text()[-1500:]}" for log in tmp_path.glob("*.log"))
    assert code == 0, "\n".join(said) + logs
    checks = proof.read(tmp_path / "gpu_checks.csv")
    assert {(c.op, c.dtype) for c in checks if c.passed and c.backend == "native"} == {
        ("codebook_search", "float32"),
        ("straight_through_select", "float32"),
        ("softmax_statistics", "float32"),
        ("index_backprop", "float32"),
        ("linear_cross_entropy", "float32"),
        ("code_histogram", "int64"),
    }
    rows = table.read(tmp_path / "gpu.csv")
    assert {row.group for row in rows} == {"search", "step", "cross_entropy", "decode"}
    wrong = [row for row in rows if row.metric == "not measured" and row.provider.startswith("ibq_fast")]
    assert wrong == []
    assert any("ibq_fast native" in line for line in said)
    record = json.loads((tmp_path / "run.json").read_text())
    assert [(o["stage"], o["ended"]) for o in record["outcomes"]] == [
        (s, "passed") for s in STAGES.split(",")
    ]
    assert len(record["verdicts"]) == 6


def test_the_stages_on_a_gpu(tmp_path: Path) -> None:
    planned = gpu_suite.stages("cuda", tmp_path, "now", tmp_path / "gpu.csv", "90a-real")
    names = [[stage.name for stage in group] for group in planned]
    assert names[0] == ["build"]
    assert planned[0][0].environment == {"IBQ_FAST_CUDA": "on", "IBQ_FAST_CUDA_ARCHITECTURES": "90a-real"}
    assert {"check-native", "check-portable", "check-cupy", "check-triton-loss"} <= set(names[1])
    assert names[-1] == ["sanitize"]
    assert 2 * (gpu_suite.RUN_SECONDS + 3 + 15) < 600  # stopping the last stage; describing and summing up


def stage(program: str, seconds: float = 30.0, **more: bool) -> gpu_stages.Stage:
    return gpu_stages.Stage("step", [sys.executable, "-c", program], seconds, **more)


def test_a_stage_that_fails_or_hangs_is_said_to(tmp_path: Path) -> None:
    passed = gpu_stages.run(stage("print('all good')"), tmp_path, 60)
    assert (passed.ended, passed.words) == ("passed", "all good")
    failed = gpu_stages.run(stage("print('so far'); raise SystemExit(7)"), tmp_path, 60)
    assert (failed.ended, failed.words) == ("failed", "exit code 7; so far")
    hangs = "import time; print('waiting', flush=True); time.sleep(60)"
    hung = gpu_stages.run(stage(hangs, seconds=1.0), tmp_path, 60)
    assert (hung.ended, hung.words) == ("stopped", "after its limit of 1 s; waiting")
    assert hung.seconds < 10


def test_a_run_that_is_out_of_time_leaves_stages_out(tmp_path: Path) -> None:
    outcome = gpu_stages.run(stage("print('never')"), tmp_path, 2.0)
    assert (outcome.ended, outcome.words) == ("left out", "no time is left in this run")


def test_a_stage_without_its_packages_is_left_out(tmp_path: Path) -> None:
    wanting = gpu_stages.Stage("step", ["no such program"], 30.0, needs=("torch", "no_such_package"))
    outcome = gpu_stages.run(wanting, tmp_path, 60)
    assert (outcome.ended, outcome.words) == ("left out", "not installed: no_such_package")


# A kernel that ends its process, one that never ends, and two that are right, as steps of a journal.
STEPS = """
import os, sys, time
from pathlib import Path
from bench.gpu.journal import DEAD, Journal
journal = Journal(Path(sys.argv[-1].removeprefix("--journal=")))
ways = {"a": lambda: None, "b": lambda: os._exit(DEAD), "c": lambda: time.sleep(60), "d": lambda: None}
for name, way in ways.items():
    if name not in journal.ended and name not in journal.lost:
        with journal.step(name, 0.3):
            way()
        journal.end(name, "passed")
print("lost:", *journal.lost)
journal.finish()
"""


def test_a_kernel_that_takes_its_process_down_does_not_take_the_others(tmp_path: Path) -> None:
    outcome = gpu_stages.run(stage(STEPS, resumes=True), tmp_path, 60)
    assert (outcome.ended, outcome.words) == ("passed", "lost: b c")
    assert "<lambda>" in (tmp_path / "step.hung").read_text()  # where it hung
    assert (tmp_path / "step.log").read_text().count("before its end") == 2


def test_tests_go_on_behind_the_one_that_ended_their_process(tmp_path: Path) -> None:
    """The journal of a process that was lost in one test and had failed in another."""
    first = "tests/gpu/test_right.py::test_histogram[code_histogram-native-int64-1]"
    second = first.replace("-1]", "-100]")
    file = tmp_path / "check.jsonl"
    records = [{"begun": first}, {"ended": first, "outcome": "failed"}, {"begun": second}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_right.py", "-q", "-p", "no:cacheprovider"]
    command += ["--device=cpu", "--backend=native", "--ops=code_histogram", f"--journal={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "3 passed" in done.stdout
    assert gpu_verdicts.judged([file]) == [("code_histogram", "native", "int64", "failed")]


def test_a_subject_is_proven_only_when_all_of_its_tests_passed(tmp_path: Path) -> None:
    file = tmp_path / "checks.jsonl"
    plan = {"a1": "a native float32", "a2": "a native float32", "b1": "b native float32"}
    plan |= {"c1": "c cupy int64", "c2": "c cupy int64"}
    outcomes = {"a1": "passed", "a2": "passed", "b1": "failed", "c1": "passed"}
    records: list[dict[str, object]] = [
        {"plan": node, "subject": about.split()} for node, about in plan.items()
    ]
    records += [{"ended": node, "outcome": outcome} for node, outcome in outcomes.items()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    verdicts = gpu_verdicts.judged([file])
    assert verdicts == [
        ("a", "native", "float32", "passed"),
        ("b", "native", "float32", "failed"),
        ("c", "cupy", "int64", "unfinished"),
    ]
    gpu_verdicts.record(verdicts, tmp_path / "checks.csv", "cpu", "2026-01-01")
    assert [(c.op, c.passed) for c in proof.read(tmp_path / "checks.csv")] == [("a", True), ("b", False)]
    assert gpu_verdicts.judged([tmp_path / "none"]) == []


def test_without_a_gpu_nothing_is_run_and_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    said: list[str] = []
    assert gpu_suite.main(["--out", str(tmp_path)], said.append) == 3
    assert said == ["GPU suite: no CUDA device that torch can use; nothing was run (--device cpu rehearses)"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "no CUDA device" in done.stdout
    assert "collected, none run" in done.stdout


def test_gpu_tests_are_no_part_of_the_others() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "tests/ops/test_search.py" in done.stdout
    assert "tests/gpu/" not in done.stdout


def row(**changes: object) -> table.Row:
    values = {"group": "search", "provider": "matmul", "size": "N=1", "regime": "", "metric": "throughput"}
    values |= {"p20": 1.0, "p50": 100.0, "p80": 3.0, "unit": "", "gpu": "g", "driver": "d", "date": "t"}
    return table.Row(**{**values, "version": "v", "commit": "c", **changes})


def test_the_table_gives_the_share_of_the_ceiling(tmp_path: Path) -> None:
    rows = [row(), row(metric="time", p50=2.0)]
    rows += [row(provider="ibq_fast native", p50=60.0), row(provider="ibq_fast native", metric="time")]
    rows += [row(provider="eager", metric="not measured", unit="needs about 129 GB, 78 GB are free")]
    table.append(tmp_path / "gpu.csv", rows)
    lines = table.table(table.read(tmp_path / "gpu.csv"))
    assert any("ibq_fast native" in line and "60%" in line for line in lines)
    assert any(" ".join(line.split()) == "eager needs about 129 GB, 78 GB are free" for line in lines)
