"""Checkpoints of the published implementation: reading them without unpickling, and the tokenizer's layout.

A tokenizer checkpoint holds ``encoder.* decoder.* quantize.embedding.weight quant_conv.* post_quant_conv.*``
(in a generator's checkpoint all behind ``first_stage_model.``), ``loss.discriminator.*``, and averages
under ``model_ema.`` plus the parameter's name without its dots. It records no settings: the shapes tell them.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_reference_state(path: Path) -> dict[str, Tensor]:
    """The flat dict of tensors in a checkpoint file (its ``state_dict`` entry where it has one), on the CPU.

    Raises ``ValueError`` as :func:`load_reference_file`.
    """
    return load_reference_file(path)[0]


def load_reference_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint file by name, and what else it holds beside its ``state_dict``.

    The tensors are mapped from the file where its format allows it, so that only those used are read.
    Raises ``ValueError`` naming the file when it is truncated or corrupt, holds pickled objects besides
    tensors and plain containers, or has no tensors by name.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from error
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: truncated or corrupt, not a readable checkpoint: {error}") from error
    state = contents.get("state_dict", contents) if isinstance(contents, dict) else contents
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"{path}: expected a dict of tensors, or one under 'state_dict', got {type(state).__name__}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {name!r}: expected a tensor by name, got {type(value).__name__}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: entry {name!r}: {list(value.shape)} is more than the file holds for it"
            )
    beside = {} if state is contents else {name: v for name, v in contents.items() if name != "state_dict"}
    return dict(state), beside


@dataclass(frozen=True)
class TokenizerLayout:
    """What the shapes of a tokenizer checkpoint say. Levels are ordered finest first."""

    image_channels: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[bool, ...]
    latent_channels: int
    codebook_size: int
    code_dim: int


def tokenizer_layout(state: Mapping[str, Tensor], path: Path) -> TokenizerLayout:
    """Read the architecture off a tokenizer checkpoint; ``ValueError`` names a key that is missing or odd."""
    base, image_channels = _shape(state, "encoder.conv_in.weight", 4, path)[:2]
    last_blocks = _last_blocks(state, path)
    widths = [
        _shape(state, f"encoder.down.{level}.block.{block}.conv2.weight", 4, path)[0]
        for level, block in enumerate(last_blocks)
    ]
    for level, width in enumerate(widths):
        if width % base:
            raise ValueError(
                f"{path}: encoder.down.{level}: expected a multiple of the {base} channels of "
                f"encoder.conv_in.weight, got {width}"
            )
    codebook_size, code_dim = _shape(state, "quantize.embedding.weight", 2, path)
    return TokenizerLayout(
        image_channels=image_channels,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=last_blocks[0] + 1,
        attention_levels=tuple(f"encoder.down.{i}.attn.0.norm.weight" in state for i in range(len(widths))),
        latent_channels=_shape(state, "encoder.conv_out.weight", 4, path)[0],
        codebook_size=codebook_size,
        code_dim=code_dim,
    )


def tokenizer_state(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The entries of a tokenizer, whether the file holds it alone or as a generator's first stage."""
    first_stage = "first_stage_model."
    if "encoder.conv_in.weight" not in state and f"{first_stage}encoder.conv_in.weight" in state:
        return {
            name.removeprefix(first_stage): t for name, t in state.items() if name.startswith(first_stage)
        }
    return dict(state)


def tokenizer_weights(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, *, levels: int, ema: bool
) -> dict[str, Tensor]:
    """Pick out and rename the weights named in ``expected`` (own names, with the shapes they must have).

    With ``ema`` the averaged weights are taken; a file that has none gives its live ones, with a warning.
    Raises ``ValueError`` naming the checkpoint's key for a missing or misshapen weight, and for weights of
    the encoder, decoder or quantizer that the model has no place for.
    """
    averaged = ema and any(name.startswith("model_ema.") for name in state)
    if ema and not averaged:
        warnings.warn(f"{path}: no averaged weights (model_ema.*): loading the live ones", stacklevel=4)
    renamed: dict[str, Tensor] = {}
    used: set[str] = set()
    for own, wanted in expected.items():
        live = reference_name(own, levels)
        used.add(live)
        name = average_name(live) if averaged else live
        if name not in state:
            raise ValueError(f"{path}: weight {name!r} {list(wanted.shape)} is missing")
        if state[name].shape != wanted.shape:
            raise ValueError(
                f"{path}: weight {name!r}: expected shape {list(wanted.shape)}, got {list(state[name].shape)}"
            )
        renamed[own] = state[name]
    for name in state:
        if name.startswith(_TOKENIZER_PREFIXES) and name not in used:
            raise ValueError(f"{path}: unexpected weight {name!r} {list(state[name].shape)}")
    return renamed


