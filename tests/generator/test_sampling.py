"""Sampling from a generator: the cache, guidance, determinism, independence of the batch, arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ibq_fast.generator import PRESETS, Generator, Guidance, SamplingSettings, sampler
from ibq_fast.generator import decoder as decoder_module
from ibq_fast.generator.decoder import Decoder
from ibq_fast.ops import choose_tokens
from ibq_fast.ops.skinny_linear import skinny_linear

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1},
    {"shared_adaln": True},
    {"token_dim": 24},
]
CLASSES = torch.tensor([0, 3, 5])


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_at_every_step(
    make_generator: Callable[..., Generator], settings: dict[str, Any]
) -> None:
    model = make_generator(**settings)
    tokens = torch.randint(0, 50, (3, 11))
    full = model(tokens, CLASSES)
    decoder = Decoder(model, 3)
    decoder.admit(torch.arange(3), CLASSES)
    for position in range(12):
        positions = torch.full((3,), position)
        x = decoder.inputs(tokens[:, position - 1], positions)
        assert_close(decoder.logits(decoder.step(x, positions)), full[:, position], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("cfg_scale", [None, 0.0, 1.0, 1.5, 4.0])
@torch.no_grad()
def test_greedy_equals_the_uncached_loop_with_guidance_in_logit_space(
    make_generator: Callable[..., Generator], settings: dict[str, Any], cfg_scale: float | None
) -> None:
    model = make_generator(**settings)
    tokens = torch.zeros(3, 0, dtype=torch.long)
    for _ in range(12):
        logits = model(tokens, CLASSES)[:, -1]
        if cfg_scale is not None and cfg_scale > 1:
            null = model(tokens, torch.full_like(CLASSES, model.null_class))[:, -1]
            logits = null + cfg_scale * (logits - null)
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.sample(CLASSES, cfg_scale, top_k=1).flatten(1), tokens)


def test_a_seed_decides_the_images_and_nothing_else_does(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    first = model.sample(CLASSES, 2.0, seed=7)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(model.sample(CLASSES, 2.0, seed=7), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.sample(CLASSES, 2.0, seed=8), first)
    assert not torch.equal(model.sample(CLASSES, 2.0, seed=7, first_image=1), first)
    assert first.shape == (3, 3, 4)
    assert first.dtype == torch.int64


def test_dropout_and_gradients_stay_out_of_sampling(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    expected = model.sample(CLASSES, 2.0)
    tokens = model.train().sample(CLASSES, 2.0)
    assert torch.equal(tokens, expected)
    assert model.training
    model.loss(tokens, CLASSES).backward()


@pytest.mark.parametrize("cfg_scale", [None, 2.0])
def test_an_image_does_not_depend_on_its_batch(
    make_generator: Callable[..., Generator], cfg_scale: float | None
) -> None:
    model = make_generator(vocab_size=200, width=64)
    classes = torch.arange(24) % 6
    runs = [
        torch.cat(
            [
                model.sample(classes[first : first + batch], cfg_scale, 1.1, 0, 0.95, 3, first_image=first)
                for first in range(0, 24, batch)
            ]
        )
        for batch in (1, 3, 8, 24)
    ]
    assert all(torch.equal(run, runs[-1]) for run in runs)
    assert len({tuple(image.flatten().tolist()) for image in runs[-1]}) == 24


def test_an_image_does_not_depend_on_what_shares_its_batch(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    alone = model.sample([2], 2.0, seed=1)
    assert torch.equal(model.sample([2, 4, 0], 2.0, seed=1)[:1], alone)


def test_the_cache_is_allocated_once_and_old_contents_do_not_matter(
    make_generator: Callable[..., Generator],
) -> None:
    model = make_generator()
    first = model.sample(CLASSES, 2.0)
    memory = model.decoder(1).cache
    memory.fill_(torch.nan)
    assert torch.equal(model.sample(CLASSES, 2.0), first)
    assert model.decoder(1).cache is memory
    model.sample(torch.arange(40) % 5)
    assert model.decoder(1).cache.shape[2] == 40
    model.train()
    assert model._decoder is None
    assert "cache" not in "".join(model.state_dict())


def test_class_projections_and_the_head_run_no_more_than_they_must(
    make_generator: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every class once per call, and one head product per position in spite of guidance."""
    model = make_generator()
    products: list[tuple[int, int]] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        products.append((x.shape[0], weight.shape[0]))
        return skinny_linear(x, weight, *rest, **options)

    monkeypatch.setattr(decoder_module, "skinny_linear", counted)
    model.sample(torch.arange(16) % 3, 2.0)
    classes = 4
    assert products == [(classes, 6 * 32)] * 2 + [(classes, 2 * 32)] + [(16, 50)] * 12


