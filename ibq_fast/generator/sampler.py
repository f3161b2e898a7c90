"""Drawing images in step: rows of a decoder, guidance, the choice of a token.

Everything that samples goes through :class:`Batch`: :meth:`Generator.sample` and ``generate`` fill it once,
the server refills it. Its images may differ in class, settings, seed and position, and what one of them
becomes does not depend on the others.

Guidance combines hidden vectors, not logits: the head is linear, so
head(u + s (c - u)) = head(u) + s (head(c) - head(u)), and one product with the vocabulary serves both. A
guided image takes two of the decoder's rows; the second is given back after the last guided position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_fast.generator.decoder import Decoder
from ibq_fast.generator.settings import SamplingSettings
from ibq_fast.ops import choose_tokens


class Request(NamedTuple):
    """An image to draw: its random numbers depend on ``seed`` and its number ``image`` alone."""

    class_id: int
    settings: SamplingSettings
    seed: int
    image: int


class Partial(NamedTuple):
    """``tokens`` int64 [B, rows, columns] after ``done`` of ``total`` positions, -1 where none is drawn."""

    done: int
    total: int
    tokens: Tensor


@dataclass(eq=False)
class Drawing:
    """An image in a batch: its rows of the decoder and where it stands."""

    request: Request
    scales: list[float]
    row: int
    null_row: int | None
    begun: int
    """The batch's step at which it was admitted."""


def rows_needed(settings: SamplingSettings, positions: int) -> int:
    """Rows of a decoder that an image of ``positions`` tokens takes."""
    return 2 if settings.guidance_scales(positions) else 1


