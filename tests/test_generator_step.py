"""The measurement of a generator's step: both sides compute one thing, and the page says what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import generator_step

SMALL = [
    "--model.vocab_size=64",
    "--model.depth=1",
    "--model.num_heads=2",
    "--model.width=16",
    "--model.grid=[4,4]",
    "--data.resolution=16",
    "--data.batch_size=2",
]


def measured(side: str) -> dict[str, Any]:
    entry = generator_step.measure_here("configs/generator_B_262144.yaml", SMALL, side, "no", 2)
    about = {"title": "t", "threads": 1, "device": "d", "commit": "c", "date": "2026-01-01"}
    return entry | about | {"side": side, "precision": "no"}


def test_both_sides_agree_and_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    results = {side: measured(side) for side in generator_step.SIDES}
    ours, plain = results["ibq_fast"], results["logits"]
    assert (ours["images"], ours["tokens"]) == (2, 16)
    generator_step.check(ours, plain, "no")
    plain["terms"][1]["grad_norm"] *= 1.001
    with pytest.raises(RuntimeError, match=r"step 1: grad_norm: expected .* as with logits"):
        generator_step.check(ours, plain, "no")
    plain["seconds"], ours["seconds"], plain["peak"], ours["peak"] = [9.0, 3.0], [9.0, 2.0], 10**10, 8 * 10**9
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(generator_step.MARKS) + "\nafter\n")
    generator_step.write_page(results, page)
    generator_step.write_page(results, page)  # in the same place
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| logits materialised | float32 | 3.0 | 1.50 | 10.00 GB | 1.25 |") == 1


def test_the_page_shows_what_is_recorded(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(generator_step.PAGE.read_text())
    generator_step.write_page(json.loads(generator_step.RESULTS.read_text()), page)
    assert page.read_text() == generator_step.PAGE.read_text()
