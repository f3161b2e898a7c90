"""The decoder: parity with the forward in every precision, rows of their own, bits that depend on nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ibq_fast.generator import Generator
from ibq_fast.generator.decoder import Decoder

BACKENDS = ["native", "composite"]
# Shapes that fit no vector: a head of 12 or 20 channels, an MLP of 37, a vocabulary of 51.
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "mlp_hidden": 37, "vocab_size": 51},
    {"width": 96, "num_heads": 2, "num_kv_heads": 1, "shared_adaln": True},
    {"width": 60, "num_heads": 3, "mlp_hidden": 21, "token_dim": 7},
    {"width": 288, "num_heads": 2, "mlp_hidden": 130, "num_kv_heads": 1, "depth": 1},
    # A head of 64 channels, and more positions than a vector has lanes.
    {"width": 128, "num_heads": 2, "depth": 1, "grid": (5, 7)},
]
CLASSES = torch.tensor([0, 3, 5])
PRECISIONS = ["float32", "bf16", "float16", "int8"]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def decoded(decoder: Decoder, classes: Tensor, tokens: Tensor) -> Tensor:
    """Logits [B, L + 1, V] of given tokens [B, L], one position after the other."""
    rows = classes.shape[0]
    decoder.admit(torch.arange(rows), classes)
    steps = []
    for position in range(tokens.shape[1] + 1):
        positions = torch.full((rows,), position)
        hidden = decoder.step(decoder.inputs(tokens[:, position - 1], positions), positions)
        steps.append(decoder.logits(hidden))
    return torch.stack(steps, dim=1)


def rounded(model: Generator, precision: str) -> Generator:
    """A copy with the weights that the precision makes, in the dtype that eager code would use."""
    other = copy.deepcopy(model)
    if precision in ("bf16", "float16"):
        return other.to({"bf16": torch.bfloat16, "float16": torch.float16}[precision])
    if precision == "int8":
        layers = [layer for block in other.layers() for layer in (block.attention, block.mlp)]
        for weight in [other.head.weight, *(p for layer in layers for p in layer.parameters())]:
            scale = weight.detach().abs().amax(dim=1, keepdim=True) / 127
            weight.data = (weight / scale).round() * scale
    return other


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SHAPES, ids=str)
@torch.no_grad()
def test_float32_equals_the_full_forward_at_every_position(
    make_generator: Callable[..., Generator], settings: dict[str, Any], backend: str
) -> None:
    model = make_generator(**settings)
    tokens = torch.randint(0, 50, (3, model.config.num_tokens - 1))
    got, full = decoded(Decoder(model, 3, backend=backend), CLASSES, tokens), model(tokens, CLASSES)
    assert (got - full).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SHAPES[1:4], ids=str)
@torch.no_grad()
def test_errors_are_at_most_twice_those_of_eager_code(
    make_generator: Callable[..., Generator], settings: dict[str, Any], backend: str, precision: str
) -> None:
    """Against float64 on the weights as the precision has them; adaLN and embeddings keep their dtype."""
    model = make_generator(**settings)
    if precision in ("bf16", "float16"):
        model = rounded(model, precision)
    tokens = torch.randint(0, 50, (3, 11))
    eager = rounded(model, precision)
    truth = copy.deepcopy(eager).double()(tokens, CLASSES)
    allowed = 2 * (eager(tokens, CLASSES).double() - truth).norm() + 4 * 2**-23 * truth.norm()
    got = decoded(Decoder(model, 3, precision=precision, backend=backend), CLASSES, tokens)
    assert got.dtype == torch.float32
    assert (got.double() - truth).norm() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@torch.no_grad()
def test_rows_stand_where_they_are_idle_or_are_refilled(
    make_generator: Callable[..., Generator], backend: str, precision: str
) -> None:
    """Three sequences start at different steps, one pauses, and one slot is used twice."""
    model = make_generator(num_kv_heads=2)
    classes, tokens = torch.tensor([1, 2, 4, 0]), torch.randint(0, 50, (4, 11))
    alone = torch.cat(
        [
            decoded(
                Decoder(model, 1, precision=precision, backend=backend), classes[i : i + 1], tokens[i : i + 1]
            )
            for i in range(4)
        ]
    )
    decoder = Decoder(model, 3, precision=precision, backend=backend)
    decoder.cache.fill_(torch.nan)
    serves, at = [0, 1, 2], [0, -1, -3]
    for step in range(20):
        if step == 12:
            serves[0], at[0] = 3, 0
        for slot in range(3):
            if at[slot] == 0:
                decoder.admit(torch.tensor([slot]), classes[[serves[slot]]])
        paused = step == 6
        here = [-1 if paused and slot == 1 else min(place, 12) for slot, place in enumerate(at)]
        positions = torch.tensor([place if place < 12 else -1 for place in here])
        fed = torch.tensor([tokens[serves[slot], max(here[slot] - 1, 0) % 11] for slot in range(3)])
        hidden = decoder.step(decoder.inputs(fed, positions), positions)
        logits = decoder.logits(hidden)
        for slot, place in enumerate(positions.tolist()):
            if place < 0:
                assert not bool(hidden[slot].any())
            elif backend == "native":
                assert torch.equal(logits[slot], alone[serves[slot], place])
            else:
                tolerance = 1e-5 if precision == "float32" else 0.1
                assert_close(logits[slot], alone[serves[slot], place], rtol=tolerance, atol=tolerance)
        at = [place + (not (paused and slot == 1)) for slot, place in enumerate(at)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.usefixtures("two_threads")
@torch.no_grad()
def test_native_bits_depend_on_neither_batch_nor_threads(
    make_generator: Callable[..., Generator], precision: str
) -> None:
    model = make_generator(width=96, num_heads=2, mlp_hidden=130, vocab_size=777, token_dim=40)
    classes, tokens = torch.arange(64) % 6, torch.randint(0, 777, (64, 5))
    runs = []
    for threads, batch in ((1, 64), (2, 64), (2, 1), (1, 7), (2, 13)):
        torch.set_num_threads(threads)
        decoder = Decoder(model, batch, precision=precision, backend="native")
        runs.append(
            torch.cat(
                [decoded(decoder, classes[i : i + batch], tokens[i : i + batch]) for i in range(0, 64, batch)]
            )
        )
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    assert len({row.numpy().tobytes() for row in runs[0][:, -1]}) == 64


@torch.no_grad()
def test_changed_weights_make_a_new_decoder(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    first = model.decoder(2, "int8")
    assert model.decoder(1, "int8") is first
    assert model.decoder(3, "int8") is not first
    kept = model.decoder(2)
    assert kept.precision == "float32"
    assert kept.weights[0].data_ptr() == model.layers()[0].attention.qkv.weight.data_ptr()
    model.head.weight.mul_(2)
    assert model.decoder(2) is not kept


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d: d.step(torch.zeros(3, 32), torch.zeros(3, dtype=torch.long)),
            r"x: expected \[M, 32\] with M",
        ),
        (lambda d: d.step(torch.zeros(2, 31), torch.zeros(2, dtype=torch.long)), r"x: expected \[M, 32\]"),
        (
            lambda d: d.step(torch.zeros(2, 32).double(), torch.zeros(2, dtype=torch.long)),
            "x: expected torch.f",
        ),
        (lambda d: d.step(torch.zeros(2, 32), torch.zeros(2)), r"positions: expected int64 \[2\]"),
        (
            lambda d: d.step(torch.zeros(2, 32), torch.tensor([0, 12])),
            "positions: expected values below 12, got",
        ),
        (lambda d: d.admit(torch.tensor([0]), torch.tensor([0, 1])), r"class_ids: expected \[1\] as slots"),
        (lambda d: d.logits(torch.zeros(1, 31)), r"weight: expected \[N, C\] beside x \[M, C\]"),
        (lambda d: Decoder(d.model, 0), "rows: expected a positive integer, got 0"),
        (lambda d: Decoder(d.model, 1, precision="int4"), "precision: expected one of float32, bf16,"),
        (lambda d: Decoder(d.model, 1, backend="cupy").logits(torch.zeros(1, 32)), "'cupy' .* cannot serve"),
    ],
)
def test_bad_input_is_refused(
    make_generator: Callable[..., Generator], call: Callable[[Decoder], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(Decoder(make_generator(), 2))
