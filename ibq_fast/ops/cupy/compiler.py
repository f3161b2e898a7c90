"""NVRTC: a kernel of ``kernels/cuda`` as machine code for one architecture, kept on disk.

CuPy's own ``RawModule(code=...)`` is not used to compile, for two reasons: it asks for ``sm_90`` where wgmma
needs ``sm_90a``, and its cache does not notice a changed header. The binding to NVRTC is CuPy's.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq_fast.ops.cupy import sources

# Architectures whose own instructions (wgmma, tcgen05) need the target with an "a".
_SPECIFIC = (90, 100)
OPTIONS = ("-std=c++17",)


@dataclass(frozen=True)
class Compiled:
    """One kernel: its machine code, and the symbol by which that code knows it."""

    path: Path
    symbol: str


def architecture(major: int, minor: int) -> str:
    """NVRTC's name of a compute capability: ``"sm_90a"`` for 9.0, ``"sm_86"`` for 8.6."""
    number = 10 * major + minor
    return f"sm_{number}a" if number in _SPECIFIC else f"sm_{number}"


def cache_folder() -> Path:
    """``IBQ_FAST_CACHE``, else ``ibq_fast`` in the user's cache folder."""
    own = os.environ.get("IBQ_FAST_CACHE")
    return (
        Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ibq_fast"
    )


def compiled(source: str, name: str, target: str) -> Compiled:
    """Kernel ``name`` (a C++ name, template arguments included) of ``kernels/cuda/<source>`` for ``target``.

    Compiled on the first call ever, then found on disk. Raises RuntimeError with NVRTC's words when the
    source does not compile.
    """
    nvrtc = _nvrtc()
    version = ".".join(map(str, nvrtc.getVersion()))
    key = "\0".join((source, name, target, version, sources.fingerprint(), *OPTIONS))
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    symbol = path.with_suffix(".symbol")
    if not path.is_file():
        code, symbols = compile_source(source, (name,), target)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(symbol, symbols[name].encode())  # first: whoever finds the code finds its symbol
        _write(path, code)
    return Compiled(path, symbol.read_text())


def compile_source(source: str, names: tuple[str, ...], target: str) -> tuple[bytes, dict[str, str]]:
    """Machine code of kernels ``names`` of one source, and their symbols. Needs NVRTC, and no driver."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(f'#include "cuda/{source}"\n', f"{source}.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (f"-arch={target}", f"-I{sources.root()}", *OPTIONS))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"{source} does not compile for {target} ({error}):\n{log}") from error
        return nvrtc.getCUBIN(program), {name: nvrtc.getLoweredName(program, name) for name in names}
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def _nvrtc() -> Any:
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it, whoever else writes it at the same time."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
