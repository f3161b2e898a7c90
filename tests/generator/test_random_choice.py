"""The noise, the filter and the draw: published vectors, the reference's numbers, chi-squared on counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_fast.generator import filter_logits
from ibq_fast.ops import choice, choose_tokens, philox, set_backend
from ibq_fast.ops.philox import philox_4x32

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert tuple(int(word) for word in philox_4x32((c0, c1, c2, c3), key)) == words


def gumbel(seed: int, images: Tensor, position: int, codes: int) -> Tensor:
    return choice.gumbel(torch.full_like(images, seed), images, torch.full_like(images, position), codes)


def test_noise_is_a_function_of_seed_image_position_and_code() -> None:
    images = torch.tensor([0, 1, 2**32, 2**40 + 5])
    noise = gumbel(5, images, 3, 101)
    assert noise.shape == (4, 101)
    assert noise.dtype == torch.float64
    assert torch.equal(gumbel(5, images[[3, 1]], 3, 50), noise[[3, 1], :50])
    others = (gumbel(6, images, 3, 101), gumbel(5 + 2**32, images, 3, 101), gumbel(5, images, 4, 101))
    for other in (*others, noise.roll(1, 0), noise.roll(1, 1)):
        assert float((other == noise).float().mean()) < 0.01


def test_noise_is_standard_gumbel_and_finite() -> None:
    noise = gumbel(1, torch.arange(100), 0, 10_000)
    assert bool(torch.isfinite(noise).all())
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * math.pi / math.sqrt(6e6)
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    ordered = noise.flatten().sort().values
    expected = (torch.arange(1, 1_000_001) - 0.5) / 1e6
    assert float(((-(-ordered).exp()).exp() - expected).abs().max()) < 1.95 / 1000  # Kolmogorov, p = 0.001


def test_filter_matches_the_reference(golden: Callable[[str], Any]) -> None:
    reference = golden("filtering.pt")
    before = reference["logits"].clone()
    for case in reference["cases"]:
        filtered = filter_logits(reference["logits"], case["top_k"], case["top_p"])
        assert torch.equal(filtered, case["filtered"]), (case["top_k"], case["top_p"])
    assert torch.equal(reference["logits"], before)


def test_filter_keeps_ties_with_the_kth_and_always_the_largest() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert torch.isfinite(filter_logits(logits, top_k=1)).tolist() == [[False, True, True, False]]
    assert torch.isfinite(filter_logits(logits, top_p=1e-6)).sum() == 1


DRAWS = 1_000_000
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.3, 0.0, -0.5, -1.0, -2.0, -3.0])


def draw(temperature: float, top_k: int, top_p: float, seed: int = 0, count: int = DRAWS) -> Tensor:
    return choose_tokens(
        LOGITS.expand(count, -1),
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        seed=torch.full((count,), seed),
        image=torch.arange(count),
        position=torch.full((count,), 7),
        filtered=top_k > 0 or top_p < 1,
    )


def chi_squared_p(tokens: Tensor, probabilities: Tensor) -> float:
    """The p-value of the counts under ``probabilities``; 0 if anything of probability zero was drawn."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    if counts[~possible].sum() > 0:
        return 0.0
    expected = probabilities[possible].double() * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def probabilities(temperature: float, top_k: int, top_p: float) -> Tensor:
    return filter_logits(LOGITS[None] / temperature, top_k, top_p)[0].double().softmax(-1)


SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.6, 0, 1.0),
    (1.0, 3, 1.0),
    (0.8, 7, 1.0),
    (1.0, 0, 0.8),
    (1.5, 0, 0.95),
    (1.3, 6, 0.9),
    (0.6, 8, 0.97),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS, ids=str)
def test_a_million_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    tokens = draw(temperature, top_k, top_p)
    assert chi_squared_p(tokens, probabilities(temperature, top_k, top_p)) > 0.001


@pytest.mark.parametrize(
    "slightly_wrong",
    [(1.015, 0, 1.0), (1.0, 9, 1.0), (1.0, 0, 0.995), (1.0, 8, 0.99)],
    ids=["temperature 1.5 % off", "top-k off by one", "top-p drops the last code", "both"],
)
def test_a_million_draws_tell_slightly_wrong_settings(slightly_wrong: tuple[float, int, float]) -> None:
    """The power of the test above: what is wrong by this little is rejected beyond any doubt."""
    wrong, right = probabilities(*slightly_wrong), probabilities(1.0, 0, 1.0)
    assert float((wrong - right).abs().max()) < 0.02
    assert chi_squared_p(draw(*slightly_wrong), right) < 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        lambda noise: noise * 1.03,
        lambda noise: (noise * 8).round() / 8,
        lambda noise: torch.where(noise > 5, 5.0, noise),
    ],
    ids=["scaled by 3 %", "coarse: ties go to the lowest code", "clipped tail"],
)
def test_wrong_noise_is_rejected(
    wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, forced_composite: None
) -> None:
    monkeypatch.setattr(choice, "gumbel", lambda *arguments: wrong(philox.gumbel(*arguments)))
    assert chi_squared_p(draw(1.0, 0, 1.0, count=200_000), LOGITS.double().softmax(-1)) < 1e-6


@pytest.fixture
def forced_composite() -> Iterator[None]:
    set_backend("composite")
    yield
    set_backend(None)


def test_draws_of_neighbouring_images_positions_and_seeds_are_independent() -> None:
    first = draw(1.0, 0, 1.0)
    p = LOGITS.double().softmax(-1)
    joint = (p[:, None] * p[None]).flatten()
    assert chi_squared_p(first[:-1:2] * 10 + first[1::2], joint) > 0.001
    assert chi_squared_p(first * 10 + draw(1.0, 0, 1.0, seed=1), joint) > 0.001
