"""Sampling runs: images of chosen classes from a generator, over any number of processes, resumable."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ibq_fast.data import to_uint8
from ibq_fast.evaluate.devices import pick_device
from ibq_fast.evaluate.images import image_grid, save_png
from ibq_fast.evaluate.npz import write_npz
from ibq_fast.evaluate.sample_folder import SampleFolder
from ibq_fast.generator import Generator, Guidance, SamplingSettings
from ibq_fast.generator.decoder import precision_of
from ibq_fast.generator.sampler import Request
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train.progress import Reporter

NPZ_FILE = "samples.npz"
_GRID_IMAGES = 1024
_SAY_EVERY = 20.0  # seconds between lines where there is no terminal
_LOOK_EVERY = 2.0  # seconds between looks for what other processes have written
_FINGERPRINT_BYTES = 4096


@dataclass(frozen=True)
class Share:
    """Process ``rank`` of ``world``: its images are those with number i % world == rank."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @staticmethod
    def of_environment() -> Share:
        """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; one process without it."""
        read = {name: os.environ.get(name, default) for name, default in _TORCHRUN.items()}
        if not all(value.isdecimal() for value in read.values()) or int(read["RANK"]) >= int(
            read["WORLD_SIZE"]
        ):
            raise ValueError(
                f"RANK, WORLD_SIZE, LOCAL_RANK: expected numbers as torchrun sets them, got {read}"
            )
        return Share(int(read["RANK"]), int(read["WORLD_SIZE"]), int(read["LOCAL_RANK"]))


_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
DEFAULT_SETTINGS = SamplingSettings(Guidance(2.0))


