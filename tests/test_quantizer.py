"""IndexBackpropQuantizer and VectorQuantizer: layouts, similarities, losses, initialisation, precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed
import torch.nn.functional as F

from ibq_fast.quantizer import (
    IndexBackpropQuantizer,
    QuantizerConfig,
    VectorQuantizer,
    build_quantizer,
)

K, D = 37, 6


def make(similarity: str = "dot", **options) -> IndexBackpropQuantizer:
    torch.manual_seed(0)
    return IndexBackpropQuantizer(codebook_size=K, dim=D, similarity=similarity, **options)


def features(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*(shape or (2, D, 3, 4)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantizer", [make(), VectorQuantizer(codebook_size=K, dim=D)], ids=["ibq", "vq"])
def test_layouts_agree(quantizer) -> None:
    z = features()
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    assert out.indices.shape == (2, 3, 4)
    rows = z.flatten(2).transpose(1, 2)
    flat = quantizer(rows, channel_last=True)
    assert flat.indices.shape == (2, 12)
    assert torch.equal(flat.indices, out.indices.flatten(1))
    torch.testing.assert_close(flat.z_q, out.z_q.flatten(2).transpose(1, 2))
    assert torch.equal(quantizer.encode(z), out.indices)
    assert torch.equal(quantizer.encode(rows, channel_last=True), flat.indices)
    torch.testing.assert_close(quantizer.decode(out.indices), out.z_q)
    torch.testing.assert_close(quantizer.decode(flat.indices, channel_last=True), flat.z_q)
    assert all(t.dim() == 0 for t in out[2:])


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("similarity", ["dot", "euclidean", "cosine"])
def test_logits_and_gradients_of_each_similarity(similarity, scale) -> None:
    """Against the formula written with N×K tensors, differentiated by autograd in float64."""
    quantizer = make(similarity, logit_scale=scale, entropy_temperature=0.2).double()
    z = features().double().requires_grad_()
    w = features(seed=2).double()
    out = quantizer(z)
    terms = ((out.z_q * w).sum(), out.quantization_loss, out.sample_entropy, out.codebook_entropy)

    x, e = z.permute(0, 2, 3, 1).reshape(-1, D), quantizer.codebook
    if similarity == "cosine":
        x, e = x / x.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
    s = x @ e.T
    if similarity == "euclidean":
        s = 2 * s - e.square().sum(dim=1)
        assert torch.equal(out.indices.flatten(), torch.cdist(x, e).argmin(dim=1))
    s = s * scale
    p, hard = s.softmax(dim=1), F.one_hot(s.argmax(dim=1), K).double()
    assert torch.equal(out.indices.flatten(), s.argmax(dim=1))
    z_q, codes = (hard - p.detach() + p) @ e, e[s.argmax(dim=1)]
    loss = (z_q - x).square().mean() + (codes.detach() - x).square().mean()
    loss = loss + 0.25 * (codes - x.detach()).square().mean()
    q = (s / 0.2).softmax(dim=1)
    mean = q.mean(dim=0)
    weighted = (z_q.view(2, 3, 4, D).permute(0, 3, 1, 2) * w).sum()
    expected = (weighted, loss, -(q * q.log()).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum())
    for ours, truth in zip(terms, expected, strict=True):
        torch.testing.assert_close(ours, truth)
        leaves = (z, quantizer.codebook)
        for a, b in zip(
            torch.autograd.grad(ours, leaves, retain_graph=True),
            torch.autograd.grad(truth, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_where_beta_sits() -> None:
    z = features()
    values = {}
    for commitment in ("reference", "paper"):
        for beta in (0.0, 1.0):
            quantizer = make(commitment=commitment, commitment_weight=beta)
            x = z.clone().requires_grad_()
            out = quantizer(x)
            (values[commitment, beta],) = torch.autograd.grad(out.quantization_loss, x, retain_graph=True)
            distance = (out.z_q - z).square().mean()
            torch.testing.assert_close(out.quantization_loss, (2 + beta) * distance)
    to_features = 2 * (z - quantizer.decode(out.indices)) / z.numel()
    torch.testing.assert_close(values["reference", 0.0], values["reference", 1.0])
    torch.testing.assert_close(values["paper", 1.0] - values["paper", 0.0], to_features)


def test_one_dense_codebook_gradient_per_operator() -> None:
    """The quantization loss brings no second [K, D] gradient: nothing else than the operators writes one."""
    quantizer = make(sample_entropy_weight=0.0, codebook_entropy_weight=0.0)
    out = quantizer(features())
    seen, stack = set(), [(out.z_q.sum() + out.quantization_loss).grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    into_codebook = [
        node
        for node in seen
        for following, _ in node.next_functions
        if getattr(following, "variable", None) is quantizer.codebook
    ]
    assert len(into_codebook) == 1


@pytest.mark.parametrize(("sample", "codebook"), [(1.0, 1.0), (0.3, 0.0), (0.0, 2.0)])
def test_entropy_loss(sample, codebook) -> None:
    out = make(sample_entropy_weight=sample, codebook_entropy_weight=codebook)(features())
    assert out.codebook_entropy > 0
    torch.testing.assert_close(
        out.entropy_loss, sample * out.sample_entropy - codebook * out.codebook_entropy
    )


def test_entropies_are_zero_without_weights() -> None:
    out = make(sample_entropy_weight=0.0, codebook_entropy_weight=0.0)(features())
    assert out.sample_entropy == out.codebook_entropy == out.entropy_loss == 0
    assert not out.entropy_loss.requires_grad


def test_vector_quantizer() -> None:
    quantizer = VectorQuantizer(codebook_size=K, dim=D, commitment_weight=0.5)
    z = features().requires_grad_()
    out = quantizer(z)
    rows = z.permute(0, 2, 3, 1).reshape(-1, D)
    assert torch.equal(out.indices.flatten(), torch.cdist(rows, quantizer.codebook).argmin(dim=1))
    (grad,) = torch.autograd.grad(out.z_q.sum(), z, retain_graph=True)
    assert torch.equal(grad, torch.ones_like(z))
    torch.testing.assert_close(out.quantization_loss, 1.5 * (out.z_q - z).square().mean())
    grad_z, grad_codebook = torch.autograd.grad(out.quantization_loss, (z, quantizer.codebook))
    torch.testing.assert_close(grad_z, 0.5 * 2 * (z - out.z_q).detach() / z.numel())
    unused = torch.ones(K, dtype=torch.bool)
    unused[out.indices.flatten()] = False
    assert bool((grad_codebook[unused] == 0).all())
    assert bool((grad_codebook[~unused] != 0).any())
    assert out.entropy_loss == 0


def test_empty_batch() -> None:
    for quantizer in (make("euclidean"), VectorQuantizer(codebook_size=K, dim=D)):
        out = quantizer(torch.empty(0, D, 3, 4, requires_grad=True))
        assert out.z_q.shape == (0, D, 3, 4)
        assert out.indices.shape == (0, 3, 4)
        (out.z_q.sum() + out.quantization_loss + out.entropy_loss).backward()
        assert bool((quantizer.codebook.grad == 0).all())


@pytest.mark.parametrize("init", ["normal", "scaled"])
def test_spread_of_the_codes(init) -> None:
    torch.manual_seed(0)
    codebook = IndexBackpropQuantizer(codebook_size=2000, dim=16, init=init).codebook
    assert codebook.std().item() == pytest.approx({"normal": 1.0, "scaled": 0.25}[init], rel=0.03)


def test_codes_from_features() -> None:
    quantizer = make(init="features", similarity="euclidean")
    before = quantizer.codebook.detach().clone()
    quantizer.eval()(features())
    assert torch.equal(quantizer.codebook, before)
    z = features(5, D, 4, 4)
    out = quantizer.train()(z)
    rows = z.permute(0, 2, 3, 1).reshape(-1, D)
    assert bool((quantizer.codebook.unsqueeze(1) == rows).all(dim=2).any(dim=1).all())
    assert quantizer.codebook.unique(dim=0).shape[0] == K
    assert out.z_q.requires_grad
    after = quantizer.codebook.detach().clone()
    quantizer(features(5, D, 4, 4, seed=9))
    assert torch.equal(quantizer.codebook, after)


def test_more_codes_than_features() -> None:
    quantizer = make(init="features")
    z = features(1, D, 2, 5)
    quantizer(z)
    rows = z.permute(0, 2, 3, 1).reshape(-1, D)
    nearest = torch.cdist(quantizer.codebook.detach(), rows)
    assert nearest.min(dim=1).values.max() < 0.2
    assert nearest.argmin(dim=1).bincount(minlength=10).min() >= K // 10
    assert quantizer.codebook.unique(dim=0).shape[0] == K


def test_an_empty_first_batch_leaves_the_codes_to_the_next() -> None:
    quantizer = make(init="features")
    quantizer(torch.empty(0, D, 3, 4))
    assert not quantizer.initialized
    quantizer(features())
    assert quantizer.initialized


def test_initialisation_is_remembered() -> None:
    trained = make(init="features")
    trained(features())
    resumed = make(init="features")
    resumed.load_state_dict(trained.state_dict())
    resumed(features(seed=3))
    assert torch.equal(resumed.codebook, trained.codebook)
    from_elsewhere = make(init="features")
    from_elsewhere.load_state_dict({"codebook": trained.codebook.detach()})
    copied = copy.deepcopy(from_elsewhere)
    for quantizer in (from_elsewhere, copied):
        quantizer(features(seed=3))
        assert torch.equal(quantizer.codebook, trained.codebook)
    untouched = make(init="features")
    untouched.load_state_dict(make(init="features").state_dict())
    untouched(features(seed=3))
    assert untouched.initialized
    assert "initialized" not in make().state_dict()


def test_every_process_gets_the_codes_of_rank_0(monkeypatch) -> None:
    sent = torch.full((K, D), 7.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.copy_(sent + source))
    quantizer = make(init="features")
    quantizer(features())
    assert torch.equal(quantizer.codebook, sent)


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "cosine"])
def test_autocast_computes_in_float32(similarity) -> None:
    quantizer = make(similarity)
    z = features().bfloat16()
    expected = quantizer(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(z)
        assert torch.equal(quantizer.encode(z), out.indices)
    assert out.z_q.dtype == torch.float32
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", ["dot", "euclidean", "cosine"])
def test_half_precision_module(similarity, dtype) -> None:
    quantizer = make(similarity).to(dtype)
    z = features().to(dtype).requires_grad_()
    out = quantizer(z)
    assert out.z_q.dtype == dtype
    assert out.quantization_loss.dtype == out.entropy_loss.dtype == torch.float32
    (out.z_q.float().sum() + out.quantization_loss + out.entropy_loss).backward()
    assert bool(z.grad.isfinite().all())
    assert bool(quantizer.codebook.grad.isfinite().all())


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "cosine"])
def test_compiles_without_a_graph_break(similarity) -> None:
    torch._dynamo.reset()
    quantizer = make(similarity)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    z = features()
    for expected, actual in zip(quantizer(z), compiled(z), strict=True):
        torch.testing.assert_close(actual, expected)


def test_build_quantizer() -> None:
    config = QuantizerConfig(codebook_size=5, dim=3, similarity="euclidean", init="scaled", logit_scale=2.0)
    quantizer = build_quantizer(config)
    assert isinstance(quantizer, IndexBackpropQuantizer)
    assert quantizer.config == config
    assert (quantizer.codebook_size, quantizer.dim) == (5, 3)
    assert isinstance(build_quantizer(QuantizerConfig(kind="vq", codebook_size=5, dim=3)), VectorQuantizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fsq"}, "kind: expected one of ibq, vq, got 'fsq'"),
        ({"commitment": "both"}, "commitment: expected one of reference, paper"),
        ({"similarity": "l1"}, "similarity: expected one of dot, euclidean, cosine"),
        ({"init": "uniform"}, "init: expected one of normal, scaled, features"),
        ({"codebook_size": 0}, "codebook_size: expected at least 1, got 0"),
        ({"dim": -1}, "dim: expected at least 1, got -1"),
        ({"entropy_temperature": 0.0}, "entropy_temperature: expected a positive finite number"),
        ({"logit_scale": -1.0}, "logit_scale: expected a positive finite number"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**options)


@pytest.mark.parametrize("quantizer", [make(), VectorQuantizer(codebook_size=K, dim=D)], ids=["ibq", "vq"])
@pytest.mark.parametrize("call", ["forward", "encode", "init_from_features"])
def test_bad_features(quantizer, call) -> None:
    function = getattr(quantizer, call)
    with pytest.raises(ValueError, match=r"z: expected \[B, 6, H, W\] float, got \[2, 5, 3, 4\]"):
        function(features(2, 5, 3, 4))
    with pytest.raises(ValueError, match=r"z: expected \[\.\.\., 6\] float, got \[2, 6, 3, 4\]"):
        function(features(), channel_last=True)
    with pytest.raises(
        ValueError, match=r"z: expected float32, bfloat16, float16 or float64, got torch.int64"
    ):
        function(features().long())
    z = features()
    z[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"z: expected finite values, got 1 NaN or infinite of 144"):
        function(z)
    if call != "init_from_features":
        with pytest.raises(ValueError, match=r"codebook: expected torch.bfloat16 like z, got torch.float32"):
            function(features().bfloat16())


def test_bad_indices() -> None:
    quantizer = make()
    with pytest.raises(ValueError, match=r"indices: expected \[B, H, W\] integers, got \[2\]"):
        quantizer.decode(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"indices: expected values in \[0, 37\), got 0 to 37"):
        quantizer.decode(torch.tensor([0, 37]), channel_last=True)
    with pytest.raises(ValueError, match=r"indices: expected integers, got torch.float32"):
        quantizer.decode(torch.zeros(1, 1, 1))
