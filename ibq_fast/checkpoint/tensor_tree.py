"""A nested state (dicts, lists, tuples, numbers, strings, tensors) as one safetensors file and one JSON
file.

Training state is written without pickle: tensors go to ``<name>.safetensors``, the rest to ``<name>.json``
with every tensor replaced by ``{"$tensor": key}``. What JSON cannot say plainly is marked the same way:
tuples (``$tuple``), dicts with keys that are no strings (``$items``), bytes (``$bytes``, hexadecimal).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open

RowsOf = Callable[[str, Sequence[int]], slice | None]

# The names the safetensors format gives to dtypes.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class PiecewiseTensor(Protocol):
    """A tensor that is written piece by piece, and is nowhere whole."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def pieces(self) -> Iterator[torch.Tensor]:
        """Consecutive rows, once."""

    def finish(self) -> None:
        """Let go of the pieces that nobody has taken."""


def piecewise(state: Any) -> list[PiecewiseTensor]:
    """The piecewise tensors of ``state``, in the order in which :func:`write_tree` takes their pieces."""
    _, tensors = flatten(state)
    return [tensors[key] for key in _order(tensors) if not isinstance(tensors[key], torch.Tensor)]


def flatten(state: Any) -> tuple[Any, dict[str, Any]]:
    """Split ``state`` into a JSON-ready tree and the tensors it held (piecewise ones too), by path.

    Raises TypeError, naming the path, for a value that neither JSON nor safetensors can hold.
    """
    tensors: dict[str, Any] = {}
    return _flatten(state, "", tensors), tensors


def unflatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of :func:`flatten`."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((kind, content),) = tree.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$tuple":
            return tuple(unflatten(item, tensors) for item in content)
        if kind == "$items":
            return {key: unflatten(value, tensors) for key, value in content}
        if kind == "$bytes":
            return bytes.fromhex(content)
    return {key: unflatten(value, tensors) for key, value in tree.items()}


def write_tree(folder: Path, name: str, state: Any) -> dict[str, dict[str, Any]]:
    """Write ``state`` as ``name.safetensors`` + ``name.json`` under ``folder``, flushed to the disk.

    Returns ``{file name: {"bytes": size, "sha256": digest}}``. Raises OSError as the file system gives it.
    """
    tree, tensors = flatten(state)
    text = json.dumps(tree).encode()
    written = {}
    for file, chunks in (
        (f"{name}.safetensors", _safetensors_chunks(tensors)),
        (f"{name}.json", iter([text])),
    ):
        digest, size = hashlib.sha256(), 0
        with open_for_writing(folder / file) as out:
            for chunk in chunks:
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            out.flush()
            os.fsync(out.fileno())
        written[file] = {"bytes": size, "sha256": digest.hexdigest()}
    return written


def read_tree(folder: Path, name: str, rows: RowsOf = lambda key, shape: None) -> Any:
    """Read what :func:`write_tree` wrote; tensors come back on the CPU.

    ``rows(key, shape)`` says which rows of a tensor to read (None: all).
    """
    tree = json.loads((folder / f"{name}.json").read_text())
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        # Cloned: the library maps the file, and a mapped tensor dies with its file (a bus error).
        tensors = {}
        for key in file.keys():  # noqa: SIM118
            stored = file.get_slice(key)
            part = rows(key, stored.get_shape())
            tensors[key] = (file.get_tensor(key) if part is None else stored[part.start : part.stop]).clone()
    return unflatten(tree, tensors)


def open_for_writing(path: Path) -> BinaryIO:
    """The one place where a checkpoint's file is opened for writing."""
    return open(path, "wb")


def _flatten(value: Any, path: str, tensors: dict[str, Any]) -> Any:
    if isinstance(value, torch.Tensor) or hasattr(value, "pieces"):
        key = path if path not in tensors else f"{path}#{len(tensors)}"  # {"a/b": …} beside {"a": {"b": …}}
        tensors[key] = value
        return {"$tensor": key}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [(key, _flatten(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(pairs) if plain else {"$items": [list(pair) for pair in pairs]}
    raise TypeError(
        f"state{path}: expected tensors, numbers, strings, lists, tuples or dicts, got {type(value)}"
    )


def _order(tensors: dict[str, Any]) -> list[str]:
    """The format wants the tensors of one file aligned: widest items first keeps every one of them so."""
    return sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))


def _safetensors_chunks(tensors: dict[str, Any]) -> Any:
    """The bytes of a safetensors file: header length, JSON header padded to 8, then each tensor's data.

    Written here rather than by the library so that the file is hashed on its way out, one tensor at a time
    leaves the device, and a full disk shows as the operating system's own OSError.
    """
    header: dict[str, Any] = {}
    order = _order(tensors)
    offset = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"state{key}: expected one of {sorted(map(str, _DTYPES))}, got {tensor.dtype}")
        end = offset + tensor.shape.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in order:
        tensor = tensors[key]
        for piece in [tensor] if isinstance(tensor, torch.Tensor) else tensor.pieces():
            flat = piece.detach().to("cpu").contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data
