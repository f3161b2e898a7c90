"""Everything that needs a GPU, in one go: build, check against float64, measure, sanitize; then a table.

    gpu_suite.py [--device cuda|cpu] [--stages build,check-native,...] [--seconds 280] [--out DIR]

Runs on the Python it is started with and installs nothing. Each stage is a process with a time limit of its
own, whose output goes to DIR/<stage>.log; the checks of the backends run side by side. What has happened is
on disk at any moment: each figure is appended to bench/results/gpu.csv once it is known, the verdicts on what
was checked to ibq_fast/ops/gpu_checks.csv (from which the backend table learns once committed) when the
checks end, and DIR/run.json is written anew after each stage.

A stage that fails or runs out of time says so, and the next goes on. A kernel that loses the device context
or never ends takes its own process down; the stage is started again behind it. --seconds bounds the whole
run, whatever the stages do: the default lets it be run twice in ten minutes. The second run re-uses the build
and what was compiled on demand, so that it reaches stages for which the first had no time.

--device cpu rehearses: the same stages over the CPU's backends on tiny shapes, results under DIR alone.
The commit is git's; where the tree was copied without git, set IBQ_FAST_COMMIT.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import gpu_verdicts  # noqa: E402
from gpu_stages import Outcome, Stage, run, run_together  # noqa: E402

# Of one run: twice this, and the few seconds that a run needs around its stages, are less than ten minutes.
RUN_SECONDS = 280.0
WANTED = {
    "triton": "the triton backend",
    "cupy": "the cupy backend",
    "numpy": "percentiles of the benchmarks",
}
OPS = {
    "search": "codebook_search,code_histogram",
    "select": "straight_through_select",
    "entropies": "softmax_statistics",
    "training": "index_backprop",
    "loss": "linear_cross_entropy",
}
PORTABLE = "native, portable"  # what the checks call native kernels without those for Hopper


def stages(device: str, out: Path, date: str, csv: Path, architecture: str | None) -> list[tuple[Stage, ...]]:
    """The stages in their order; those of a tuple run side by side.

    What a verdict depends on comes first, then the figures by weight. torch.compile comes late, because its
    compilation is what runs out of time, and the sanitizer last.
    """
    python, rehearsal = sys.executable, device == "cpu"
    build = {"IBQ_FAST_CUDA": "on"}
    if architecture:
        build["IBQ_FAST_CUDA_ARCHITECTURES"] = architecture

    def check(name: str, *more: str, **environment: str) -> Stage:
        command = [
            python,
            "-m",
            "pytest",
            "tests/gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:faulthandler",
        ]
        command += [f"--device={device}", *more]
        if rehearsal:
            command += ["-k", "native-float32 or native-int64"]
        needs = ("torch", "pytest", "hypothesis")
        return Stage(f"check-{name}", command, 80, environment, needs, resumes=True)

    def bench(group: str, seconds: float, *more: str) -> Stage:
        command = [python, "-m", "bench.gpu", f"--group={group}", f"--device={device}", f"--date={date}"]
        command += [f"--csv={csv}", f"--seconds={0.02 if rehearsal else 1.0}", *more]
        name = "-".join((group, *(word.strip("-") for word in more)))
        return Stage(name, command, seconds, resumes=True)

    checks = [check("native", "--backend=native")]
    if not rehearsal:
        if architecture is not None and architecture.startswith("90"):
            checks.append(
                check("portable", "--backend=native", f"--called={PORTABLE}", IBQ_FAST_HOPPER="off")
            )
        checks.append(check("cupy", "--backend=cupy"))
        checks += [check(f"triton-{n}", "--backend=triton", f"--ops={ops}") for n, ops in OPS.items()]
        checks.append(check("graph", "--backend=graph"))
        checks.append(check("composite", "--backend=composite"))
    sanitize = [python, "tools/gpu_sanitize.py", f"--device={device}", "--seconds=24"]
    if rehearsal:
        sanitize.append("--tools=none")
    first = (
        Stage("build", [python, "-c", "import torch, ibq_fast._C"], 60)
        if rehearsal
        else Stage(
            "build",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            150,
            build,
            ("torch", "setuptools", "wheel"),
        )
    )
    return [
        (first,),
        tuple(checks),
        (bench("search", 40),),
        (bench("step", 50),),
        (bench("cross_entropy", 35),),
        (bench("decode", 45),),
        (bench("search", 30, "--compiled"),),
        (bench("step", 40, "--compiled"),),
        (Stage("sanitize", sanitize, 55),),
    ]


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
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", help="comma-separated names (default: all)")
    parser.add_argument("--seconds", type=float, default=RUN_SECONDS, help="of the whole run")
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
    architecture = None if rehearsal else cmake_architecture()
    if not rehearsal and architecture is None:
        say("GPU suite: no CUDA device that torch can use; nothing was run (--device cpu rehearses)")
        return 3
    planned = stages(options.device, out, date, results / "gpu.csv", architecture)
    names = [stage.name for group in planned for stage in group]
    wanted = set(options.stages.split(",")) if options.stages else set(names)
    if wanted - set(names):
        parser.error(f"stages: expected some of {', '.join(names)}, got {', '.join(wanted - set(names))}")
    for old in (*out.glob("*.jsonl"), *out.glob("*.hung")):
        old.unlink()  # of an earlier run: a stage would go on behind it
    record: dict[str, object] = {"date": date, "machine": describe(options.device), "outcomes": []}
    for line in describe(options.device):
        say(line)
    outcomes: list[Outcome] = []
    for group in planned:
        here = [stage for stage in group if stage.name in wanted]
        left = options.seconds - (time.monotonic() - begun)
        ended = run_together(here, out, left) if len(here) > 1 else [run(stage, out, left) for stage in here]
        for outcome in ended:
            say(f"{outcome.stage:22} {outcome.ended:9} {outcome.seconds:6.1f} s  {outcome.words}")
        outcomes += ended
        if any(stage.name.startswith("check-") for stage in here):
            verdicts = gpu_verdicts.judged([out / f"{stage.name}.jsonl" for stage in here])
            gpu_verdicts.record(verdicts, checks, options.device, date)
            record["verdicts"] = verdicts
            for line in gpu_verdicts.lines(verdicts):
                say(line)
        record["outcomes"] = [asdict(outcome) for outcome in outcomes]
        keep(record, out, () if rehearsal else (results / "gpu.csv", checks))
    for line in summary(results / "gpu.csv", date):
        say(line)
    return 0 if all(outcome.ended == "passed" for outcome in outcomes) else 1


def summary(csv: Path, date: str) -> Iterable[str]:
    """The table of the figures of this run."""
    from bench.gpu import table

    rows = [row for row in table.read(csv) if row.date == date]
    return table.table(rows) if rows else ["no figures"]


def keep(record: dict[str, object], out: Path, results: Iterable[Path]) -> None:
    """Leave what is known of the run and copies of its results beside the logs: one folder holds it whole."""
    (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    for file in results:
        if file.is_file():
            shutil.copy2(file, out)


if __name__ == "__main__":
    sys.exit(main())
