"""Requests of all kinds in one batch: each gets what it would get alone, and places are refilled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ibq_fast.generator import Generator, Guidance, SamplingSettings, Server, Ticket

SETTINGS = [
    SamplingSettings(),
    SamplingSettings(Guidance(2.0), temperature=1.1),
    SamplingSettings(top_k=5),
    SamplingSettings(Guidance(3.0, "interval", start=0.1, stop=0.5), top_p=0.8),
    SamplingSettings(Guidance(1.5), top_k=1),
    SamplingSettings(Guidance(4.0, "power-cosine", power=2.0), temperature=0.7, top_k=9, top_p=0.9),
]


def alone(model: Generator, ticket: Ticket, precision: str | None = None) -> torch.Tensor:
    request, s = ticket.request, ticket.request.settings
    return model.sample(
        [request.class_id],
        s.guidance,
        s.temperature,
        s.top_k,
        s.top_p,
        request.seed,
        first_image=request.image,
        precision=precision,
    )[0]


@pytest.mark.parametrize(
    ("rows", "precision"), [(2, None), (3, None), (5, "bf16"), (5, "int8"), (40, None)], ids=str
)
def test_a_request_gets_what_it_would_get_alone(
    make_generator: Callable[..., Generator], rows: int, precision: str | None
) -> None:
    model = make_generator()
    server = Server(model, rows, precision)
    tickets = [server.submit(i % 6, SETTINGS[i % len(SETTINGS)], seed=i // 3, image=7 * i) for i in range(20)]
    for _ in range(5):
        server.step()
    tickets += [server.submit(4, SETTINGS[1], image=i) for i in range(3)]
    late = list(server.run())
    assert (server.waiting, server.drawing) == (0, 0)
    assert {id(t) for t in tickets} >= {id(t) for t in late}
    assert {t.state for t in tickets} == {"finished"}
    for ticket in tickets:
        assert torch.equal(ticket.tokens, alone(model, ticket, precision)), ticket.request


def test_a_place_is_refilled_at_once_and_a_guided_image_gives_its_second_row_back(
    make_generator: Callable[..., Generator],
) -> None:
    server = Server(make_generator(), rows=3)
    short = SamplingSettings(Guidance(3.0, "interval", stop=0.5))  # guided at 6 of 12 positions
    first, second, third, fourth = (
        server.submit(i, s) for i, s in enumerate([short, SETTINGS[0], *[short] * 2])
    )
    states = []
    for _ in range(12):
        server.step()
        states.append((first.state, second.state, third.state, fourth.state))
    assert states[0] == ("drawing", "drawing", "waiting", "waiting")
    assert states[10] == ("drawing", "drawing", "waiting", "waiting")
    assert states[11] == ("finished", "finished", "waiting", "waiting")
    server.step()
    assert (third.state, fourth.state) == ("drawing", "waiting")
    for _ in range(6):
        server.step()
    assert fourth.state == "drawing"  # rows 1 of the third and 2 of the fourth
    assert len(list(server.run())) == 2


def test_partial_images_and_cancelling(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    server = Server(model, rows=4)
    kept, dropped, waiting = (server.submit(i, SETTINGS[1], seed=i) for i in range(3))
    for _ in range(4):
        server.step()
    whole = alone(model, kept).flatten()
    assert torch.equal(server.partial(kept).flatten(), torch.cat((whole[:4], torch.full((8,), -1))))
    server.cancel(dropped)
    after = server.submit(3, SETTINGS[0])
    server.step()
    assert waiting.state == "drawing"
    server.cancel(after)
    assert [t.state for t in server.run()] == ["finished"] * 2
    assert torch.equal(kept.tokens.flatten(), whole)
    assert torch.equal(waiting.tokens, alone(model, waiting))
    for ticket in (kept, dropped, after):
        with pytest.raises(ValueError, match="ticket: expected one that is waiting or drawing, this one is"):
            server.cancel(ticket)
    with pytest.raises(ValueError, match="ticket: expected one that is being drawn, this one is finished"):
        server.partial(kept)
    with pytest.raises(RuntimeError, match="expected a finished request, this one is cancelled"):
        _ = dropped.tokens


def test_one_request_that_fails_leaves_the_others_alone(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    with torch.no_grad():
        model.class_embedding.weight[2] = torch.nan
    server = Server(model, rows=6)
    good, bad, last = (server.submit(c, SETTINGS[1]) for c in (1, 2, 3))
    assert {t.state for t in server.run()} == {"finished", "failed"}
    with pytest.raises(ValueError, match="model: expected finite logits"):
        _ = bad.tokens
    for ticket in (good, last):
        assert torch.equal(ticket.tokens, alone(model, ticket))


def test_wrong_requests_are_refused(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    server = Server(model, rows=1)
    with pytest.raises(ValueError, match=r"class_ids: expected values in \[0, 5\], got 6 to 6"):
        server.submit(6)
    with pytest.raises(ValueError, match="settings: expected no guidance with 1 row, got Guidance"):
        server.submit(0, SETTINGS[1])
    with pytest.raises(ValueError, match="seed: expected an integer"):
        server.submit(0, seed=-1)
    with pytest.raises(ValueError, match="rows: expected a positive integer, got 0"):
        Server(model, rows=0)
    with pytest.raises(ValueError, match="precision: expected one of"):
        Server(model, precision="fp4")
    assert server.step() == []