_TOKENIZER_PREFIXES = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_RENAMES = (
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"\.middle\.block([12])\.", r".mid.block_\1."),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.blocks\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.query\.", ".q."),
    (r"\.key\.", ".k."),
    (r"\.value\.", ".v."),
    (r"\.out\.", ".proj_out."),
    (r"^encoder\.(.*)\.resize\.", r"encoder.\1.downsample.conv."),
    (r"^decoder\.(.*)\.resize\.", r"decoder.\1.upsample.conv."),
    (r"^encoder\.levels\.", "encoder.down."),
)


def reference_name(own: str, levels: int) -> str:
    """The published implementation's name of the tokenizer's parameter ``own``.

    It numbers the decoder's levels by resolution, finest first; here they stand in the order they run.
    """
    name = own
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.levels\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)


def average_name(live: str) -> str:
    """The entry that holds the average of the parameter that the published implementation calls ``live``."""
    return "model_ema." + live.replace(".", "")


def published_order(names: Iterable[str], levels: int) -> list[str]:
    """Own parameter names in the order in which the published implementation registers its own.

    ``names`` come in the order of the tokenizer's ``named_parameters``. Its optimizer numbers them so.
    """

    def place(own: str) -> tuple[int, int, int]:
        name = reference_name(own, levels)
        up = re.match(r"decoder\.up\.(\d+)\.", name)
        section = 1 if up else 2 if re.match(r"decoder\.(norm|conv)_out\.", name) else 0
        module = _TOKENIZER_PREFIXES.index(name.split(".")[0] + ".")
        return module, section, int(up[1]) if up else 0

    return sorted(names, key=place)


def discriminator_weights(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The patch discriminator's weights in a tokenizer checkpoint, under own names, in the order they run."""
    prefix = "loss.discriminator.main."
    weights = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    if sum(tensor.ndim == 4 for tensor in weights.values()) < 3:
        raise ValueError(
            f"{path}: no patch discriminator: expected the convolutions {prefix}*, got {len(weights)} keys"
        )
    try:
        ordered = sorted(weights, key=lambda name: int(name.split(".")[0]))
    except ValueError as error:
        raise ValueError(f"{path}: {prefix}*: expected numbered layers, got {sorted(weights)}") from error
    return {f"layers.{name}": weights[name] for name in ordered}


def _last_blocks(state: Mapping[str, Tensor], path: Path) -> list[int]:
    """The number of the last block of each encoder level, which has to be the same everywhere."""
    found = re.compile(r"encoder\.down\.(\d{1,3})\.block\.(\d{1,3})\.conv2\.weight")
    last = _maxima((int(m[1]), int(m[2])) for m in map(found.fullmatch, state) if m)
    if sorted(last) != list(range(len(last))) or not last:
        raise ValueError(f"{path}: encoder.down.*: expected levels numbered from 0, got {sorted(last)}")
    if len(set(last.values())) > 1:
        counts = [last[level] + 1 for level in sorted(last)]
        raise ValueError(f"{path}: encoder.down.*: expected as many blocks at every level, got {counts}")
    return [last[level] for level in sorted(last)]


def _maxima(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    largest: dict[int, int] = {}
    for key, value in pairs:
        largest[key] = max(value, largest.get(key, value))
    return largest


def _shape(state: Mapping[str, Tensor], name: str, rank: int, path: Path) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(
            f"{path}: weight {name!r} is missing: not a tokenizer checkpoint, or an incomplete one"
        )
    shape = tuple(state[name].shape)
    if len(shape) != rank or 0 in shape:
        raise ValueError(
            f"{path}: weight {name!r}: expected {rank} dimensions, none empty, got {list(shape)}"
        )
    return shape


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"[Uu]nsupported class ([\w.]+)", message)
    if found is None:
        detail = re.search(r"WeightsUnpickler error: ([^\n]*)", message)
        reason = detail.group(1) if detail else message.splitlines()[0]
        return f"{path}: truncated or corrupt, not a readable checkpoint: {reason}"
    return (
        f"{path}: refused: it holds a pickled object ({found.group(1)}), and rebuilding that could run code "
        "from the file; save the checkpoint again with tensors and plain containers only"
    )
