"""Everything that needs a GPU, in one go: build, check against float64, measure, sanitize; then a table.

    gpu_suite.py [--device cuda|cpu] [--stages build,check,...] [--out DIR]

Runs on the Python it is started with and installs nothing. Each stage is a process with a time limit of its
own, whose output goes to DIR/<stage>.log; a stage that fails or is stopped keeps what it has written and does
not keep the next from running. What was measured is appended, figure by figure, to bench/results/gpu.csv;
what was checked to ibq_fast/ops/gpu_checks.csv, from which the backend table learns once committed. After
a first build the limits together are below six minutes.

--device cpu rehearses: the same stages over the CPU's backends on tiny shapes, results under DIR alone.
The commit is git's; where the tree was copied without git, set IBQ_FAST_COMMIT.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What each stage cannot do without, and what only some of its parts want.
NEEDED = {"build": ("torch", "setuptools", "wheel"), "check": ("torch", "pytest", "hypothesis")}
WANTED = {
    "triton": "the triton backend",
    "cupy": "the cupy backend",
    "numpy": "percentiles of the benchmarks",
}


@dataclass(frozen=True)
class Stage:
    """A process: its command, time limit in seconds, and the environment it wants beside ours."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ``passed``, ``failed``, ``stopped`` (by its limit) or ``left out``, and why."""

    stage: str
    ended: str
    seconds: float
    words: str


