"""Stages of the GPU suite as processes: limited, side by side, started again when a kernel ends one."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import journal

ROOT = Path(__file__).resolve().parent.parent
STARTS = 6  # of one stage: as many kernels less one may take it down
LEAST_SECONDS = 8.0  # below which a stage is not worth starting


@dataclass(frozen=True)
class Stage:
    """A process: its command, time limit in seconds, and the environment it wants beside ours.

    needs: packages it cannot do without. resumes: it writes the journal that ``--journal`` names and goes on
    behind what is written there, so that it is started again when it ends without having finished.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ("torch",)
    resumes: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ``passed``, ``failed``, ``stopped`` (by its limit) or ``left out``, and why."""

    stage: str
    ended: str
    seconds: float
    words: str


def run(stage: Stage, out: Path, left: float) -> Outcome:
    """Run a stage to its end or its limit, at most ``left`` seconds; its whole process group is stopped then.
    Its output goes to ``out/<name>.log``, its journal to ``out/<name>.jsonl``."""
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if missing:
        return Outcome(stage.name, "left out", 0.0, f"not installed: {', '.join(missing)}")
    if left < min(LEAST_SECONDS, stage.seconds):
        return Outcome(stage.name, "left out", 0.0, "no time is left in this run")
    begun, limit = time.monotonic(), min(stage.seconds, left)
    log, notes = out / f"{stage.name}.log", out / f"{stage.name}.jsonl"
    log.write_text("")
    command = [*stage.command, f"--journal={notes}"] if stage.resumes else stage.command
    code: int | None = None
    for start in range(STARTS if stage.resumes else 1):
        code = _process(command, stage.environment, log, limit - (time.monotonic() - begun))
        finished = any("finished" in record for record in journal.read(notes))
        if code is None or finished or not stage.resumes:
            break
        with log.open("a") as file:
            file.write(f"\n--- ended with {code} before its end, start {start + 1} of {STARTS}\n")
    spent = time.monotonic() - begun
    if code is None:
        words = f"after its limit of {limit:.0f} s; {_last_line(log)}"
        return Outcome(stage.name, "stopped", spent, words)
    if code == 0:
        return Outcome(stage.name, "passed", spent, _last_line(log))
    return Outcome(stage.name, "failed", spent, f"exit code {code}; {_last_line(log)}")


def run_together(stages: Sequence[Stage], out: Path, left: float) -> list[Outcome]:
    """Run stages side by side, each in a process of its own."""
    outcomes: list[Outcome | None] = [None] * len(stages)

    def one(place: int) -> None:
        outcomes[place] = run(stages[place], out, left)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(stages))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcome for outcome in outcomes if outcome is not None]


def _process(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int | None:
    """Exit code of the command, None when it was stopped after ``seconds``."""
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and of the processes it started, within three seconds."""
    for way, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 2.0)):
        try:
            os.killpg(process.pid, way)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "no output"
