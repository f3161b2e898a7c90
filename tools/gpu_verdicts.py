"""What the checks of a GPU run say of each operator, backend and dtype, and the file that remembers it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.gpu import facts, journal
from ibq_fast.ops import proof

Verdict = tuple[str, str, str, str]  # op, backend, dtype, how it ended


def judged(journals: Sequence[Path]) -> list[Verdict]:
    """``passed`` when all planned tests of a subject did, ``failed`` when one did not, ``unfinished`` when
    they were stopped before all had run."""
    subjects: dict[str, tuple[str, str, str]] = {}
    outcomes: dict[str, str] = {}
    for file in journals:
        for record in journal.read(file):
            if "plan" in record:
                subjects[f"{file.name}:{record['plan']}"] = tuple(record["subject"])
            elif "ended" in record:
                outcomes[f"{file.name}:{record['ended']}"] = record["outcome"]
    found: dict[tuple[str, str, str], list[str]] = {}
    for node, subject in subjects.items():
        found.setdefault(subject, []).append(outcomes.get(node, "not run"))
    return [
        (*subject, "failed" if "failed" in ended else "unfinished" if "not run" in ended else "passed")
        for subject, ended in found.items()
    ]


def record(verdicts: Iterable[Verdict], target: Path, device: str, date: str) -> None:
    """Append finished verdicts on our kernels to the file of checks."""
    known = facts.gather(device)
    about = known.architecture, known.commit, known.gpu, known.driver
    proof.append(
        [
            proof.Check(op, backend, about[0], dtype, verdict == "passed", date, *about[1:])
            for op, backend, dtype, verdict in verdicts
            if verdict != "unfinished" and backend != "composite"
        ],
        target,
    )


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each backend and verdict; those that did not pass are named."""
    said = []
    for backend in dict.fromkeys(verdict[1] for verdict in verdicts):
        for ended in ("passed", "failed", "unfinished"):
            named = [f"{op} {dtype}" for op, b, dtype, e in verdicts if (b, e) == (backend, ended)]
            if named:
                which = "" if ended == "passed" else f"  {', '.join(named)}"
                said.append(f"  {backend:18} {ended:10} {len(named):3}{which}")
    return said
