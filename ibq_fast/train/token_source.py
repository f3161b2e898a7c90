"""Where a generator's training takes its tokens from: a cache, or images that are encoded at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from accelerate.utils import gather_object
from torch import Tensor

from ibq_fast.data import DataConfig, Loader, ResumableBatchSampler, build_loader
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train.token_cache import TokenCache, encode_images


class TokenSource(Protocol):
    """Batches without end, from a position that is saved and taken up again.

    ``classes``: how many there are (None: not known beforehand); ``batches``: of a process in an epoch (None:
    not known).
    """

    classes: int | None
    batches: int | None

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L] on any device and labels int64 [B] on the CPU."""
        ...

    def figures(self) -> dict[str, float]:
        """What the log is to say; all processes call it together."""
        ...

    def state(self) -> dict[str, Any]:
        """The position; all processes call it together."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ValueError for a position in data of another kind."""
        ...


class CachedTokens:
    """Batches from a cache, shuffled anew in every epoch; positions are those of image folders too."""

    def __init__(self, cache: TokenCache, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.classes: int | None = len(cache.classes)
        self._cache = cache
        self._sampler = ResumableBatchSampler(
            len(cache), batch_size, seed=seed, rank=rank, world_size=world_size
        )
        self.batches: int | None = len(self._sampler)
        self._position = (0, 0)  # epoch and step of the batch that comes next

    def next(self) -> tuple[Tensor, Tensor]:
        epoch, step = self._position
        self._position = (epoch, step + 1) if step + 1 < len(self._sampler) else (epoch + 1, 0)
        return self._cache.batch(epoch, self._sampler.batch(epoch, step), self._sampler.seed)

    def figures(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return self._sampler.position_state(*self._position)

    def load_state(self, state: dict[str, Any]) -> None:
        self._position = _restored(self._sampler.restored_position, state)


class EncodedImages:
    """Images cropped and flipped as in a tokenizer's training, and encoded when their step comes."""

    def __init__(self, tokenizer: Tokenizer, data: DataConfig, seed: int, rank: int, world_size: int) -> None:
        self._tokenizer = tokenizer
        self._loader = build_loader(data, "train", seed=seed, rank=rank, world_size=world_size)
        numbered = self._loader if isinstance(self._loader, Loader) else None
        self.classes = None if numbered is None else len(numbered.dataset.classes)
        self.batches = None if numbered is None else len(numbered)
        self._images: Iterator[tuple[Tensor, Tensor]] = self._loader.forever()

    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = next(self._images)
        return encode_images(self._tokenizer, images), labels

    def figures(self) -> dict[str, float]:
        return self._loader.share_faults(gather_object)

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict(gather_object)

    def load_state(self, state: dict[str, Any]) -> None:
        _restored(self._loader.load_state_dict, state)
        self._images = self._loader.forever()


def _restored(load: Callable[[dict[str, Any]], Any], state: dict[str, Any]) -> Any:
    try:
        return load(state)
    except KeyError as error:
        raise ValueError(
            f"cache: expected none for tar shards exactly as when the checkpoint was written; its position "
            f"in the data has {', '.join(sorted(state))}, not {error}"
        ) from error
