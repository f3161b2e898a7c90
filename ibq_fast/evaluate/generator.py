"""``evaluate_generator``: how close generated images come to a reference set."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_fast.data import DataError, to_float
from ibq_fast.evaluate.class_score import class_score, score_sums
from ibq_fast.evaluate.facts import device_facts, fingerprint, versions
from ibq_fast.evaluate.feature_file import FeatureFile
from ibq_fast.evaluate.frechet import frechet_distance
from ibq_fast.evaluate.images import image_grid, save_png
from ibq_fast.evaluate.moments import Gaussian
from ibq_fast.evaluate.neighbours import precision_recall
from ibq_fast.evaluate.networks import Networks, build_networks, figure_name
from ibq_fast.evaluate.protocols import Protocol, differences
from ibq_fast.evaluate.report import deviations, missing_values, write_report
from ibq_fast.evaluate.sources import Block, ImageSource
from ibq_fast.evaluate.statistics import Statistics
from ibq_fast.evaluate.streaming import Say, batches, measure_all, rank, wait_for_all
from ibq_fast.evaluate.tally import BLOCK, Tally
from ibq_fast.evaluate.trunks import Features, Weights

_SHOWN = 64
_MEASURES = ("frechet", "spatial_frechet", "class_score", "class_score_deviation", "precision", "recall")


class Reference:
    """What generated images are compared with: ``source``, ``statistics``, or both (of which the Fréchet
    distances then take the statistics and precision and recall the images, as ADM's evaluation does).
    ``digest``
    identifies a statistics file: the SHA-256 of its content."""

    def __init__(
        self,
        source: ImageSource | None = None,
        statistics: Statistics | None = None,
        name: str = "",
        digest: str = "",
    ) -> None:
        if source is None and statistics is None:
            raise ValueError("reference: expected images, statistics or both, got neither")
        self.source, self.statistics = source, statistics
        self.name = name or (source.description if source is not None else "")
        self.digest = digest or (source.digest if source is not None else "")


def evaluate_generator(
    samples: ImageSource,
    reference: Reference,
    protocol: Protocol,
    out: str | Path,
    *,
    device: torch.device,
    weights: Weights | None = None,
    batch_size: int = 32,
    save_seconds: float = 60.0,
    pictures: bool = True,
    say: Say = lambda line: None,
) -> dict[str, Any] | None:
    """Measure ``samples`` against ``reference`` by ``protocol`` (whose resolution is that of both) and write
    ``out``/report.json, report.md, samples.png and reference_TRUNK.npz; returns the report, on processes
    other than the main one None.

    Figures of Inception: ``gfid``, ``sfid``, ``inception_score`` with ``class_score_deviation`` over the
    splits, ``precision``, ``recall``; the same of other trunks under their own names. What cannot be computed
    is None, with a reason under "missing". Processes and interruptions as ``evaluate_tokenizer``. Raises
    DataError when no image can be read, ValueError for statistics of another trunk or another preparation.
    """
    if not 1 <= batch_size <= BLOCK:
        raise ValueError(f"batch_size: expected 1 to {BLOCK}, got {batch_size}")
    if protocol.resolution is None:
        raise ValueError("protocol: expected the samples' resolution in it, got None")
    started = time.monotonic()
    side, folder = protocol.resolution, Path(out)
    networks = build_networks(protocol, weights or Weights(), device, lpips=False)
    _check_record(reference, protocol, networks)
    made_of = {"protocol": protocol.record(), "networks": networks.record(side)}
    progress = folder / "progress"

    def measured(name: str, source: ImageSource) -> tuple[Tally | None, dict[str, FeatureFile]]:
        files = {
            trunk: FeatureFile(
                progress / f"{name}_{trunk}.npy", len(source), network.width, protocol.neighbour_images
            )
            for trunk, network in networks.trunks.items()
        }
        if rank() == 0:
            for file in files.values():
                file.create()
        wait_for_all()
        meter = _Meter(protocol, networks, files, batch_size, device)
        mark = fingerprint("generator", name, made_of, source.digest)
        say(f"{name}: {len(source):,} images")
        return measure_all(source, meter, progress / name, mark, save_seconds=save_seconds, say=say), files

    of_reference = measured("reference", reference.source) if reference.source is not None else (None, {})
    of_samples, sample_files = measured("samples", samples)
    if of_samples is None:
        return None
    for tally, source in ((of_samples, samples), (of_reference[0], reference.source)):
        if tally is not None and source is not None and not bool(tally.seen.any()):
            raise DataError(f"images: expected at least one that can be read in {source.description}")
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for name in protocol.trunks:
        if name not in networks.trunks:
            missing |= {figure_name(figure, name): networks.missing[name] for figure in _MEASURES}
            continue
        statistics = reference.statistics or _statistics(of_reference[0], protocol, networks, name, reference)
        if statistics is not reference.statistics:
            path = statistics.save(folder / f"reference_{name}.npz")
            facts[name] = {"file": path.name, "sha256": statistics.sha256()}
        else:
            facts[name] = {"file": reference.name, "sha256": statistics.sha256()}
        found, lacking = _distances(of_samples, statistics, name)
        figures |= found
        missing |= lacking
        titles = [figure_name(figure, name) for figure in ("precision", "recall")]
        if of_reference[0] is None:
            missing |= dict.fromkeys(titles, "the reference is statistics alone, without images")
            continue
        say(f"precision and recall, {name}")
        values = precision_recall(
            of_reference[1][name].read(of_reference[0].seen),
            sample_files[name].read(of_samples.seen),
            protocol.neighbours,
        )
        figures |= dict(zip(titles, values, strict=True))
        if math.isnan(values.precision):
            missing |= dict.fromkeys(titles, f"takes more than {protocol.neighbours} images of each set")
    report: dict[str, Any] = {
        "kind": "generator",
        "figures": missing_values(figures, missing),
        "missing": missing,
        **made_of,
        "deviations": deviations(protocol, networks, int(of_samples.seen.sum())),
        "images": {
            "source": samples.description,
            "digest": samples.digest,
            "count": int(of_samples.seen.sum()),
            "unreadable": [list(item) for item in of_samples.unreadable],
        },
        "reference": {
            "images": reference.name,
            "digest": reference.digest,
            "count": None if of_reference[0] is None else int(of_reference[0].seen.sum()),
            "statistics": facts,
        },
        "versions": versions(),
        "run": {**device_facts(device), "seconds": time.monotonic() - started},
    }
    if pictures:
        save_png(image_grid(samples.block(0, _SHOWN).images), folder / "samples.png")
        report["pictures"] = {"samples.png": "the first samples"}
    write_report(folder, report)
    shutil.rmtree(progress, ignore_errors=True)
    return report


class _Meter:
    """Measures one block of images."""

    def __init__(
        self,
        protocol: Protocol,
        networks: Networks,
        files: dict[str, FeatureFile],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.protocol, self.networks, self.files = protocol, networks, files
        self.batch_size, self.device = batch_size, device

    def __call__(self, block: Block, tally: Tally) -> None:
        for images, indices in batches(block, self.batch_size):
            self._batch(images, indices, tally)

    def _batch(self, images: Tensor, indices: Tensor, tally: Tally) -> None:
        x = to_float(images.to(self.device))
        for name, trunk in self.networks.trunks.items():
            found = Features(*(part[: len(indices)] for part in trunk(x)))
            tally.features(f"{name}/pooled", found.pooled)
            tally.features(f"{name}/spatial", found.spatial)
            split = indices * self.protocol.score_splits // tally.images
            tally.add(f"{name}/score", score_sums(found.logits, split, self.protocol.score_splits))
            self.files[name].write(indices, found.pooled)


def _distances(tally: Tally, statistics: Statistics, trunk: str) -> tuple[dict[str, float], dict[str, str]]:
    """Fréchet distances and the class score, and why any are missing."""
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    pairs: dict[str, tuple[str, Gaussian | None]] = {
        "frechet": ("pooled", statistics.pooled),
        "spatial_frechet": ("spatial", statistics.spatial),
    }
    for figure, (part, expected) in pairs.items():
        title = figure_name(figure, trunk)
        if expected is None:
            missing[title] = "the reference's statistics have no spatial features"
            continue
        figures[title] = frechet_distance(expected, tally.moments[f"{trunk}/{part}"].gaussian())
        if math.isnan(figures[title]):
            missing[title] = "takes at least two images of each set"
    score = class_score(tally.sums[f"{trunk}/score"])
    figures[figure_name("class_score", trunk)] = score.mean
    figures[figure_name("class_score_deviation", trunk)] = score.deviation
    return figures, missing


def _statistics(
    tally: Tally | None, protocol: Protocol, networks: Networks, trunk: str, reference: Reference
) -> Statistics:
    assert tally is not None
    pooled, spatial = (tally.moments[f"{trunk}/{part}"].gaussian() for part in ("pooled", "spatial"))
    record = {"images": reference.name, "digest": reference.digest, **networks.preparation(protocol, trunk)}
    return Statistics(pooled, spatial, record)


def _check_record(reference: Reference, protocol: Protocol, networks: Networks) -> None:
    """A statistics file fits one trunk: that which its record names, else, as files of other programs,
    Inception."""
    if reference.statistics is None:
        return
    record = reference.statistics.record
    made_with = record["trunk"]["name"] if record else "inception"
    others = [name for name in protocol.trunks if name != made_with]
    if others:
        raise ValueError(
            f"reference: the statistics are {made_with}'s; expected a protocol with that trunk alone, "
            f"got {', '.join(protocol.trunks)}"
        )
    if record and made_with in networks.trunks:
        here = networks.preparation(protocol, made_with)
        if found := differences({key: record.get(key) for key in here}, here):
            raise ValueError(
                f"reference: the statistics were made otherwise (theirs / here): {'; '.join(found)}"
            )
