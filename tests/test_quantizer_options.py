"""Scale of the logits and first codes from features, against the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_fast.kmeans import kmeans, random_rows
from ibq_fast.quantizer import IndexBackpropQuantizer, QuantizerConfig, VectorQuantizer, build_quantizer

SIMILARITIES = ("dot", "euclidean", "cosine")
ENTROPIES = ({}, {"sample_entropy_weight": 0.0, "codebook_entropy_weight": 0.0})


def make(**options: Any) -> IndexBackpropQuantizer:
    torch.manual_seed(0)
    return IndexBackpropQuantizer(codebook_size=23, dim=5, entropy_temperature=0.5, **options)


def rows(count: int = 40) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1))


def objective(out: Any) -> Tensor:
    weights = torch.linspace(-1, 1, out.z_q.numel()).view_as(out.z_q)
    return (weights * out.z_q).sum() + out.quantization_loss + 0.1 * out.entropy_loss


@pytest.mark.parametrize("entropies", ENTROPIES, ids=["entropies", "none"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_learned_scale_computes_what_a_fixed_one_does(similarity: Any, entropies: dict[str, float]) -> None:
    fixed = make(similarity=similarity, logit_scale=0.7, **entropies)
    learned = make(similarity=similarity, logit_scale=0.7, logit_scale_kind="learned", **entropies)
    results = []
    for quantizer in (fixed, learned):
        z = rows().requires_grad_()
        out = quantizer(z, channel_last=True)
        objective(out).backward()
        results.append((out, z.grad, quantizer.codebook.grad))
    (a, dz, de), (b, dz_learned, de_learned) = results
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(learned.encode(rows(), channel_last=True), b.indices)
    for ours, theirs in zip(b, a, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dz_learned, dz, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(de_learned, de, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_scale_gets_the_gradient_of_the_plain_formula(similarity: Any) -> None:
    quantizer = make(similarity=similarity, logit_scale=0.7, logit_scale_kind="learned")
    assert quantizer.log_scale is not None
    z, codes = rows().double(), quantizer.codebook.detach().double()
    objective(quantizer(rows(), channel_last=True)).backward()
    log_scale = torch.tensor(0.7, dtype=torch.float64).log().requires_grad_()
    if similarity == "cosine":
        z, codes = (torch.nn.functional.normalize(x, dim=1) for x in (z, codes))
    logits = z @ codes.T
    if similarity == "euclidean":
        logits = 2 * logits - codes.square().sum(1)
    logits = log_scale.exp() * logits
    soft = logits.softmax(1)
    hard = torch.nn.functional.one_hot(logits.argmax(1), 23).double()
    z_q = (hard + soft - soft.detach()) @ codes
    p = (logits / 0.5).softmax(1)
    mean = p.mean(0)
    sample = -(p * p.log()).sum(1).mean()
    entropy = sample + (mean * (mean + 1e-5).log()).sum()
    weights = torch.linspace(-1, 1, z_q.numel()).double().view_as(z_q)
    ((weights * z_q).sum() + (z_q - z).square().mean() + 0.1 * entropy).backward()
    assert quantizer.log_scale.grad is not None
    assert log_scale.grad is not None
    torch.testing.assert_close(quantizer.log_scale.grad.double(), log_scale.grad, rtol=1e-3, atol=1e-5)


def test_the_scale_by_the_square_root_of_the_dimension() -> None:
    quantizer = make(logit_scale=2.0, logit_scale_kind="inverse_sqrt_dim")
    assert quantizer.logit_scale == pytest.approx(2 * 5**-0.5)
    same = make(logit_scale=2 * 5**-0.5)
    a, b = quantizer(rows(), channel_last=True), same(rows(), channel_last=True)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    torch.testing.assert_close(
        quantizer.logits(rows(), channel_last=True), 2 * 5**-0.5 * rows() @ quantizer.codebook.T
    )


@pytest.mark.parametrize("kind", ["fixed", "learned"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_logits_to_be_looked_at(similarity: Any, kind: Any) -> None:
    quantizer = make(similarity=similarity, logit_scale=0.3, logit_scale_kind=kind)
    z = rows().view(2, 4, 5, 5).movedim(-1, 1)
    logits = quantizer.logits(z)
    assert torch.equal(logits.argmax(1).view(2, 4, 5), quantizer.encode(z))
    assert not logits.requires_grad


def test_a_learned_scale_is_kept_and_refused_where_it_has_no_place() -> None:
    quantizer = make(logit_scale=0.7, logit_scale_kind="learned")
    assert set(quantizer.state_dict()) == {"codebook", "log_scale"}
    assert set(make().state_dict()) == {"codebook"}
    with pytest.raises(ValueError, match="logit_scale_kind: expected fixed with kind vq, got 'learned'"):
        QuantizerConfig(kind="vq", logit_scale_kind="learned")
    with pytest.raises(
        ValueError, match="logit_scale_kind: expected one of fixed, inverse_sqrt_dim, learned"
    ):
        QuantizerConfig(logit_scale_kind="free")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init_batches: expected at least 1, got 0"):
        QuantizerConfig(init_batches=0)


def blobs() -> Tensor:
    """300 rows around 6 centres."""
    torch.manual_seed(0)
    return (10 * torch.randn(6, 5)).repeat(50, 1) + 0.01 * torch.randn(300, 5)


def test_kmeans_finds_the_blobs() -> None:
    points = blobs()
    best = min(float(torch.cdist(points, kmeans(points, 12)).amin(1).square().mean()) for _ in range(3))
    assert best < 1e-2
    found = kmeans(points, 12, iterations=20)
    random = random_rows(points, 12)
    assert torch.cdist(points, found).amin(1).mean() <= torch.cdist(points, random).amin(1).mean()


def test_kmeans_of_fewer_rows_than_codes_gives_the_rows() -> None:
    points = rows(7)
    codes = kmeans(points, 23)
    assert codes.shape == (23, 5)
    assert torch.cdist(points, codes[:7]).amin(1).max() == 0
    assert len(codes.unique(dim=0)) == 23


@pytest.mark.parametrize("kind", ["ibq", "vq"])
def test_codes_are_fitted_to_the_first_batches(kind: Any) -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(
        QuantizerConfig(kind=kind, codebook_size=4, dim=5, init="kmeans", init_batches=2)
    )
    first, second = rows() + 30, rows() - 30
    quantizer.eval()(first, channel_last=True)
    assert quantizer._awaits_features
    quantizer.train()(first, channel_last=True)
    assert quantizer.codebook.min() > 20
    assert not quantizer.initialized
    quantizer(second, channel_last=True)
    assert quantizer.initialized
    assert (quantizer.codebook.mean(1) > 20).any()
    assert (quantizer.codebook.mean(1) < -20).any()
    kept = quantizer.codebook.detach().clone()
    quantizer(first, channel_last=True)
    assert torch.equal(quantizer.codebook, kept)
    assert quantizer._gathered == []


def test_fitted_codes_stay_after_loading() -> None:
    options: dict[str, Any] = {"codebook_size": 4, "dim": 5, "init": "kmeans"}
    fitted, other = VectorQuantizer(**options), VectorQuantizer(**options)
    fitted.train()(rows(), channel_last=True)
    other.load_state_dict(fitted.state_dict())
    other.train()(rows() + 5, channel_last=True)
    assert torch.equal(other.codebook, fitted.codebook)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_codes_that_nothing_chooses_start_again_at_features(similarity: Any) -> None:
    quantizer = make(similarity=similarity, restart_after=3)
    with torch.no_grad():
        quantizer.codebook[10:] = -100.0 * rows(1)  # far away, and last by any product with these rows
    z = rows(1) + 0.1 * rows()
    used = quantizer(z, channel_last=True).indices.unique()
    for _ in range(2):
        quantizer(z, channel_last=True)
    before = quantizer.codebook.detach().clone()
    quantizer.eval()(z, channel_last=True)
    assert torch.equal(quantizer.codebook, before), "evaluation moves nothing"
    out = quantizer.train()(z, channel_last=True)
    out.quantization_loss.backward()
    dead = torch.ones(23, dtype=torch.bool)
    dead[used] = False
    assert torch.equal(quantizer.codebook.detach()[used], before[used])
    moved = quantizer.codebook.detach()[dead]
    assert all((z == code).all(1).any() for code in moved), "each is a feature"
    assert len(moved.unique(dim=0)) == len(moved), "each another one"
    if similarity != "dot":  # where a feature's best code is the nearest one
        assert len(out.indices.unique()) > len(used)
    assert bool((quantizer.idle[out.indices] == 0).all())


def test_restarts_are_off_unless_asked_for_and_refuse_nonsense() -> None:
    assert set(make().state_dict()) == {"codebook"}
    assert set(make(restart_after=2).state_dict()) == {"codebook", "idle"}
    with pytest.raises(ValueError, match="restart_after: expected 0"):
        make(restart_after=-1)
