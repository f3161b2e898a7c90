"""Batches from a data set, resumable at any step, with or without worker processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ibq_fast.data.image_folder import ImageFolder
from ibq_fast.data.in_memory import InMemoryImages
from ibq_fast.data.sampler import ResumableBatchSampler

Gather = Callable[[list[Any]], list[Any]]  # joins the lists of all processes, on each of them


class Batch(NamedTuple):
    """``images`` uint8 [B, C, H, W] and ``labels`` int64 [B], on the CPU."""

    images: Tensor
    labels: Tensor


class Position(NamedTuple):
    """The batch that comes next: ``step`` of ``epoch``, both from 0."""

    epoch: int
    step: int


class Loader:
    """Iterating gives the rest of the current epoch; the next iteration gives the next epoch.

    In training the position moves on with every batch handed out (not with what workers have prefetched), so
    ``state_dict()`` taken after a step continues with the batch after it, without decoding anything before.
    In evaluation (``train=False``) every iteration starts at the first image, in the order of the set.

    Args:
        dataset: an ``ImageFolder`` or an ``InMemoryImages`` (which needs no workers and ignores them).
        sampler: which images make up which batch.
        train: as above.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: page-locked batches, for asynchronous copies to a GPU; None: when there is one.
    """

    def __init__(
        self,
        dataset: ImageFolder | InMemoryImages,
        sampler: ResumableBatchSampler,
        *,
        train: bool,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        self.dataset, self.sampler, self.train = dataset, sampler, train
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._position = Position(0, 0)
        self._keys = _Keys(sampler)
        self._torch_loader: DataLoader[Any] | None = None
        if isinstance(dataset, ImageFolder):
            side = dataset.transform.resolution
            self._torch_loader = DataLoader(
                dataset,
                batch_sampler=self._keys,
                collate_fn=_Collate((dataset.channels, side, side)),
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
                pin_memory=self._pin,
                worker_init_fn=ignore_interrupt,
                # Its own generator: a DataLoader draws a seed at each start, which would otherwise come from
                # the global one, and a resumed run starts once more than an unbroken one.
                generator=torch.Generator(),
            )

    def __len__(self) -> int:
        """Batches per epoch for this rank."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError when too many images are bad (see ``ImageFolder``)."""
        if not self.train:
            self._position = Position(0, 0)
        epoch, start = self._position
        batches = self._decoded(epoch, start) if self._torch_loader else self._indexed(epoch, start)
        for step, batch in enumerate(batches, start + 1):
            self._position = Position(epoch, step) if step < len(self) else Position(epoch + 1, 0)
            if len(batch.labels):
                yield batch

    def forever(self) -> Iterator[Batch]:
        """Epoch after epoch, from the current position, without end."""
        while True:
            yield from self

    @property
    def position(self) -> Position:
        """The batch that comes next."""
        return self._position

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Continue there, from the next iteration on. ``step`` may be past the end of the epoch."""
        if epoch < 0 or step < 0:
            raise ValueError(f"position: expected epoch and step of at least 0, got {epoch} and {step}")
        more, step = divmod(step, len(self))
        self._position = Position(epoch + more, step)

    def state_dict(self, gather: Gather = list) -> dict[str, int]:
        """Position, and what it means: seed, number of images, images per step over all ranks.

        It is the same on all ranks: nothing has to be gathered.
        """
        return self.sampler.position_state(*self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was taken; see ``ResumableBatchSampler.restored_position``."""
        self.set_position(*self.sampler.restored_position(state))

    def share_faults(self, gather: Gather) -> dict[str, float]:
        """Tell the other processes of a distributed run which images are bad; all call it together.

        ``gather`` joins the lists of all processes on each of them. Returns figures for the log:
        ``bad_images`` (over all processes), nothing where images cannot be bad. Raises DataError, on every
        process, when they are more than ``max_bad_fraction`` of the set.
        """
        if not isinstance(self.dataset, ImageFolder):
            return {}
        return {"bad_images": float(self.dataset.merge_faults(gather(self.dataset.faults)))}

    def close(self) -> None:
        """Stop the workers now; the next iteration starts new ones. Without it they stop with the loader.

        A failed iteration closes by itself: its traceback and the workers' queues would form a cycle, and a
        DataLoader that the garbage collector finds in one waits five seconds for each worker.
        """
        batches = getattr(self._torch_loader, "_iterator", None)
        if self._torch_loader is not None and batches is not None:
            batches._shutdown_workers()
            self._torch_loader._iterator = None

    def _indexed(self, epoch: int, start: int) -> Iterator[Batch]:
        assert isinstance(self.dataset, InMemoryImages)
        for indices in self.sampler.batches(epoch, start):
            batch = Batch(*self.dataset.batch(epoch, indices))
            yield Batch(batch.images.pin_memory(), batch.labels.pin_memory()) if self._pin else batch

    def _decoded(self, epoch: int, start: int) -> Iterator[Batch]:
        assert isinstance(self.dataset, ImageFolder)
        self._keys.epoch, self._keys.start = epoch, start
        batches: Iterator[tuple[Tensor, Tensor]] = iter(self._torch_loader or ())
        try:
            for images, labels in batches:
                self.dataset.report()
                yield Batch(images, labels)
        except Exception:
            self.close()
            self.dataset.report()  # too many bad images: said here, without the worker's traceback
            raise


class _Keys:
    """Batches of (epoch, index), as torch's DataLoader hands them to workers."""

    def __init__(self, sampler: ResumableBatchSampler) -> None:
        self.sampler, self.epoch, self.start = sampler, 0, 0

    def __len__(self) -> int:
        return len(self.sampler) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for indices in self.sampler.batches(epoch, self.start):
            yield [(epoch, index) for index in indices.tolist()]


class _Collate:
    """torch's own collate; in evaluation a batch may have no good image, and is then [0, C, H, W]."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self, items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        if not items:
            return torch.empty(0, *self.shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        batch: list[Tensor] = default_collate(items)
        return batch[0], batch[1]


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process decides, and stops the workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
