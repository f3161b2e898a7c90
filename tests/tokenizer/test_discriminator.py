from pathlib import Path

import pytest
import torch
from torch import Tensor

from ibq_fast.tokenizer import PatchDiscriminator


@pytest.mark.parametrize(("size", "patches"), [(64, 6), (32, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_logit_per_patch(size: int, patches: int, channels: int) -> None:
    discriminator = PatchDiscriminator(channels, base_channels=8)
    assert discriminator(torch.zeros(2, channels, size, size)).shape == (2, 1, patches, patches)


def test_widths_double_up_to_eight_times_the_base() -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(num_layers=5)
    widths = [layer.weight.shape[0] for layer in discriminator.layers if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 512, 512, 1]


def test_a_logit_sees_70_pixels() -> None:
    discriminator = PatchDiscriminator(1, base_channels=4).eval()
    image = torch.zeros(1, 1, 128, 128, requires_grad=True)
    discriminator(image)[0, 0, 7, 7].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_loads_from_a_published_checkpoint(checkpoint: Path, reference_state: dict[str, Tensor]) -> None:
    state = PatchDiscriminator.from_reference(checkpoint).state_dict()
    prefix = "loss.discriminator.main."
    assert len(state) == sum(name.startswith(prefix) for name in reference_state)
    for name, tensor in state.items():
        assert torch.equal(tensor, reference_state[name.replace("layers.", prefix)]), name


def test_refusals(tmp_path: Path, reference_state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\], got \[1, 1, 64, 64\]"):
        PatchDiscriminator(base_channels=4)(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="num_layers: expected 1 to 8, got 0"):
        PatchDiscriminator(num_layers=0)
    without = {name: t for name, t in reference_state.items() if not name.startswith("loss.")}
    torch.save({"state_dict": without}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: no patch discriminator"):
        PatchDiscriminator.from_reference(tmp_path / "a.ckpt")
    wide = dict(reference_state)
    wide["loss.discriminator.main.0.weight"] = torch.zeros(10**5, 3, 4, 4)
    torch.save(wide, tmp_path / "wide.ckpt")
    with pytest.raises(ValueError, match=r"'layers.0.bias': expected shape \[100000\]"):
        PatchDiscriminator.from_reference(tmp_path / "wide.ckpt")
