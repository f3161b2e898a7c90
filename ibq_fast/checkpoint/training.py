"""Training checkpoints that survive a kill at any moment.

A checkpoint is a folder ``step-00000050`` under the run's ``checkpoints/``: named parts (``model``,
``optimizer``, …), each a safetensors and a JSON file, and ``manifest.json`` with the size and SHA-256 of
every file, written last. It is written to a folder with a temporary name beside its place, every file is
flushed to the disk, and one rename gives it its name. So a folder with a proper name is complete unless the
disk itself lost something, and that is what the manifest finds: :func:`latest_checkpoint` checks it and
falls back to the one before.

A finished checkpoint is never overwritten: a second one of the same step is called ``step-00000050.1``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ibq_fast.checkpoint.tensor_tree import RowsOf, open_for_writing, read_tree, write_tree

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2  # 2: optimizer state by parameter name
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_TEMPORARY = ".writing-"


class CheckpointWriteError(OSError):
    """The disk was full (or a quota reached) while saving; the checkpoints written before are untouched."""


class DamagedCheckpointError(ValueError):
    """A checkpoint's files do not match its manifest."""


def save_checkpoint(root: Path, step: int, parts: Mapping[str, Any], *, keep_last: int = 3) -> Path:
    """Write ``parts`` as the checkpoint of ``step`` under ``root`` and drop all but the newest
    ``keep_last``.

    ``parts`` maps a name to a nested state (see :mod:`ibq_fast.checkpoint.tensor_tree`). Returns the
    folder. Raises CheckpointWriteError if the disk is full: nothing half-written stays behind, nothing
    older is deleted.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: expected at least 1, got {keep_last}")
    root.mkdir(parents=True, exist_ok=True)
    remove_unfinished(root)
    temporary = root / f"{_TEMPORARY}step-{step:08d}"
    try:
        temporary.mkdir()
        files: dict[str, Any] = {}
        for name, state in parts.items():
            files.update(write_tree(temporary, name, state))
        manifest = {"format": FORMAT, "step": step, "parts": list(parts), "files": files}
        with open_for_writing(temporary / MANIFEST) as out:
            out.write(json.dumps(manifest, indent=1).encode())
            out.flush()
            os.fsync(out.fileno())
        _flush_folder(temporary)
        final = _free_path(root / f"step-{step:08d}")
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(root).free / 2**20
        raise CheckpointWriteError(
            error.errno,
            f"the checkpoint of step {step} was not written, {os.strerror(error.errno)} "
            f"({free:.0f} MiB free); older checkpoints are intact",
            str(root),
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(root)
    for old in list_checkpoints(root)[:-keep_last]:
        _remove(old)
    return final


def load_checkpoint(folder: Path, rows: RowsOf = lambda key, shape: None) -> dict[str, Any]:
    """Check ``folder`` against its manifest and read its parts, of each tensor the ``rows`` asked for (see
    :func:`read_tree`). Raises DamagedCheckpointError.
    """
    manifest = check_checkpoint(folder)
    return {"step": manifest["step"], **{name: read_tree(folder, name, rows) for name in manifest["parts"]}}


def latest_checkpoint(
    root: Path, say: Callable[[str], None] = log.warning, *, set_aside: bool = False
) -> Path | None:
    """The newest checkpoint under ``root`` whose files match its manifest; None if there is none.

    Unfinished folders are ignored. A damaged checkpoint is passed over, and ``say`` is told which and why;
    with ``set_aside`` it is also renamed to ``damaged-…``, so that a run that goes on from an older one
    does not count it among its own.
    """
    for folder in reversed(list_checkpoints(root)):
        try:
            check_checkpoint(folder)
        except DamagedCheckpointError as damage:
            say(f"checkpoint passed over: {damage}")
            if set_aside:
                folder.rename(_free_path(folder.with_name(f"damaged-{folder.name}")))
            continue
        return folder
    return None


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Compare every file with the manifest's size and SHA-256; returns the manifest. Raises
    DamagedCheckpointError.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, found = manifest["files"], manifest["format"]
        manifest["step"], manifest["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder}: no readable {MANIFEST} ({error})") from error
    if found != FORMAT:
        raise DamagedCheckpointError(f"{folder}: expected checkpoint format {FORMAT}, got {found}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path}: missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpointError(f"{path}: expected {expected['bytes']} bytes, got {size}")
        if _digest(path) != expected["sha256"]:
            raise DamagedCheckpointError(f"{path}: its contents do not match the checksum")
    return manifest


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints under ``root``, oldest first (not checked)."""
    if not root.is_dir():
        return []
    found = []
    for folder in root.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), int(match[2] or 0), folder))
    return [folder for _, _, folder in sorted(found)]


def remove_unfinished(root: Path) -> None:
    """Delete what a killed save or a killed deletion left behind."""
    for folder in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _free_path(path: Path) -> Path:
    """``path``, or the first of ``path.1``, ``path.2``, … that does not exist yet."""
    revision, free = 0, path
    while free.exists():
        revision += 1
        free = path.with_name(f"{path.name}.{revision}")
    return free


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    """Renamed before it is deleted: a kill in between leaves no damaged folder with a proper name."""
    doomed = folder.with_name(f"{_TEMPORARY}removed-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
