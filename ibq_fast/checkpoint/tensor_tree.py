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
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

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


def flatten(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split ``state`` into a JSON-ready tree and the tensors it held, by path.

    Raises TypeError, naming the path, for a value that neither JSON nor safetensors can hold.
    """
    tensors: dict[str, torch.Tensor] = {}
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


def read_tree(folder: Path, name: str) -> Any:
    """Read what :func:`write_tree` wrote; tensors come back on the CPU."""
    tree = json.loads((folder / f"{name}.json").read_text())
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        # Cloned: the library maps the file, and a mapped tensor dies with its file (a bus error).
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    return unflatten(tree, tensors)


def open_for_writing(path: Path) -> BinaryIO:
    """The one place where a checkpoint's file is opened for writing."""
    return open(path, "wb")


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
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


def _safetensors_chunks(tensors: dict[str, torch.Tensor]) -> Any:
    """The bytes of a safetensors file: header length, JSON header padded to 8, then each tensor's data.

    Written here rather than by the library so that the file is hashed on its way out, one tensor at a time
    leaves the device, and a full disk shows as the operating system's own OSError.
    """
    header: dict[str, Any] = {}
    # The format wants the tensors of one file aligned: widest items first keeps every one of them so.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    offset = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"state{key}: expected one of {sorted(map(str, _DTYPES))}, got {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
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
        flat = tensors[key].detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