def stages(device: str, out: Path, date: str, csv: Path, architecture: str | None) -> list[Stage]:
    """The stages in their order. The compiled peers come late: their compilation is what runs out of time."""
    python, rehearsal = sys.executable, device == "cpu"
    build = {"IBQ_FAST_CUDA": "on"}
    if architecture:
        build["IBQ_FAST_CUDA_ARCHITECTURES"] = architecture
    check = [python, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", f"--device={device}"]
    check.append(f"--checks={out / 'checks.jsonl'}")
    if rehearsal:
        check += ["-k", "native-float32 or native-int64"]

    def bench(group: str, seconds: float, *more: str) -> Stage:
        command = [python, "-m", "bench.gpu", f"--group={group}", f"--device={device}", f"--date={date}"]
        command += [f"--csv={csv}", f"--seconds={0.02 if rehearsal else 1.0}", *more]
        return Stage("-".join((group, *(word.strip("-") for word in more))), command, seconds)

    sanitize = [python, "tools/gpu_sanitize.py", f"--device={device}", "--seconds=30"]
    if rehearsal:
        sanitize.append("--tools=none")
    first = (
        Stage("build", [python, "-c", "import torch, ibq_fast._C"], 60)
        if rehearsal
        else Stage("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 240, build)
    )
    return [
        first,
        Stage("check", check, 90),
        bench("search", 40),
        bench("step", 50),
        bench("cross_entropy", 30),
        Stage("sanitize", sanitize, 65),
        bench("search", 25, "--compiled"),
        bench("step", 40, "--compiled"),
    ]


def run(stage: Stage, out: Path) -> Outcome:
    """Run a stage to its end or its limit; its whole process group is stopped then."""
    missing = [name for name in NEEDED.get(stage.name, ("torch",)) if importlib.util.find_spec(name) is None]
    if missing:
        return Outcome(stage.name, "left out", 0.0, f"not installed: {', '.join(missing)}")
    begun = time.monotonic()
    log = out / f"{stage.name}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **stage.environment}
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
    spent = time.monotonic() - begun
    if code == 0:
        return Outcome(stage.name, "passed", spent, _last_line(log))
    if code is None:
        return Outcome(
            stage.name, "stopped", spent, f"after its limit of {stage.seconds:.0f} s; {_last_line(log)}"
        )
    return Outcome(stage.name, "failed", spent, f"exit code {code}; {_last_line(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and of the processes it started."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, way)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "no output"


def judged(file: Path) -> list[tuple[str, str, str, str]]:
    """(op, backend, dtype, verdict) from what the tests wrote: ``passed`` when all planned tests of a subject
    did, ``failed`` when one did not, ``unfinished`` when they were stopped before all had run."""
    plan: dict[str, list[str]] = {}
    outcomes: dict[str, str] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        record = json.loads(line)
        plan.update(record.get("plan", {}))
        if "node" in record:
            outcomes[record["node"]] = record["outcome"]
    nodes: dict[tuple[str, str, str], list[str]] = {}
    for node, (op, backend, dtype) in plan.items():
        nodes.setdefault((op, backend, dtype), []).append(outcomes.get(node, "not run"))
    verdicts = []
    for subject, found in nodes.items():
        verdict = "failed" if "failed" in found else "unfinished" if "not run" in found else "passed"
        verdicts.append((*subject, verdict))
    return verdicts


def record_checks(file: Path, target: Path, device: str, date: str) -> list[str]:
    """Append finished verdicts to the file of checks; a line for each backend that says what they were."""
    from bench.gpu import facts
    from ibq_fast.ops import proof

    known = facts.gather(device)
    verdicts = judged(file)
    proof.append(
        [
            proof.Check(
                op,
                backend,
                known.architecture,
                dtype,
                verdict == "passed",
                date,
                known.commit,
                known.gpu,
                known.driver,
            )
            for op, backend, dtype, verdict in verdicts
            if verdict != "unfinished" and backend != "composite"
        ],
        target,
    )
    lines = []
    for backend in dict.fromkeys(row[1] for row in verdicts):
        for verdict in ("passed", "failed", "unfinished"):
            named = [f"{op} {dtype}" for op, b, dtype, v in verdicts if (b, v) == (backend, verdict)]
            if named:
                which = "" if verdict == "passed" else f"  {', '.join(named)}"
                lines.append(f"  {backend:10} {verdict:10} {len(named):3}{which}")
    return lines


def describe(device: str) -> list[str]:
    """The machine in a few lines, with what is missing on it."""
    lines = []
    try:
        from bench.gpu import facts

        known = facts.gather(device)
        lines.append(f"{known.gpu}, driver {known.driver}, {known.architecture}, commit {known.commit}")
        lines.append(known.version)
    except Exception as error:  # a machine that cannot be described is still worth a try
        lines.append(f"could not be described: {type(error).__name__}: {error}")
    for name, what in WANTED.items():
        if importlib.util.find_spec(name) is None:
            lines.append(f"not installed: {name}, so no {what}")
    if device == "cuda" and shutil.which("nvcc") is None:
        lines.append("no nvcc on the PATH: the native CUDA kernels cannot be built")
    return lines


def cmake_architecture() -> str | None:
    """CMAKE_CUDA_ARCHITECTURES for the GPU that is here, None when none is."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if (major, minor) in ((9, 0), (10, 0)) else ''}-real"


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", help="comma-separated names (default: all)")
    parser.add_argument(
        "--out", type=Path, help="folder of logs (default: build/gpu, rehearsing build/gpu-rehearsal)"
    )
    options = parser.parse_args(arguments)
    rehearsal = options.device == "cpu"
    out = (options.out or ROOT / "build" / ("gpu-rehearsal" if rehearsal else "gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out if rehearsal else ROOT / "bench" / "results"
    checks = out / "gpu_checks.csv" if rehearsal else ROOT / "ibq_fast" / "ops" / "gpu_checks.csv"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if not rehearsal and cmake_architecture() is None:
        say("GPU suite: no CUDA device that torch can use; nothing was run (--device cpu rehearses)")
        return 3
    architecture = None if rehearsal else cmake_architecture()
    planned = stages(options.device, out, date, results / "gpu.csv", architecture)
    wanted = set(options.stages.split(",")) if options.stages else {stage.name for stage in planned}
    unknown = wanted - {stage.name for stage in planned}
    if unknown:
        parser.error(
            f"stages: expected some of {', '.join(s.name for s in planned)}, got {', '.join(unknown)}"
        )
    (out / "checks.jsonl").unlink(missing_ok=True)
    for line in describe(options.device):
        say(line)
    outcomes = []
    for stage in planned:
        if stage.name not in wanted:
            continue
        outcomes.append(run(stage, out))
        last = outcomes[-1]
        say(f"{last.stage:22} {last.ended:9} {last.seconds:6.1f} s  {last.words}")
        if stage.name == "check":
            for line in record_checks(out / "checks.jsonl", checks, options.device, date):
                say(line)
    for line in summary(results / "gpu.csv", date):
        say(line)
    write(out, outcomes, results, checks, rehearsal)
    return 0 if all(outcome.ended == "passed" for outcome in outcomes) else 1


def summary(csv: Path, date: str) -> Iterable[str]:
    """The table of the figures of this run."""
    from bench.gpu import table

    rows = [row for row in table.read(csv) if row.date == date]
    return table.table(rows) if rows else ["no figures"]


def write(out: Path, outcomes: list[Outcome], results: Path, checks: Path, rehearsal: bool) -> None:
    """Leave the outcomes, and copies of both CSVs, beside the logs: one folder holds a whole run."""
    lines = [f"{o.stage}\t{o.ended}\t{o.seconds:.1f}\t{o.words}" for o in outcomes]
    (out / "outcomes.tsv").write_text("\n".join(lines) + "\n")
    if not rehearsal:
        for file in (results / "gpu.csv", checks):
            if file.is_file():
                shutil.copy2(file, out)


if __name__ == "__main__":
    sys.exit(main())
