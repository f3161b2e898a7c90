"""Claims: every quantizer fits the protocol and trains, a run's rows are replaced, the page is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from bench.claims import draw, results
from bench.claims.cases import ALL, CLAIMS, DIM, SEEDS, SHORT, cases
from bench.claims.methods import FSQ_LEVELS, METHODS, Method
from bench.claims.training import ROWS, Budget, train

CODES = 256


@pytest.mark.parametrize("name", ALL)
def test_every_quantizer_fits_the_protocol(name):
    torch.manual_seed(0)
    quantizer = ALL[name].build(CODES, 12, 32)
    z = torch.randn(2, 12, 4, 4, requires_grad=True)
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.indices.shape == (2, 4, 4)
    assert out.indices.dtype == torch.int64
    assert 0 <= out.indices.min() <= out.indices.max() < quantizer.size
    assert out.loss.shape == ()
    (out.z_q.square().sum() + out.loss).backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


def figures_of(method, seed):
    (figures,) = train(method, CODES, 8, seed, Budget(2, (2,), held_out=40))
    assert figures.pop("cpu_ms") > 0
    return figures


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_of_each_method_are_measured(name):
    figures = figures_of(METHODS[name], seed=1)
    assert figures["step"] == 2
    assert 0 < figures["utilisation"] <= 1
    assert 1 <= figures["perplexity"] <= figures["size"]
    assert 1 / figures["size"] <= figures["window_utilisation"] <= 2 * ROWS / figures["size"]
    assert 3 < figures["psnr"] < 30


class Watched(torch.nn.Module):
    """A quantizer that keeps the features it is given."""

    def __init__(self, quantizer, seen):
        super().__init__()
        self.quantizer, self.size, self.seen = quantizer, quantizer.size, seen

    def forward(self, z):
        self.seen.append(z.detach().clone())
        return self.quantizer(z)


def test_the_seed_decides_first_weights_and_images_whatever_the_method():
    seen = {}
    for name, seed in (("vq", 3), ("fsq", 3), ("vq", 4)):
        kept = seen[name, seed] = []

        def build(*sizes, name=name, kept=kept):
            return Watched(METHODS[name].build(*sizes), kept)

        figures_of(Method(name, build), seed)
    assert torch.equal(seen["vq", 3][0], seen["fsq", 3][0])
    assert not torch.equal(seen["vq", 3][0], seen["vq", 4][0])


def test_a_run_repeats():
    method = METHODS["vq_ema_restart"]
    assert figures_of(method, seed=1) == figures_of(method, seed=1)


def test_fsq_levels_make_about_the_codes_asked_for():
    for codes, levels in FSQ_LEVELS.items():
        assert abs(math.prod(levels) / codes - 1) < 0.1, levels


def test_claims_share_the_runs_that_their_plots_take_from_each_other():
    assert CLAIMS["b"].codes[0] in CLAIMS["a"].codes
    assert CLAIMS["c"].codes[0] in CLAIMS["a"].codes
    assert SHORT.steps in CLAIMS["d"].budget.measured
    assert not {case.codes for case in cases("a")} & {case.codes for case in cases("d")}


def test_reachable_is_the_share_that_uniform_choices_hit():
    drawn = torch.randint(5000, (draw.HELD_OUT * draw.TOKENS,), generator=torch.Generator().manual_seed(0))
    assert draw.reachable(5000) == pytest.approx(drawn.unique().numel() / 5000, abs=0.01)


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "claims.csv")
    monkeypatch.setattr(draw, "PAGE", tmp_path / "claims.md")
    monkeypatch.setattr(draw, "PLOTS", tmp_path / "claims")
    draw.PAGE.write_text("".join(f"# {c}\n<!-- {c}: begin -->\nold\n<!-- {c}: end -->\n" for c in CLAIMS))
    return draw.PAGE


def rows_of(case, psnr=17.0):
    about = vars(case) | {"threads": 1, "machine": "m", "commit": "c", "date": "2026-01-01"}
    return [
        about
        | {"step": step, "size": case.codes, "psnr": psnr + case.seed, "utilisation": 0.5, "perplexity": 9.0}
        | {"window_utilisation": 0.25, "window_perplexity": 8.0, "cpu_ms": 12.0}
        for step in CLAIMS[case.claim].budget.measured
    ]


def test_rows_of_a_run_take_the_place_of_its_earlier_ones(page):
    first, second = [case for case in cases("d") if case.method == "vq"][:2]
    results.keep(rows_of(first))
    results.keep(rows_of(second))
    results.keep(rows_of(first, psnr=20.0))
    rows = results.read()
    assert len(rows) == 2 * len(CLAIMS["d"].budget.measured)
    assert {row["psnr"] for row in rows if row["seed"] == str(first.seed)} == {str(20.0 + first.seed)}
    assert results.measured() == {first, second}


def test_page_is_drawn_from_the_rows_and_says_what_is_missing(page):
    everything = [case for claim in CLAIMS for case in cases(claim)]
    left_out = next(case for case in everything if (case.claim, case.method, case.dim) == ("b", "simvq", 8))
    results.keep([row for case in everything if case != left_out for row in rows_of(case)])
    draw.draw()
    text = page.read_text()
    assert "old" not in text
    assert f"| IBQ, dot product | 18.00 (17.00 – {17 + SEEDS[-1]:.2f})" in text
    assert "K = 4,096" in text
    whole = len(list(cases("b")))
    assert f"{whole - 1} of {whole} runs measured" in text
    assert "Not measured (in whole or for some seeds): K = 1,024, D = 8 (SimVQ);" in text
    assert text.count("Not measured") == 1
    assert f"D = {DIM}" in text
    for claim in CLAIMS:
        assert f"](claims/{claim}.png)" in text
        assert (draw.PLOTS / f"{claim}.png").stat().st_size > 10_000


def test_page_without_its_markers_is_refused(page):
    page.write_text("nothing")
    results.keep(rows_of(next(cases("a"))))
    with pytest.raises(ValueError, match="expected <!-- a: begin -->"):
        draw.draw()
