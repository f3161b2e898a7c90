"""Server-style batching: requests of different classes and settings share a batch, and a finished row's place
is refilled.

    server = Server(model, rows=16, precision="bf16")
    ticket = server.submit(207, SamplingSettings(Guidance(2.25), temperature=1.1), seed=7)
    for ticket in server.run():
        images = tokenizer.decode(ticket.tokens[None])

A request's tokens are, bit for bit on the CPU, those that ``model.sample([class_id], ..., seed=seed,
first_image=image)`` gives alone: rows do not see each other. Requests begin in the order in which they were
submitted; one without guidance takes one row of the batch, one with guidance two until its last guided
position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ibq_fast.generator import arguments
from ibq_fast.generator.decoder import Decoder
from ibq_fast.generator.sampler import Batch, Drawing, Request, check_drawn, rows_needed
from ibq_fast.generator.settings import SamplingSettings

if TYPE_CHECKING:
    from ibq_fast.generator.generator import Generator


class Ticket:
    """A submitted request. ``state``: waiting, drawing, finished, failed or cancelled."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = "waiting"
        self._tokens: Tensor | None = None
        self._error: ValueError | None = None

    @property
    def tokens(self) -> Tensor:
        """The image: int64 [rows, columns] on the model's device.

        Raises ValueError when the model had no distribution for it, RuntimeError when it is not finished.
        """
        if self._error is not None:
            raise self._error
        if self._tokens is None:
            raise RuntimeError(f"tokens: expected a finished request, this one is {self.state}")
        return self._tokens


class Server:
    """Draws submitted images on a decoder of ``rows`` rows that is its own.

    ``precision`` of the weights: as in :meth:`Generator.sample`. ``submit`` may be called from any thread,
    everything else from one.
    """

    def __init__(self, model: Generator, rows: int = 16, precision: str | None = None) -> None:
        self.model = model
        self._batch = Batch(Decoder(model, rows, precision=precision))
        self._waiting: deque[Ticket] = deque()
        self._drawing: dict[Drawing, Ticket] = {}

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def drawing(self) -> int:
        """Requests in the batch."""
        return len(self._drawing)

    def submit(
        self, class_id: int, settings: SamplingSettings | None = None, *, seed: int = 0, image: int = 0
    ) -> Ticket:
        """Enter a request for image number ``image`` of the run ``seed``; ``class_id`` may be the null class.

        Raises ValueError for a class that the model does not have, numbers out of range, or more rows than
        there are.
        """
        ids = arguments.sampled_classes([class_id], self.model.config, torch.device("cpu"))
        arguments.check_numbers(seed=seed, image=image)
        settings = SamplingSettings() if settings is None else settings
        needed, rows = rows_needed(settings, self._batch.total), self._batch.decoder.rows
        if needed > rows:
            raise ValueError(f"settings: expected no guidance with {rows} row, got {settings.guidance}")
        ticket = Ticket(Request(int(ids[0]), settings, seed, image))
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request that is waiting or being drawn; others are left as they are."""
        if ticket.state == "waiting":
            self._waiting.remove(ticket)
        elif ticket.state == "drawing":
            drawing = next(d for d, t in self._drawing.items() if t is ticket)
            del self._drawing[drawing]
            self._batch.release(drawing)
        else:
            raise ValueError(f"ticket: expected one that is waiting or drawing, this one is {ticket.state}")
        ticket.state = "cancelled"

    @torch.no_grad()
    def step(self) -> list[Ticket]:
        """Fill free rows and advance every image by a token; returns the tickets that are done now."""
        self._refill()
        finished = self._batch.step()
        done = [self._drawing.pop(drawing) for drawing in finished]
        for drawing, ticket in zip(finished, done, strict=True):
            tokens = self._batch.tokens([drawing])[0]
            try:
                check_drawn(tokens)
            except ValueError as error:
                ticket._error, ticket.state = error, "failed"
            else:
                ticket._tokens, ticket.state = tokens, "finished"
        return done

    def run(self) -> Iterator[Ticket]:
        """Step until nothing waits and nothing is being drawn; yields tickets as they are done."""
        while self._waiting or self._drawing:
            yield from self.step()

    def partial(self, ticket: Ticket) -> Tensor:
        """What is drawn of an image that is in the batch: int64 [rows, columns], -1 where nothing is yet."""
        for drawing, other in self._drawing.items():
            if other is ticket:
                return self._batch.tokens([drawing])[0]
        raise ValueError(f"ticket: expected one that is being drawn, this one is {ticket.state}")

    def _refill(self) -> None:
        free, begun = self._batch.free_rows, []
        while self._waiting:
            needed = rows_needed(self._waiting[0].request.settings, self._batch.total)
            if needed > free:
                break
            free -= needed
            begun.append(self._waiting.popleft())
        if begun:
            for drawing, ticket in zip(self._batch.admit([t.request for t in begun]), begun, strict=True):
                ticket.state = "drawing"
                self._drawing[drawing] = ticket