SCHEDULES = [
    None,
    Guidance(1.7),
    Guidance(3.0, "interval", start=0.2, stop=0.6),
    Guidance(3.0, "linear"),
    Guidance(3.0, "power-cosine", power=1.5),
]


@pytest.mark.parametrize("guidance", SCHEDULES, ids=str)
def test_draws_come_from_the_filtered_guided_distribution(
    make_generator: Callable[..., Generator], guidance: Guidance | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits at every position are those of two full forwards, guided by that position's scale."""
    model = make_generator()
    seen: list[torch.Tensor] = []

    def record(logits: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append(logits.clone())
        return choose_tokens(logits, **settings)

    monkeypatch.setattr(sampler, "choose_tokens", record)
    tokens = model.sample(CLASSES, guidance, temperature=0.7, top_k=4).flatten(1)
    with torch.no_grad():
        logits = model(tokens[:, :-1], CLASSES)
        null = model(tokens[:, :-1], torch.full_like(CLASSES, 5))
    scales = torch.tensor(guidance.scales(12) if guidance else [1.0] * 12).clamp_min(1)[:, None]
    logits = null + scales * (logits - null)
    assert_close(torch.stack(seen, 1), logits, rtol=1e-4, atol=1e-4)
    likely = logits.topk(4, dim=-1).indices
    assert bool((likely == tokens[..., None]).any(-1).all())


def test_schedules_are_their_formulas() -> None:
    assert Guidance(3.0).scales(4) == [3.0] * 4
    assert Guidance(3.0, "interval", start=0.25, stop=0.75).scales(4) == [1, 3, 3, 1]
    assert Guidance(3.0, "linear").scales(4) == [1.5, 2.0, 2.5, 3.0]
    cosine = [1 + (1 - math.cos(math.pi * (i / 4) ** 2)) for i in range(4)]
    assert Guidance(3.0, "power-cosine", power=2.0).scales(4) == pytest.approx(cosine)
    assert SamplingSettings(Guidance(3.0, "interval", start=0.25, stop=0.75)).guidance_scales(4) == [1, 3, 3]
    assert SamplingSettings(Guidance(1.0, "linear")).guidance_scales(4) == []


def test_the_published_presets() -> None:
    found = {name: (p.guidance.scale, p.temperature, p.top_k, p.top_p) for name, p in PRESETS.items()}
    assert found == {
        "B": (2.25, 1.1, 0, 1.0),
        "L": (2.0, 1.0, 0, 1.0),
        "XL": (2.35, 1.15, 0, 1.0),
        "XXL": (2.85, 1.2, 0, 1.0),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 2.0, "schedule": "cosine"}, "schedule: expected one of constant, interval, linear, power"),
        (
            {"scale": 2.0, "schedule": "interval", "start": 0.5, "stop": 0.5},
            "start, stop: expected 0 <=",
        ),
        ({"scale": 2.0, "start": 0.5}, "start, stop: expected with the interval schedule, got 'constant'"),
        ({"scale": 2.0, "power": 2.0}, "power: expected with the power-cosine schedule, got 'constant'"),
        ({"scale": 2.0, "schedule": "power-cosine", "power": 0.0}, "power: expected a finite number > 0"),
    ],
    ids=str,
)
def test_bad_guidance_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**arguments)