class Batch:
    """Images that advance one token a step on ``decoder``, which belongs to the batch meanwhile."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.total = decoder.model.config.num_tokens
        self.drawings: list[Drawing] = []
        self._free = list(range(decoder.rows))
        self._steps = 0
        self._quiet = 0  # steps until an image is finished or gives a row back
        # Positions stay on the CPU, where the decoder looks at them.
        self._positions = torch.full((decoder.rows,), -1)
        self._inputs = torch.zeros(decoder.rows, dtype=torch.int64, device=decoder.device)
        self._tokens = torch.full((decoder.rows, self.total), -1, device=decoder.device)

    @property
    def free_rows(self) -> int:
        """Rows of the decoder that no image occupies."""
        return len(self._free)

    def admit(self, requests: Sequence[Request]) -> list[Drawing]:
        """Begin these images, which need no more than ``free_rows`` together."""
        begun = []
        for request in requests:
            scales = request.settings.guidance_scales(self.total)
            row = self._free.pop(0)
            begun.append(Drawing(request, scales, row, self._free.pop(0) if scales else None, self._steps))
        null = self.decoder.model.null_class
        rows = [d.row for d in begun] + [d.null_row for d in begun if d.null_row is not None]
        classes = [d.request.class_id for d in begun] + [null] * (len(rows) - len(begun))
        slots = torch.tensor(rows, dtype=torch.int64)
        self.decoder.admit(slots, torch.tensor(classes, dtype=torch.int64))
        self._positions[slots] = 0
        self._tokens[slots.to(self.decoder.device)] = -1
        self.drawings += begun
        self._arrange()
        return begun

    def step(self) -> list[Drawing]:
        """Draw the next token of every image; returns those that are finished, which have left the batch."""
        if not self.drawings:
            return []
        decoder, at = self.decoder, self._rows
        positions, inputs = self._positions[: self._width], self._inputs[: self._width]
        hidden = decoder.advance(inputs, positions)
        where = positions.index_select(0, self._rows_here)
        if len(self._null_rows):
            scale = self._scales.gather(1, where.index_select(0, self._guided_here).unsqueeze(1))
            scale = scale.to(decoder.device)
            conditional = hidden.index_select(0, self._guided_rows)
            null = hidden.index_select(0, self._null_rows)
            # Three roundings, the same in any batch: a fused lerp's would depend on the shapes.
            mixed = torch.where(scale > 1, null + scale * (conditional - null), conditional)
            hidden.index_copy_(0, self._guided_rows, mixed)
        here = where.to(decoder.device)
        logits = decoder.logits(hidden.index_select(0, at))
        tokens = choose_tokens(logits, position=here, **self._settings)
        self._tokens[at, here] = tokens
        following = tokens.clamp_min(0)  # -1: no distribution; what follows does not matter
        self._inputs.index_copy_(0, at, following)
        if len(self._null_rows):
            self._inputs.index_copy_(0, self._null_rows, following.index_select(0, self._guided))
        self._positions += self._advance
        self._steps += 1
        self._quiet -= 1
        return self._settle() if self._quiet == 0 else []

    def position(self, drawing: Drawing) -> int:
        """Tokens drawn of an image that is in the batch."""
        return self._steps - drawing.begun

    def tokens(self, drawings: Sequence[Drawing]) -> Tensor:
        """What is drawn of these images: int64 [n, rows, columns] on the decoder's device, -1 elsewhere.

        A finished image's row keeps its tokens until the next ``admit``. -1 in a finished image: the model
        had no distribution there (a NaN or an infinity).
        """
        return self.tokens_of(_integers([d.row for d in drawings]).to(self.decoder.device))

    def tokens_of(self, rows: Tensor) -> Tensor:
        """The same of the images in these rows of the decoder, int64 [n] on its device."""
        return self._tokens.index_select(0, rows).unflatten(1, self.decoder.model.config.grid)

    def release(self, drawing: Drawing) -> None:
        """Take an unfinished image out."""
        self._leave(drawing)
        self._arrange()

    def _settle(self) -> list[Drawing]:
        finished = [d for d in self.drawings if self.position(d) == self.total]
        for drawing in finished:
            self._leave(drawing)
        for drawing in self.drawings:
            if drawing.null_row is not None and self.position(drawing) >= len(drawing.scales):
                self._give_back(drawing.null_row)
                drawing.null_row = None
        self._arrange()
        return finished

    def _leave(self, drawing: Drawing) -> None:
        self.drawings.remove(drawing)
        self._give_back(drawing.row)
        if drawing.null_row is not None:
            self._give_back(drawing.null_row)

    def _give_back(self, row: int) -> None:
        self._positions[row] = -1
        self._free.append(row)
        self._free.sort()

    def _arrange(self) -> None:
        """What stays the same from step to step until images come or go."""
        drawings, device = self.drawings, self.decoder.device
        guided = [i for i, d in enumerate(drawings) if d.null_row is not None]
        rows = [d.row for d in drawings]
        null_rows = [drawings[i].null_row for i in guided]
        self._width = 1 + max([*rows, *(row for row in null_rows if row is not None)], default=-1)
        self._rows_here, self._guided_here = _integers(rows), _integers(guided)
        self._rows, self._guided = self._rows_here.to(device), self._guided_here.to(device)
        self._guided_rows, self._null_rows = self._rows[self._guided], _integers(null_rows).to(device)
        scales = [drawings[i].scales + [1.0] * (self.total - len(drawings[i].scales)) for i in guided]
        self._scales = torch.tensor(scales, dtype=self.decoder.dtype).reshape(len(guided), self.total)
        self._advance = (self._positions >= 0).to(torch.int64)
        settings = [d.request.settings for d in drawings]
        self._settings: dict[str, Any] = {
            "temperature": torch.tensor([s.temperature for s in settings], dtype=torch.float32).to(device),
            "top_k": _integers([s.top_k for s in settings]).to(device),
            "top_p": torch.tensor([s.top_p for s in settings], dtype=torch.float32).to(device),
            "seed": _integers([d.request.seed for d in drawings]).to(device),
            "image": _integers([d.request.image for d in drawings]).to(device),
            "filtered": any(s.top_k > 0 or s.top_p < 1 for s in settings),
        }
        events = [self.total - self.position(d) for d in drawings]
        events += [len(drawings[i].scales) - self.position(drawings[i]) for i in guided]
        self._quiet = min(events, default=0)


def generate(decoder: Decoder, requests: Sequence[Request]) -> Iterator[Partial]:
    """Draw these images together, and say after every position what is there.

    Raises ValueError when the model has no distribution somewhere: looked at once, after the last position,
    since every look would make an accelerator wait.
    """
    batch = Batch(decoder)
    rows = _integers([d.row for d in batch.admit(requests)]).to(decoder.device)
    for done in range(1, batch.total + 1):
        batch.step()
        tokens = batch.tokens_of(rows)
        if done == batch.total:
            check_drawn(tokens)
        yield Partial(done, batch.total, tokens)


def check_drawn(tokens: Tensor) -> None:
    """Raises ValueError when a finished image lacks a token."""
    if bool((tokens < 0).any()):
        raise ValueError("model: expected finite logits, got NaN or infinity")


def _integers(values: Sequence[int | None]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
