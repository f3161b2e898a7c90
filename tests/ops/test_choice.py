"""choose_tokens: the sort-based definition without a sort, per row, and what is no distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ibq_fast.ops import choice, choose_tokens
from ibq_fast.ops.filtering import filter_logits
from ibq_fast.ops.philox import gumbel


def rows(count: int, **given: Any) -> dict[str, Tensor]:
    """Settings of ``count`` rows: numbers for all, or tensors; images are counted up."""
    plain = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "image": torch.arange(count),
        "position": 0,
    }
    floats = ("temperature", "top_p")
    return {
        name: torch.as_tensor(value, dtype=torch.float32 if name in floats else torch.int64)
        .expand(count)
        .contiguous()
        for name, value in (plain | {"position": 0} | given).items()
    }


def borderline(x: Tensor, top_k: int, top_p: float) -> bool:
    """Whether some code's mass before it is within rounding of top_p."""
    kept = filter_logits(x, top_k).double()
    before = kept.sort(dim=-1, descending=True).values.softmax(-1).cumsum(-1)
    share = float(torch.tensor(top_p, dtype=torch.float32))
    return bool(((before - share).abs() < 1e-9).any())


# Few distinct values make ties; the wide ones leave float32's range of exp, and both signs and zeros occur.
VALUES = st.one_of(
    st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 0.5000001, 2.0, -torch.inf]),
    st.floats(-8, 8, width=32),
    st.floats(-1e4, 1e4, width=32),
)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(VALUES, min_size=1, max_size=80),
    temperature=st.sampled_from([1.0, 0.3, 0.7, 1.1, 7.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 5, 17, 40, 79, 80, 500]),
    top_p=st.sampled_from([1.0, 1e-6, 0.1, 0.37, 0.9, 0.999, 1 - 2**-24]),
    seed=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**62),
    position=st.integers(0, 2**32 - 1),
)
def test_tokens_are_those_of_the_definition(logits, temperature, top_k, top_p, seed, first, position) -> None:
    row = torch.tensor(logits, dtype=torch.float32)
    assume(bool(torch.isfinite(row).any()))
    assume(top_p == 1 or not borderline(row[None] / torch.tensor(temperature), top_k, top_p))
    settings_ = rows(
        32, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, image=first + torch.arange(32)
    ) | {"position": torch.full((32,), position)}
    expected = choice.reference(row.expand(32, -1), **settings_, filtered=True)
    assert torch.equal(choose_tokens(row.expand(32, -1), **settings_), expected)


@pytest.mark.parametrize("codes", [16384, 262144])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (600, 1.0), (0, 0.92), (3000, 0.8), (1, 1.0)], ids=str
)
def test_large_vocabularies(codes: int, top_k: int, top_p: float) -> None:
    logits = torch.randn(4, codes, generator=torch.Generator().manual_seed(codes)) * torch.tensor(
        [[0.1], [1], [3], [9]]
    )
    given = rows(4, top_k=top_k, top_p=top_p, temperature=1.3, image=2**40 + torch.arange(4), position=255)
    assert torch.equal(choose_tokens(logits, **given), choice.reference(logits, **given, filtered=True))


def test_every_row_has_its_own_settings_and_no_neighbours(backend: str) -> None:
    count = 40
    generator = torch.Generator().manual_seed(0)

    def among(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]

    logits = torch.randn(count, 333, generator=generator)
    given = rows(
        count,
        temperature=among(0.5, 1.0, 2.0),
        top_k=among(0, 1, 7, 100),
        top_p=among(0.3, 0.9, 1.0),
        seed=among(0, 5),
        position=among(0, 3, 200),
    )
    together = choose_tokens(logits, **given, backend=backend)
    assert torch.equal(together, choice.reference(logits, **given, filtered=True))
    for i in range(0, count, 7):
        alone = {name: value[i : i + 1] for name, value in given.items()}
        assert choose_tokens(logits[i : i + 1], **alone, backend=backend).tolist() == [int(together[i])]


def test_equal_codes_at_the_boundary(backend: str) -> None:
    """top_k keeps all that equal the k-th; top_p takes equals one by one, the lowest code first."""
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0]).expand(400, -1)

    def drawn(**given: Any) -> list[int]:
        return choose_tokens(logits, **rows(400, **given), backend=backend).unique().tolist()

    assert drawn(top_k=2) == [1, 2, 4]
    assert drawn(top_k=4) == [0, 1, 2, 4]
    assert drawn(top_p=0.3) == [1, 2]
    assert drawn(top_p=0.28) == [1]
    assert drawn(top_k=1) == [1]
    assert drawn() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("given", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_a_row_that_is_no_distribution_gives_minus_one(bad: float, given: dict, backend: str) -> None:
    logits = torch.zeros(3, 70)
    logits[1] = bad
    if bad != -torch.inf:
        logits[1, :69] = 0
    tokens = choose_tokens(logits, **rows(3, **given), backend=backend)
    assert (tokens < 0).tolist() == [False, True, False]


@pytest.mark.parametrize("codes", [1, 3, 31, 32, 33, 1000])
def test_excluded_codes_are_never_drawn_and_certain_ones_always(codes: int, backend: str) -> None:
    logits = torch.full((50, codes), -torch.inf)
    logits[:, codes - 1] = -4000.0
    assert choose_tokens(logits, **rows(50, top_p=0.9), backend=backend).unique().tolist() == [codes - 1]


def test_noise_is_evaluated_down_to_the_last_code_that_can_win() -> None:
    """4,096 codes whose logits are 13 below the largest win 1 % of the draws together: by large noise."""
    logits = torch.full((4_000, 4097), -13.0)
    logits[:, 0] = 0.0
    given = rows(4_000, seed=3)
    tokens = choose_tokens(logits, **given)
    assert torch.equal(tokens, choice.composite(logits, **given, filtered=False))
    share = 4096 * torch.exp(torch.tensor(-13.0)).item()
    assert abs(float((tokens > 0).double().mean()) - share / (1 + share)) < 4 * (share / 4_000) ** 0.5


def test_float32_noise_where_there_is_no_float64() -> None:
    many = {name: torch.arange(100) for name in ("seed", "image", "position")}
    wide, narrow = (gumbel(**many, num_codes=999, dtype=dtype) for dtype in (torch.float64, torch.float32))
    large = wide > -2
    torch.testing.assert_close(narrow[large].double(), wide[large], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("namespace", ["ibq_fast", "ibq_fast_composite"])
def test_opcheck(namespace: str) -> None:
    overload = getattr(getattr(torch.ops, namespace), choice.NAME).default
    given = rows(5, top_k=3, top_p=0.9)
    logits = torch.randn(5, 40, requires_grad=True)
    torch.library.opcheck(overload, (logits, *given.values(), True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2)}, r"logits: expected float \[B, V\], V ≥ 1, got torch.float32 \[2\]"),
        ({"logits": torch.zeros(2, 0)}, r"logits: expected float \[B, V\]"),
        ({"logits": torch.zeros(2, 3).long()}, r"logits: expected float"),
        ({"top_k": torch.zeros(2)}, r"top_k: expected torch.int64 \[2\], one a row, got torch.float32 \[2\]"),
        (
            {"top_p": torch.ones(3)},
            r"top_p: expected torch.float32 \[2\], one a row, got torch.float32",
        ),
        ({"seed": torch.zeros(2).long().to("meta")}, "seed: expected device cpu like logits, got meta"),
        ({"backend": "triton"}, "'triton' .the backend argument. cannot serve choose_tokens"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_tokens(**({"logits": torch.zeros(2, 3)} | rows(2) | change))