def test_unconditional_sampling_is_that_of_the_null_class(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    assert torch.equal(model.sample([5, 5], 3.0), model.sample([5, 5]))


def test_partial_images_grow_by_a_token_a_position(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    whole = model.sample(CLASSES, 2.0, seed=4).flatten(1)
    parts = list(model.generate(CLASSES, 2.0, seed=4))
    assert [(part.done, part.total) for part in parts] == [(i, 12) for i in range(1, 13)]
    for part in parts:
        expected = whole.clone()
        expected[:, part.done :] = -1
        assert torch.equal(part.tokens.flatten(1), expected)
    assert list(model.generate([])) == []


def test_generators_under_way_do_not_disturb_each_other(make_generator: Callable[..., Generator]) -> None:
    model = make_generator()
    expected = [model.sample([1, 2], seed=seed) for seed in (0, 1)]
    runs = [model.generate([1, 2], seed=seed) for seed in (0, 1)]
    for _ in range(12):
        parts = [next(run) for run in runs]
        model.sample([0], 3.0, seed=9)
    assert torch.equal(parts[0].tokens, expected[0])
    assert torch.equal(parts[1].tokens, expected[1])
    abandoned = model.generate([1])
    next(abandoned)
    abandoned.close()
    assert torch.equal(model.sample([1, 2], seed=1), expected[1])


def test_arguments_of_generate_are_checked_before_the_first_step(
    make_generator: Callable[..., Generator],
) -> None:
    for bad in ({"class_ids": [9]}, {"temperature": 0.0}, {"seed": -1}, {"precision": "fp4"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
            make_generator().generate(**({"class_ids": [0]} | bad))


def test_low_precision_sampling_runs_and_is_independent_of_the_batch(
    make_generator: Callable[..., Generator],
) -> None:
    model = copy.deepcopy(make_generator()).to(torch.bfloat16)
    together = model.sample(CLASSES, 2.0)
    apart = [model.sample(CLASSES[i : i + 1], 2.0, first_image=i) for i in range(3)]
    assert torch.equal(torch.cat(apart), together)


def test_progress_is_told_every_position_and_empty_batches_are_fine(
    make_generator: Callable[..., Generator],
) -> None:
    told: list[tuple[int, int]] = []
    model = make_generator()
    model.sample([1], progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 12) for done in range(1, 13)]
    assert model.sample([]).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_ids": [6]}, r"class_ids: expected values in \[0, 5\], got 6 to 6"),
        ({"class_ids": [-1]}, r"class_ids: expected values in \[0, 5\], got -1 to -1"),
        ({"class_ids": 3}, "class_ids: expected one id per image, a sequence, got 3"),
        ({"class_ids": [0.5]}, "class_ids: expected an integer tensor, got torch.float32"),
        ({"class_ids": [[1]]}, r"class_ids: expected \[B\], got \[1, 1\]"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number > 0"),
        ({"top_p": 0.0}, r"top_p: expected a probability in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p: expected a probability in \(0, 1\], got 1.5"),
        ({"top_k": -1}, r"top_k: expected an integer in \[0, 2\^63\), got -1"),
        ({"top_k": 2.0}, "top_k: expected an integer"),
        ({"cfg_scale": float("inf")}, "cfg_scale: expected a finite number >= 0, got inf"),
        ({"cfg_scale": -1.0}, "cfg_scale: expected a finite number >= 0, got -1.0"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"first_image": 1.0}, "first_image: expected an integer"),
        ({"progress": 3}, "progress: expected a callable"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    make_generator: Callable[..., Generator], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator().sample(**({"class_ids": [0]} | arguments))


def test_a_diverged_model_is_refused(make_generator: Callable[..., Generator]) -> None:
    model: Generator = make_generator()
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="model: expected finite logits"):
        model.sample([0])
