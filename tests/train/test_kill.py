"""Kill -9 at ten moments while a run saves after every step: it resumes each time, to the very same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint import same

from ibq_fast.checkpoint.training import latest_checkpoint, load_checkpoint

ROUNDS = 10


@pytest.mark.slow
def test_ten_kills_and_ten_resumes(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = Path(__file__).with_name("killed_run.py")
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(photos), str(ROUNDS)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == 0, done.stderr[-3000:]
    # Every attempt took up what the one before had finished, and went further.
    assert report["steps"] == sorted(set(report["steps"]))
    assert report["half_written"] > 0, "no kill hit a checkpoint while it was written"
    assert done.stderr.count("resumed from") == ROUNDS
    states = []
    for run in (folder, folder.with_name("unbroken")):
        newest = latest_checkpoint(run / "checkpoints")
        assert newest is not None
        parts = load_checkpoint(newest)
        del parts["loop"]["seconds"]
        states.append(parts)
    assert states[0]["step"] == report["end"]
    assert same(states[0], states[1])
