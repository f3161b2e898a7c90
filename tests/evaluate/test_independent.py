"""Figures against independent implementations on the same arrays, degenerate ones included."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
import torch

from ibq_fast.data import to_float
from ibq_fast.evaluate.class_score import class_score, score_sums
from ibq_fast.evaluate.frechet import frechet_distance
from ibq_fast.evaluate.moments import Gaussian, Moments
from ibq_fast.evaluate.neighbours import precision_recall
from ibq_fast.evaluate.similarity import pixel_errors, ssim
from ibq_fast.evaluate.trunks import LpipsName, Weights, build_lpips, build_trunk

CPU = torch.device("cpu")


def gaussian(x: np.ndarray) -> Gaussian:
    moments = Moments(x.shape[1])
    moments.update(torch.from_numpy(x))
    return moments.gaussian()


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular products
        root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    traces = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * np.trace(root.real))


@pytest.mark.parametrize(
    ("n", "m", "dim"),
    [(500, 400, 64), (200, 200, 1), (20, 30, 64), (20, 500, 64), (5, 5, 48), (2, 3, 16)],
)
def test_frechet_distance_is_scipys(n: int, m: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((dim, dim)) * np.exp(-np.arange(dim) / 8)
    a = rng.standard_normal((n, dim)) @ mixed + 5
    b = rng.standard_normal((m, dim)) @ mixed * 1.2 + 5.3
    covered = dim > 1
    expected = (
        by_scipy(a, b) if covered else (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    )
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected, rel=1e-4)
    trace = float(gaussian(a).covariance.trace())
    assert frechet_distance(gaussian(a), gaussian(a)) <= 1e-9 * trace


def test_frechet_distance_of_nearly_empty_covariances() -> None:
    """Ten images, 1,280 features, most of them 0: where LAPACK's eigendecomposition may not converge."""
    rng = np.random.default_rng(0)
    sparse = np.zeros((10, 1280))
    sparse[:, :40] = rng.random((10, 40)) * (rng.random((10, 40)) < 0.2)
    other = sparse.copy()
    other[:, 0] += 1
    assert frechet_distance(gaussian(sparse), gaussian(other)) == pytest.approx(1.0, rel=1e-6)


def test_one_image_has_no_covariance() -> None:
    rng = np.random.default_rng(0)
    one, many = rng.standard_normal((1, 8)), rng.standard_normal((50, 8))
    assert math.isnan(frechet_distance(gaussian(one), gaussian(many)))
    assert math.isnan(frechet_distance(Moments(8).gaussian(), gaussian(many)))
    with pytest.raises(ValueError, match="b: expected 8 dimensions, as a has, got 4"):
        frechet_distance(gaussian(many), gaussian(many[:, :4]))


@pytest.mark.parametrize("shape", [(3, 3, 17, 23), (3, 1, 7, 7)])
def test_ssim_and_psnr_are_scikit_images(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, shape, np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-60, 61, shape), 0, 255).astype(np.uint8)
    b[0] = 17  # a constant image
    images, copies = torch.from_numpy(a), torch.from_numpy(b)
    errors, similar = pixel_errors(images, copies), ssim(images, copies)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        wide = (x.astype(np.float64) / 255, y.astype(np.float64) / 255)
        assert float(similar[i]) == pytest.approx(
            skimage.metrics.structural_similarity(*wide, data_range=1.0, channel_axis=0), rel=1e-9, abs=1e-12
        )
        assert float(errors.psnr[i]) == pytest.approx(skimage.metrics.peak_signal_noise_ratio(x, y), rel=1e-9)
        assert float(errors.l1[i]) == pytest.approx(np.abs(x.astype(int) - y).mean())
    assert ssim(images, images).tolist() == pytest.approx([1.0] * len(a), abs=1e-15)
    assert pixel_errors(images, images).psnr.tolist() == [math.inf] * len(a)


def by_brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(distances(centres, centres), 1)[:, k]
        return float((distances(points, centres) <= radii).any(1).mean())

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize(("n", "m", "dim", "k"), [(300, 200, 8, 3), (40, 60, 64, 1), (4, 5, 2, 3)])
def test_precision_and_recall_are_brute_forces(
    n: int, m: int, dim: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ibq_fast.evaluate.neighbours._ROWS", 37)  # several tiles, ragged
    monkeypatch.setattr("ibq_fast.evaluate.neighbours._COLUMNS", 53)
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((n, dim)) + 100
    samples = rng.standard_normal((m, dim)) * 0.8 + 100.4
    samples[: m // 4] = samples[0]  # duplicates, whose radii are 0
    assert precision_recall(reference, samples, k) == pytest.approx(by_brute_force(reference, samples, k))
    assert precision_recall(reference, reference.copy(), k) == (1.0, 1.0)
    assert all(map(math.isnan, precision_recall(reference[:1], samples, k)))


def test_the_class_score_is_its_formula() -> None:
    logits = torch.randn(70, 5, generator=torch.Generator().manual_seed(0)) * 3
    sums = sum(
        score_sums(logits[start:stop], torch.arange(start, stop) * 3 // 70, 3)
        for start, stop in ((0, 20), (20, 21), (21, 70))
    )
    scores = []
    for part in (range(24), range(24, 47), range(47, 70)):  # i * 3 // 70
        p = torch.softmax(logits[list(part)].double(), 1).numpy()
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert isinstance(sums, torch.Tensor)
    assert class_score(sums) == pytest.approx((np.mean(scores), np.std(scores)))
    assert class_score(score_sums(logits[:1], torch.tensor([0]), 10)) == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_packages_on_the_same_weights(
    net: LpipsName, with_torchvision: None, tmp_path: Path
) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    file = tmp_path / "trunk.pth"
    trunk = theirs.net.state_dict().items()
    torch.save({f"features.{key.partition('.')[2]}": value for key, value in trunk}, file)
    ours = build_lpips(net, Weights({f"lpips_{net}": file}), CPU)
    a, b = torch.rand(2, 3, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = theirs(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)).flatten()
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-5, atol=0)
    assert not ours.published
    torch.save({"features.0.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="these are not its trunk's weights"):
        build_lpips(net, Weights({f"lpips_{net}": file}), CPU)


def test_inception_is_torch_fidelitys_on_the_same_weights(with_torchvision: None, tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: object, **options: object) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    theirs = Random("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)
    file = tmp_path / "inception.pth"
    torch.save(theirs.state_dict(), file)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    ours = build_trunk("inception", Weights({"inception": file}), CPU)
    found = ours(to_float(images))
    for part, expected in zip((found.pooled, found.logits), theirs(images), strict=True):
        assert float((part - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert found.spatial.shape == (2, 7 * 17 * 17)
