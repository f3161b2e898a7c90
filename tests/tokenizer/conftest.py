from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """A checkpoint in the published layout."""
    return GOLDEN / "tokenizer.ckpt"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN / "tokenizer.pt", weights_only=True)


@pytest.fixture(scope="session")
def golden_losses() -> dict[str, Any]:
    return torch.load(GOLDEN / "tokenizer_losses.pt", weights_only=True)


@pytest.fixture(scope="session")
def reference_state(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of the golden checkpoint; tests copy the dict before they change it."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.fixture
def small_config() -> TokenizerConfig:
    return TokenizerConfig(
        image_channels=1,
        resolution=16,
        base_channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        latent_channels=16,
        quantizer=QuantizerConfig(codebook_size=32, dim=8),
    )


@pytest.fixture
def small(small_config: TokenizerConfig) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(small_config).eval()
