"""Reports of evaluations: ``report.json``, ``report.md``, and what two of them have in common."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ibq_fast.data import DataError
from ibq_fast.evaluate.networks import Networks
from ibq_fast.evaluate.protocols import Protocol, differences

_UNITS = {"psnr": " dB", "psnr_of_mean_error": " dB"}
_SHARES = ("utilisation", "precision", "recall")
# Two reports that differ here measured different things.
_COMPARED = ("kind", "protocol", "networks")


def missing_values(figures: Mapping[str, float], missing: Mapping[str, str]) -> dict[str, float | None]:
    """``figures`` for JSON: None where there is no number, and for what is ``missing``."""
    found = {name: None if math.isnan(value) else value for name, value in figures.items()}
    return {**found, **{name: None for name in missing if name not in found}}


def deviations(protocol: Protocol, networks: Networks, images: int) -> list[str]:
    """In what a measurement is not what its protocol's name stands for, beside settings that were changed."""
    found = [f"{name}: not the published weights" for name in networks.unpublished()]
    if protocol.images is not None and images != protocol.images:
        found.append(f"{images:,} images, where the protocol has {protocol.images:,}")
    return found


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write both files; ``report.json`` last, and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n\n".join(_sections(report)) + "\n")
    temporary = folder / ".report.json"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, folder / "report.json")


def read_report(path: str | Path) -> dict[str, Any]:
    """A ``report.json``, or that of a folder. Raises DataError for a file that is no report."""
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    try:
        report = json.loads(file.read_text())
        if not {"figures", "protocol", "kind"} <= set(report):
            raise ValueError("it has no figures, protocol and kind")
    except FileNotFoundError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: expected an evaluation's report.json: {error}") from error
    return dict(report)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Two reports' figures side by side as a Markdown table, and why they should not be compared: differences
    of protocol, networks, images and reference, one line each; empty when there are none."""
    warnings = differences({k: a.get(k) for k in _COMPARED}, {k: b.get(k) for k in _COMPARED})
    for part in ("images", "reference"):
        x, y = a.get(part, {}), b.get(part, {})
        keys = ("digest", "count")
        warnings += differences({k: x.get(k) for k in keys}, {k: y.get(k) for k in keys}, f"{part}.")
    for which, report in (("first", a), ("second", b)):
        warnings += [f"the {which} deviates: {line}" for line in report.get("deviations", [])]
    names = list(dict.fromkeys([*a["figures"], *b["figures"]]))
    rows = [
        (name, *(_value(name, report["figures"].get(name)) for report in (a, b)), _change(name, a, b))
        for name in names
    ]
    return _table(("", "first", "second", "change"), rows), warnings


def summary(report: Mapping[str, Any]) -> str:
    """The figures in a line each, what is missing, and the protocol, for a terminal."""
    width = max(map(len, report["figures"]))
    lines = [f"{name:{width}}  {_value(name, value)}" for name, value in report["figures"].items()]
    lines += [f"{name} is missing: {reason}" for name, reason in report["missing"].items()]
    protocol = report["protocol"]
    lines.append(
        f"protocol {protocol['name']} (version {protocol['version']}), {report['images']['count']:,} images"
    )
    lines += [f"deviates: {line}" for line in report["deviations"]]
    return "\n".join(lines)


def _sections(report: Mapping[str, Any]) -> list[str]:
    protocol, images, run = report["protocol"], report["images"], report["run"]
    title = f"# Evaluation of a {report['kind']}"
    about = (
        f"{images['count']:,} images: {images['source']}. "
        f"Protocol **{protocol['name']}**, version {protocol['version']}."
    )
    sections = [title, about]
    if report["deviations"]:
        sections += ["This is not what the protocol's name stands for:", _list(report["deviations"])]
    figures = report["figures"].items()
    sections.append(_table(("figure", "value"), [(name, _value(name, value)) for name, value in figures]))
    if report["missing"]:
        sections += ["Missing:", _list([f"{name}: {reason}" for name, reason in report["missing"].items()])]
    sections += [f"![{caption}]({file})" for file, caption in report.get("pictures", {}).items()]
    settings = {name: value for name, value in protocol.items() if name not in ("name", "version")}
    sections += ["## Protocol", _table(("setting", "value"), [(k, _plain(v)) for k, v in settings.items()])]
    sections += ["## Networks", _facts(report["networks"]) or "None."]
    for part in ("model", "samples", "reference"):
        if part in report:
            sections += [f"## {part.capitalize()}", _facts(report[part])]
    sections += ["## Images", _facts({k: v for k, v in images.items() if k != "unreadable"})]
    if images["unreadable"]:
        sections += ["Not read:", _list([f"{name}: {reason}" for name, reason in images["unreadable"][:50]])]
    took = (
        f"{run['device']}, {run['processes']} processes of {run['threads']} threads, {run['seconds']:.0f} s."
    )
    sections += ["## Versions and run", _facts(report["versions"]), took]
    return sections


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "—"
    if name.startswith(_SHARES):
        return f"{value:.2%}"
    return f"{value:,.0f}" if isinstance(value, int) else f"{value:,.4f}{_UNITS.get(name, '')}"


def _change(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    x, y = a["figures"].get(name), b["figures"].get(name)
    return "" if x is None or y is None else f"{y - x:+.4g}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "all, or any" if value is None else str(value)


def _facts(facts: Mapping[str, Any], prefix: str = "") -> str:
    """Nested facts as one list."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines.append(_facts(value, f"{prefix}{name}, "))
        else:
            lines.append(f"- {prefix}{name}: {_plain(value)}")
    return "\n".join(line for line in lines if line)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
