"""Stage-two checkpoints of the published implementation: ``transformer.*`` beside ``first_stage_model.*``.

Names map one to one, but for the MLP, whose two input matrices are one here:

    tok_emb                              token_embedding
    class_emb.embedding_table            class_embedding
    embedding_projection.fc1, fc2        token_projection.expand, out
    shared_ada_lin.1                     shared_adaln
    blocks.N.attention.wqkv, wo          blocks.N.attention.qkv, out
    blocks.N.feed_forward.w1, w3         blocks.N.mlp.gate_up (w1's rows, then w3's)
    blocks.N.feed_forward.w2             blocks.N.mlp.down
    blocks.N.attention_norm, ffn_norm    blocks.N.attention_norm, mlp_norm
    blocks.N.ada_lin.1                   blocks.N.adaln
    blocks.N.ada_gss [1, 1, 6, C]        blocks.N.adaln_offset [6, C]
    head_nm.rmsnorm, head_nm.ada_lin.1   head_norm.norm, head_norm.adaln
    head                                 head

The map is linear, so it carries gradients and optimizer moments as well as weights, both ways.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ibq_fast.generator.config import GeneratorConfig

_PREFIX = "transformer."
_FULL_NAMES = {
    "tok_emb.weight": "token_embedding.weight",
    "class_emb.embedding_table.weight": "class_embedding.weight",
    "embedding_projection.fc1.weight": "token_projection.expand.weight",
    "embedding_projection.fc1.bias": "token_projection.expand.bias",
    "embedding_projection.fc2.weight": "token_projection.out.weight",
    "embedding_projection.fc2.bias": "token_projection.out.bias",
    "shared_ada_lin.1.weight": "shared_adaln.weight",
    "shared_ada_lin.1.bias": "shared_adaln.bias",
    "head_nm.rmsnorm.weight": "head_norm.norm.weight",
    "head_nm.ada_lin.1.weight": "head_norm.adaln.weight",
    "head_nm.ada_lin.1.bias": "head_norm.adaln.bias",
    "head.weight": "head.weight",
}
_BLOCK_NAMES = {
    "attention.wqkv.weight": "attention.qkv.weight",
    "attention.wo.weight": "attention.out.weight",
    "feed_forward.w2.weight": "mlp.down.weight",
    "attention_norm.weight": "attention_norm.weight",
    "ffn_norm.weight": "mlp_norm.weight",
    "ada_lin.1.weight": "adaln.weight",
    "ada_lin.1.bias": "adaln.bias",
    "ada_gss": "adaln_offset",
}
_GATE, _UP, _GATE_UP = "feed_forward.w1.weight", "feed_forward.w3.weight", "mlp.gate_up.weight"
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")

_log = logging.getLogger(__name__)


def from_reference_layout(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The generator's tensors of a reference state under this package's names.

    ``state`` may be a whole checkpoint (``transformer.*``, anything else ignored) or the transformer's own
    state dict. Raises ``ValueError`` naming ``source`` for a name or a half of a pair it does not know.
    """
    tensors = {name[len(_PREFIX) :]: value for name, value in state.items() if name.startswith(_PREFIX)}
    tensors = tensors or dict(state)
    if "head.weight" not in tensors:
        raise ValueError(f"{source}: expected a stage-two checkpoint with {_PREFIX}* weights, got none")
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        in_block = _BLOCK.fullmatch(name)
        if name in _FULL_NAMES:
            renamed[_FULL_NAMES[name]] = value
        elif in_block and in_block[2] in _BLOCK_NAMES:
            offset = in_block[2] == "ada_gss"
            renamed[in_block[1] + _BLOCK_NAMES[in_block[2]]] = value.flatten(0, 2) if offset else value
        elif in_block and in_block[2] in (_GATE, _UP):
            pair = [tensors.get(in_block[1] + half) for half in (_GATE, _UP)]
            if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
                raise ValueError(f"{source}: {name}: expected w1 and w3 of one shape, got one or two shapes")
            renamed[in_block[1] + _GATE_UP] = torch.cat((pair[0], pair[1]))
        else:
            raise ValueError(f"{source}: unexpected weight {name!r} {list(value.shape)}")
    return renamed


def to_reference_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A generator's state dict under the reference's names (without ``transformer.``), ready to be saved."""
    full = {own: theirs for theirs, own in _FULL_NAMES.items()}
    block = {own: theirs for theirs, own in _BLOCK_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        in_block = _BLOCK.fullmatch(name)
        if name in full:
            renamed[full[name]] = value
        elif in_block and in_block[2] == _GATE_UP:
            gate, up = value.chunk(2)
            renamed[in_block[1] + _GATE], renamed[in_block[1] + _UP] = gate.clone(), up.clone()
        elif in_block and in_block[2] in block:
            renamed[in_block[1] + block[in_block[2]]] = (
                value[None, None] if in_block[2] == "adaln_offset" else value
            )
        else:
            raise ValueError(f"state: unexpected weight {name!r} {list(value.shape)}")
    return renamed


def infer_config(
    tensors: Mapping[str, Tensor],
    source: Path,
    *,
    num_heads: int | None = None,
    grid: int | tuple[int, int] | None = None,
) -> GeneratorConfig:
    """Read the architecture off the shapes of renamed tensors.

    Shapes show neither the number of heads (default: heads of 64 channels) nor the grid (default: the 16 x 16
    of the published models; an int is a square's side). Raises ``ValueError`` when shapes contradict each
    other or the given number of heads.
    """
    try:
        vocab_size, width = tensors["head.weight"].shape
        token_dim = tensors["token_embedding.weight"].shape[1]
        num_classes = tensors["class_embedding.weight"].shape[0] - 1
        qkv_rows = tensors["blocks.0.attention.qkv.weight"].shape[0]
        mlp_hidden = tensors["blocks.0.mlp.down.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{source}: weights missing or misshapen, no architecture to read: {error}"
        ) from error
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    if num_heads is None:
        num_heads = max(1, width // 64)
    if not isinstance(num_heads, int) or num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the width {width}, got {num_heads!r}")
    kv_rows = qkv_rows - width
    if kv_rows <= 0 or kv_rows % (2 * (width // num_heads)):
        raise ValueError(
            f"num_heads: {source} has {qkv_rows} rows of queries, keys and values at width {width}; "
            f"{num_heads} heads do not divide them"
        )
    if grid is None:
        _log.warning(
            "%s: checkpoints do not record the token grid; taking 16 x 16 (grid= says otherwise)", source
        )
        grid = (16, 16)
    return GeneratorConfig(
        vocab_size=vocab_size,
        num_classes=num_classes,
        grid=(grid, grid) if isinstance(grid, int) else grid,
        depth=depth,
        num_heads=num_heads,
        width=width,
        num_kv_heads=kv_rows // (2 * (width // num_heads)),
        mlp_hidden=mlp_hidden,
        token_dim=token_dim if "token_projection.expand.weight" in tensors else None,
        shared_adaln="shared_adaln.weight" in tensors,
    )
