"""Shapes, ranges and refusals of the tokenizer and its settings."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_fast.checkpoint.reference import reference_name
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig


def images(batch: int = 2, height: int = 16, width: int = 16, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, channels, height, width, generator=generator) * 2 - 1


def test_shapes_of_every_stage(small: Tokenizer) -> None:
    output = small(images(3, 16, 24))
    assert output.reconstruction.shape == (3, 1, 16, 24)
    assert output.quantizer.indices.shape == (3, 8, 12)
    assert output.quantizer.indices.dtype == torch.int64
    assert small.features(images()).shape == (2, 8, 8, 8)
    assert small.downsampling == 2
    assert small.config.grid == (8, 8)


def test_encode_then_decode_is_the_forward_pass(small: Tokenizer) -> None:
    output = small(images())
    indices = small.encode(images())
    assert torch.equal(indices, output.quantizer.indices)
    torch.testing.assert_close(small.decode(indices), output.reconstruction)
    assert not small.decode(indices).requires_grad
    torch.testing.assert_close(small.decode(indices.to(torch.int32)), output.reconstruction)


def test_uint8_images_mean_the_same_as_their_floats(small: Tokenizer) -> None:
    bytes_ = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(small.encode(bytes_), small.encode(bytes_.float() / 127.5 - 1))


def test_channels_last_changes_nothing_but_the_layout(small: Tokenizer) -> None:
    before = small(images()).reconstruction
    small.to(memory_format=torch.channels_last)
    after = small(images().to(memory_format=torch.channels_last)).reconstruction
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter(small: Tokenizer) -> None:
    output = small.train()(images())
    (output.reconstruction.square().mean() + output.quantizer.quantization_loss).backward()
    missing = [name for name, p in small.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias before softmax attention shifts every logit of a row alike
    assert [name for name in missing if not name.endswith("key.bias")] == []


def test_empty_batch(small: Tokenizer) -> None:
    assert small.encode(images(0)).shape == (0, 8, 8)
    assert small.decode(torch.zeros(0, 8, 8, dtype=torch.int64)).shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 16, 16), r"images: expected \[B, 1, H, W\], got torch.float32 \[1, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16), r"expected \[B, 1, H, W\]"),
        (torch.zeros(1, 1, 15, 16), "multiples of 2, got 15 x 16"),
        (torch.zeros(1, 1, 0, 16), "multiples of 2, got 0 x 16"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.int64), "expected uint8 or floating point, got torch.int64"),
        (
            torch.full((1, 1, 16, 16), 1.5),
            r"expected values in \[-1, 1\] or uint8, got values in \[1.5, 1.5\]",
        ),
        (torch.full((1, 1, 16, 16), float("nan")), r"expected values in \[-1, 1\]"),
        (torch.zeros(1, 1, 16, 16, device="meta"), "expected them on cpu, got meta"),
        ([[0.0]], r"expected \[B, 1, H, W\], got list"),
    ],
    ids=["rank", "channels", "odd height", "no height", "integers", "range", "nan", "device", "list"],
)
def test_encode_refuses(small: Tokenizer, bad: Any, message: str) -> None:
    if isinstance(bad, Tensor) and bad.is_meta:
        with pytest.raises(ValueError, match=message):
            small(bad)
    else:
        with pytest.raises(ValueError, match=message):
            small.encode(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            torch.zeros(8, 8, dtype=torch.int64),
            r"indices: expected integers \[B, h, w\], got torch.int64 \[8, 8\]",
        ),
        (torch.zeros(1, 8, 8), "got torch.float32"),
        (torch.zeros(1, 8, 8, dtype=torch.bool), "got torch.bool"),
        (torch.full((1, 8, 8), 32), "expected 0 to 31, got 32 to 32"),
        (torch.full((1, 8, 8), -1), "expected 0 to 31, got -1 to -1"),
    ],
    ids=["rank", "floats", "booleans", "too large", "negative"],
)
def test_decode_refuses(small: Tokenizer, bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.decode(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_channels": 2}, "image_channels: expected 1 or 3, got 2"),
        ({"base_channels": 48}, "base_channels: expected a multiple of 32, got 48"),
        ({"base_channels": 0}, "expected 32 to 8192 channels"),
        ({"base_channels": 1 << 40}, "expected 32 to 8192 channels"),
        ({"channel_multipliers": ()}, "channel_multipliers: expected 1 to 8 levels, got 0"),
        ({"channel_multipliers": (1,) * 9}, "channel_multipliers: expected 1 to 8 levels, got 9"),
        ({"channel_multipliers": (1, -2)}, "expected 32 to 8192 channels"),
        ({"num_res_blocks": 10**9}, "num_res_blocks: expected 1 to 32"),
        ({"latent_channels": 0}, "latent_channels: expected 1 to 8192, got 0"),
        ({"resolution": 17}, "resolution: expected a multiple of 2 for 2 levels, got 17"),
        ({"resolution": 10**9}, "resolution: expected 2 to 16384"),
        ({"attention_resolutions": (4,)}, r"attention_resolutions: expected some of \[16, 8\], got 4"),
        ({"dropout": 1.0}, r"dropout: expected a share in \[0, 1\), got 1.0"),
    ],
)
def test_config_refuses(small_config: TokenizerConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small_config, **change)


def published_shapes(
    channels: int, multipliers: tuple[int, ...], blocks: int, latent: int, codes: int, dim: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published model with attention at its coarsest level."""
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (codes, dim)}

    def conv(name: str, fan_out: int, fan_in: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (fan_out, fan_in, size, size), (fan_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, entering: int, leaving: int) -> None:
        norm(f"{name}.norm1", entering)
        conv(f"{name}.conv1", leaving, entering, 3)
        norm(f"{name}.norm2", leaving)
        conv(f"{name}.conv2", leaving, leaving, 3)
        if entering != leaving:
            conv(f"{name}.nin_shortcut", leaving, entering, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def stack(name: str, count: int, entering: int, leaving: int, attends: bool) -> None:
        for i in range(count):
            block(f"{name}.block.{i}", entering if i == 0 else leaving, leaving)
            if attends:
                attention(f"{name}.attn.{i}", leaving)

    widths, last = [channels * m for m in multipliers], len(multipliers) - 1
    for half in ("encoder", "decoder"):
        block(f"{half}.mid.block_1", widths[-1], widths[-1])
        attention(f"{half}.mid.attn_1", widths[-1])
        block(f"{half}.mid.block_2", widths[-1], widths[-1])
    conv("encoder.conv_in", channels, 3, 3)
    conv("encoder.conv_out", latent, widths[-1], 3)
    norm("encoder.norm_out", widths[-1])
    conv("decoder.conv_in", widths[-1], latent, 3)
    conv("decoder.conv_out", 3, widths[0], 3)
    norm("decoder.norm_out", widths[0])
    for i, width in enumerate(widths):
        stack(f"encoder.down.{i}", blocks, widths[i - 1] if i else channels, width, i == last)
        stack(f"decoder.up.{i}", blocks + 1, widths[min(i + 1, last)], width, i == last)
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    conv("quant_conv", dim, latent, 1)
    conv("post_quant_conv", latent, dim, 1)
    return shapes


def test_the_default_config_is_the_published_model() -> None:
    config = TokenizerConfig(quantizer=QuantizerConfig(codebook_size=262144, dim=256))
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    ours = {reference_name(name, 5): tuple(p.shape) for name, p in tokenizer.named_parameters()}
    assert ours == published_shapes(128, (1, 1, 2, 2, 4), 4, 256, 262144, 256)
    assert config.grid == (16, 16)
