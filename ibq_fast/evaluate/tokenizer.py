"""``evaluate_tokenizer``: images through a tokenizer and back, and what was lost."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_fast.data import DataError, to_float, to_uint8
from ibq_fast.evaluate.facts import device_facts, fingerprint, model_sha256, versions
from ibq_fast.evaluate.frechet import frechet_distance
from ibq_fast.evaluate.networks import Networks, build_networks, figure_name
from ibq_fast.evaluate.protocols import Protocol
from ibq_fast.evaluate.report import deviations, missing_values, write_report
from ibq_fast.evaluate.similarity import LARGEST_PSNR, pixel_errors, psnr_of, ssim
from ibq_fast.evaluate.sources import Block, ImageSource
from ibq_fast.evaluate.statistics import Statistics
from ibq_fast.evaluate.streaming import Say, batches, measure_all
from ibq_fast.evaluate.tally import BLOCK, Tally
from ibq_fast.evaluate.tokenizer_pictures import draw_tokenizer_pictures
from ibq_fast.evaluate.trunks import Weights
from ibq_fast.evaluate.usage import usage_figures
from ibq_fast.ops import code_histogram
from ibq_fast.tokenizer import Tokenizer

_SMALLEST_SSIM = 7


@dataclass(frozen=True)
class TokenizerEvaluation:
    """``report``: what report.json holds, its figures under "figures". ``counts``: int64 [K], how often each
    code was used."""

    report: Mapping[str, Any]
    counts: Tensor

    @property
    def figures(self) -> dict[str, float]:
        """The figures that could be computed."""
        return {name: value for name, value in self.report["figures"].items() if value is not None}


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    source: ImageSource,
    protocol: Protocol,
    out: str | Path,
    *,
    weights: Weights | None = None,
    model: str = "",
    batch_size: int = 32,
    save_seconds: float = 60.0,
    pictures: bool = True,
    say: Say = lambda line: None,
) -> TokenizerEvaluation | None:
    """Measure ``tokenizer`` on ``source`` by ``protocol`` and write ``out``/report.json, report.md and
    pictures; on processes other than the main one None.

    Figures: ``psnr``, ``psnr_of_mean_error`` (of the mean square error over all images), ``ssim``, ``l1``
    (mean absolute error in [0, 255]), ``lpips_alex``, ``lpips_vgg``, ``rfid`` (and the Fréchet distances of
    other trunks under their own names), ``utilisation``, ``perplexity``, ``codes_used``. What cannot be
    computed is None, with a reason under "missing". All processes of a torchrun call it together; a call that
    was killed is taken up by the next one with the same arguments.

    source: square images of the size the protocol, or the tokenizer, asks for. model: what to call the
    tokenizer in the report. batch_size: images at a time, at most 64, see ``batches``. Raises ValueError for
    a size that the tokenizer does not take, DataError when no image can be read."""
    if not 1 <= batch_size <= BLOCK:
        raise ValueError(f"batch_size: expected 1 to {BLOCK}, got {batch_size}")
    started = time.monotonic()
    device = tokenizer.last_layer.device
    side = protocol.resolution or tokenizer.config.resolution
    protocol = replace(protocol, resolution=side)
    networks = build_networks(protocol, weights or Weights(), device, lpips=True)
    meter = _Meter(tokenizer.eval(), protocol, networks, batch_size, device)
    folder = Path(out)
    made_of = {
        "protocol": protocol.record(),
        "networks": networks.record(side),
        "model": model_sha256(tokenizer),
        "images": source.digest,
    }
    progress = folder / "progress"
    mark = fingerprint("tokenizer", made_of)
    tally = measure_all(source, meter, progress, mark, save_seconds=save_seconds, say=say)
    if tally is None:
        return None
    if not bool(tally.seen.any()):
        raise DataError(f"images: expected at least one that can be read, got {len(source)} that cannot")
    report: dict[str, Any] = {"kind": "tokenizer", **_figures(tally, protocol, networks)}
    report |= {
        "protocol": protocol.record(),
        "deviations": deviations(protocol, networks, int(tally.seen.sum())),
        "networks": networks.record(side),
        "images": {
            "source": source.description,
            "digest": source.digest,
            "count": int(tally.seen.sum()),
            "unreadable": [list(item) for item in tally.unreadable],
        },
        "model": {"path": model, "sha256": made_of["model"], "codebook_size": len(tally.sums["codes"])},
        "reference": _save_reference(tally, protocol, networks, source, folder),
        "versions": versions(),
        "run": {**device_facts(device), "seconds": time.monotonic() - started},
    }
    if pictures:
        report["pictures"] = draw_tokenizer_pictures(
            folder, source, tally, tokenizer, lambda images: meter.reconstruct(images)[2]
        )
    write_report(folder, report)
    shutil.rmtree(progress, ignore_errors=True)
    return TokenizerEvaluation(report, tally.sums["codes"])


class _Meter:
    """Measures one block of images."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        protocol: Protocol,
        networks: Networks,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.tokenizer, self.protocol, self.networks = tokenizer, protocol, networks
        self.batch_size, self.device = batch_size, device

    def __call__(self, block: Block, tally: Tally) -> None:
        for images, indices in batches(block, self.batch_size):
            self._batch(images, indices, tally)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 [B, C, R, R] -> codes [B, h, w], the decoder's output clamped, that as uint8, and the
        originals in [-1, 1] as the tokenizer saw them."""
        shown = images.to(self.device)
        x = _published_float(shown) if self.protocol.rounding == "truncate" else to_float(shown)
        codes = self.tokenizer.encode(x)
        decoded = self.tokenizer.decode(codes, clamp=True).float()
        return codes, decoded, self._rounded(decoded), x

    def _batch(self, images: Tensor, indices: Tensor, tally: Tally) -> None:
        codes, decoded, copies, x = self.reconstruct(images)
        seen = decoded if self.protocol.features_of == "float" else to_float(copies)
        count = len(indices)
        for name, distance in self.networks.lpips.items():
            tally.put(name, indices, distance(x, seen)[:count])
        for name, trunk in self.networks.trunks.items():
            tally.features(f"{name}/originals", trunk(x).pooled[:count])
            tally.features(f"{name}/copies", trunk(seen).pooled[:count])
        codes, copies, x, images = codes[:count], copies[:count], x[:count], images[:count]
        tally.add("codes", code_histogram(codes.reshape(-1), self.tokenizer.config.quantizer.codebook_size))
        originals = self._rounded(x) if self.protocol.rounding == "truncate" else images.to(self.device)
        errors = pixel_errors(originals, copies)
        for name, values in errors._asdict().items():
            tally.put(name, indices, values)
        if min(images.shape[2:]) >= _SMALLEST_SSIM:
            tally.put("ssim", indices, ssim(originals, copies))

    def _rounded(self, images: Tensor) -> Tensor:
        if self.protocol.rounding == "nearest":
            return to_uint8(images)
        return ((images + 1) / 2 * 255.0).to(torch.uint8)


def _published_float(images: Tensor) -> Tensor:
    """uint8 to [-1, 1] with the published data set's rounding: divided in float64, then float32."""
    return (images.cpu().double() / 127.5 - 1.0).float().to(images.device)