def sample(
    generator: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    classes: str = "all",
    per_class: int = 8,
    settings: SamplingSettings = DEFAULT_SETTINGS,
    seed: int = 0,
    precision: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
    npz: bool = False,
    share: Share | None = None,
) -> list[Path]:
    """Draw ``per_class`` images of each class into ``out`` and return their files, all of the run's.

    Image i of the run depends on ``seed`` and i alone (see :meth:`Generator.sample`), whatever the batch
    size and however many processes share the work. What is there already is kept: a run that was killed goes
    on where it was. When all images are there, process 0 writes grid.png (a row per class, of at most 1024
    images) and, with ``npz``, samples.npz for the ADM suite's evaluator.

    ``share``: which of several processes this is (default: as torchrun says); the others return when their
    own images are done. Raises ValueError for classes that the generator does not have, a tokenizer that
    does not fit it, or a folder of a run with other settings, and OSError when the disk is full.
    """
    if per_class < 1 or batch_size < 1:
        raise ValueError(f"per_class, batch_size: expected at least 1, got {per_class} and {batch_size}")
    share = Share.of_environment() if share is None else share
    place = pick_device(device)
    if place.type != "cpu" and place.index is None and share.world > 1:
        place = torch.device(place.type, share.local)
    model = Generator.from_pretrained(generator, device=place).eval()
    decoder = Tokenizer.from_pretrained(tokenizer, device=place).eval()
    if decoder.config.quantizer.codebook_size != model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected one of {model.config.vocab_size} codes, as the generator, "
            f"got {decoder.config.quantizer.codebook_size}"
        )
    identity = {
        "seed": seed,
        "precision": precision_of(model, precision),
        **{f"cfg_{name}": value for name, value in asdict(settings.guidance or Guidance(1.0)).items()},
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "generator_weights": fingerprint(model),
        "tokenizer_weights": fingerprint(decoder),
    }
    folder = SampleFolder(out, parse_classes(classes, model.config.num_classes), per_class, identity)
    main = share.rank == 0
    with Reporter("sample", total_steps=len(folder), total_seconds=None, main=main, unit="image") as reporter:
        run = _Run(folder, model, decoder, settings, seed, precision, batch_size, share, reporter)
        run.draw()
        if main:
            run.wait_for_all()
            _finish(folder, npz)
    return [folder.file(i) for i in range(len(folder))]


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        folder: SampleFolder,
        model: Generator,
        decoder: Tokenizer,
        settings: SamplingSettings,
        seed: int,
        precision: str | None,
        batch_size: int,
        share: Share,
        reporter: Reporter,
    ) -> None:
        self.folder, self.model, self.decoder = folder, model, decoder
        self.settings, self.seed, self.precision = settings, seed, precision
        self.batch_size, self.share, self.reporter = batch_size, share, reporter
        self._begun = time.monotonic()
        self._said = self._looked = -float("inf")
        self._whole: set[int] = set()

    def draw(self) -> None:
        """Draw this process's images that are not there."""
        folder, share = self.folder, self.share
        mine = range(share.rank, len(folder), share.world)
        self._whole = {i for i in mine if folder.has(i)}
        missing = [i for i in mine if i not in self._whole]
        again = sum(folder.file(i).exists() for i in missing)
        if not folder.settings_readable:
            self.reporter.say(
                f"{folder.path / 'run.json'} cannot be read: written again, the images are of this run"
            )
        if self._whole or again:
            self.reporter.say(
                f"{len(self._whole)} of {len(mine)} images are there"
                + (f", {again} incomplete and drawn again" if again else "")
            )
        if share.rank == 0:
            folder.write_settings()
        self._show(0.0)
        for start in range(0, len(missing), self.batch_size):
            part = missing[start : start + self.batch_size]
            for image, pixels in zip(part, self._pixels(part), strict=True):
                folder.write(image, pixels)
                self._whole.add(image)
                self._show(0.0)

    def wait_for_all(self) -> None:
        """Until the other processes' images are there as well."""
        folder = self.folder
        waiting = [i for i in range(len(folder)) if i not in self._whole]
        while waiting:
            found = [i for i in waiting if folder.has(i)]
            self._whole.update(found)
            waiting = [i for i in waiting if i not in self._whole]
            self._show(0.0)
            if waiting:
                time.sleep(_LOOK_EVERY)
        self._show(0.0, last=True)

    @torch.no_grad()
    def _pixels(self, part: list[int]) -> Iterator[Tensor]:
        """The images ``part``, uint8 [C, H, W] each."""
        labels = [self.folder.classes[i // self.folder.per_class] for i in part]
        requests = [
            Request(label, self.settings, self.seed, i) for label, i in zip(labels, part, strict=True)
        ]
        tokens = torch.empty(0)
        for drawn in self.model.draw(requests, self.precision):
            tokens = drawn.tokens
            self._show(drawn.done / drawn.total * len(part))
        # A convolution's last bits may depend on the size of its batch: on the CPU, where that would cost an
        # image its independence and large batches gain nothing, each image is decoded by itself.
        for some in tokens.split(1 if tokens.is_cpu else len(part)):
            yield from to_uint8(self.decoder.decode(some)).cpu()

    def _show(self, under_way: float, last: bool = False) -> None:
        """Progress: of all processes where there are several, else with the share of the batch under way."""
        now = time.monotonic()
        if self.share.rank != 0:
            return
        if self.share.world == 1:
            done = len(self._whole) + under_way
        elif now - self._looked >= _LOOK_EVERY or last:
            self._looked = now
            done = float(sum(1 for name in os.listdir(self.folder.path) if name.startswith("class")))
        else:
            return
        self.reporter.step(done, now - self._begun, done)
        if now - self._said >= _SAY_EVERY or last:
            self._said = now
            self.reporter.figures(done, now - self._begun, {})


def _finish(folder: SampleFolder, npz: bool) -> None:
    """What is made of a complete run."""
    rows = max(1, _GRID_IMAGES // folder.per_class)
    shown = range(min(len(folder), rows * folder.per_class, _GRID_IMAGES))
    pictures = torch.stack([torch.tensor(folder.pixels(i)).permute(2, 0, 1) for i in shown])
    save_png(image_grid(pictures, folder.per_class), folder.path / "grid.png")
    if npz and not (folder.path / NPZ_FILE).exists():
        write_npz(folder.path / NPZ_FILE, (folder.pixels(i) for i in range(len(folder))), len(folder))
    folder.sweep()


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights: names, shapes and the first and last 4 KiB of each tensor."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        ends = torch.cat((flat[:_FINGERPRINT_BYTES], flat[-_FINGERPRINT_BYTES:])).cpu()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(ends.numpy().tobytes())
    return digest.hexdigest()


def parse_classes(text: str, num_classes: int) -> list[int]:
    """``all``, ``none`` (the null class: unconditional images) or a list such as ``3,7,20-25`` -> class ids.
    Raises ValueError for anything else."""
    if text in ("all", "none"):
        return list(range(num_classes)) if text == "all" else [num_classes]
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if not match:
            raise ValueError(f"classes: expected all, none, or a list such as 3,7,20-25, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= num_classes:
            raise ValueError(f"classes: expected ids from 0 to {num_classes - 1}, got {item.strip()!r}")
        found.extend(range(first, last + 1))
    return list(dict.fromkeys(found))