def _figures(tally: Tally, protocol: Protocol, networks: Networks) -> dict[str, Any]:
    """Under "figures" and "missing"."""
    counts = tally.sums["codes"]
    missing: dict[str, str] = {}
    figures = {
        "psnr": tally.mean("psnr", LARGEST_PSNR),
        "psnr_of_mean_error": float(psnr_of(torch.tensor(tally.mean("mse"))).clamp_max(LARGEST_PSNR)),
        "l1": tally.mean("l1"),
    }
    if "ssim" in tally.values:
        figures["ssim"] = tally.mean("ssim")
    else:
        missing["ssim"] = f"images of less than {_SMALLEST_SSIM} pixels"
    for name in networks.lpips:
        figures[name] = tally.mean(name)
    for name in protocol.trunks:
        title = figure_name("frechet", name, reconstruction=True)
        if name not in networks.trunks:
            missing[title] = networks.missing[name]
            continue
        originals, copies = (tally.moments[f"{name}/{side}"].gaussian() for side in ("originals", "copies"))
        figures[title] = frechet_distance(originals, copies)
        if math.isnan(figures[title]):
            missing[title] = "takes at least two images"
    missing |= {name: reason for name, reason in networks.missing.items() if name.startswith("lpips")}
    figures |= {**usage_figures(counts), "codes_used": int((counts > 0).sum())}
    return {"figures": missing_values(figures, missing), "missing": missing}


def _save_reference(
    tally: Tally, protocol: Protocol, networks: Networks, source: ImageSource, folder: Path
) -> dict[str, Any]:
    """The originals' statistics, one file a trunk; what the report says of them."""
    files = {}
    for name in networks.trunks:
        record = {
            "images": source.description,
            "digest": source.digest,
            **networks.preparation(protocol, name),
        }
        statistics = Statistics(tally.moments[f"{name}/originals"].gaussian(), None, record)
        path = statistics.save(folder / f"reference_{name}.npz")
        files[name] = {"file": path.name, "sha256": statistics.sha256()}
    return {"images": "the originals themselves", "digest": source.digest, "statistics": files}
