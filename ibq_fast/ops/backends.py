"""The table of backends: which implementation of an operator serves a device and a dtype.

A choice is made for every call, in this order: the call's ``backend=`` argument, :func:`set_backend`, the
environment variable ``IBQ_FAST_BACKEND`` (read at import), the first row of the table that fits. A forced
choice that is unknown or cannot serve the call raises ValueError; passing over a preferred row is said
once, with the reason. The generator's operators exist in fewer backends than the codebook's: a name forced
for all calls does not reach an operator that has no such row, which is said once too. Under
``torch.compile`` the choice is made while tracing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ibq_fast.ops import cupy, native, proof, triton
from ibq_fast.ops.registration import COMPOSITE_NAMESPACE, NAMESPACES, overload

ENVIRONMENT_VARIABLE = "IBQ_FAST_BACKEND"
NAMES = tuple(NAMESPACES)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8)

# Devices whose kernels the tests of every build show to be right. Those of a GPU need a committed result for
# its architecture (proof.py); until there is one they are served by a forced choice.
PROVEN_BY_TESTS: tuple[str, ...] = ("cpu",)
# Under Triton's interpreter, which is for tests.
TRITON_PROVEN_BY_TESTS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backend:
    """One row: an implementation of ``op``.

    devices: device types served, empty for all. automatic: device types on which it is chosen unasked, None
    for all; on a GPU that is not among them a committed result decides. unavailable: why it cannot be used at
    all here, or None. call: the operator.
    """

    name: str
    op: str
    devices: tuple[str, ...]
    automatic: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    unavailable: str | None
    call: Callable[..., Any] | None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name: expected one of {NAMES}, got {self.name!r}")
        if (self.call is None) == (self.unavailable is None):
            raise ValueError(
                f"{self.op}/{self.name}: expected either a callable or a reason why there is none"
            )

    def refusal(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why this row cannot serve the device and dtype, or None."""
        if self.unavailable is not None:
            return self.unavailable
        if self.devices and device_type not in self.devices:
            return f"this build has no {self.name} kernels for {device_type}"
        if dtype not in self.dtypes:
            return f"{self.name} does not take {dtype}"
        return None

    def hesitation(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why this row is not chosen unasked on the device, or None."""
        if self.automatic is None or device_type in self.automatic:
            return None
        if device_type != "cuda":
            return f"{self.name} kernels are not proven on this {device_type} and have to be asked for"
        doubt = proof.doubt(self.op, self.name, str(dtype).removeprefix("torch."))
        return doubt and f"{doubt}: they have to be asked for"


@dataclass(frozen=True)
class BackendStatus:
    """A row as ``ibq-fast doctor`` prints it; ``reason`` says why it is or is not chosen."""

    op: str
    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    available: bool
    chosen: bool
    reason: str


_TABLE: dict[str, tuple[Backend, ...]] = {}
_SAID: set[str] = set()
_forced_here: str | None = None
_forced_by_environment: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


def add(
    op: str,
    dtypes: tuple[torch.dtype, ...],
    also: tuple[str, ...] = (),
    names: tuple[str, ...] = NAMES,
) -> None:
    """Enter the rows of ``op``, preferred first; ``also`` names operators that its gradient needs, ``names``
    the backends that it is written for."""
    rows = {
        "native": lambda: _native(op, dtypes, also),
        "triton": lambda: _triton(op, dtypes),
        "cupy": lambda: _cupy(op, dtypes, also),
        "composite": lambda: Backend(
            "composite", op, (), None, dtypes, None, overload(COMPOSITE_NAMESPACE, op)
        ),
    }
    _TABLE[op] = tuple(rows[name]() for name in names)


def _native(op: str, dtypes: tuple[torch.dtype, ...], also: tuple[str, ...]) -> Backend:
    devices = tuple(
        device
        for device in native.device_types(op)
        if all(device in native.device_types(name) for name in also)
    )
    reason = native.UNAVAILABLE
    if reason is None:
        missing = [name for name in (op, *also) if not native.registered(name)]
        reason = f"the built extension lacks {', '.join(missing)}: build it again" if missing else None
    return Backend(
        "native",
        op,
        devices,
        PROVEN_BY_TESTS,
        tuple(dtype for dtype in dtypes if dtype in NATIVE_DTYPES),
        reason,
        overload(native.NAMESPACE, op) if reason is None else None,
    )


def _triton(op: str, dtypes: tuple[torch.dtype, ...]) -> Backend:
    return Backend(
        "triton",
        op,
        triton.device_types(),
        TRITON_PROVEN_BY_TESTS,
        tuple(dtype for dtype in dtypes if dtype in triton.dtypes()),
        triton.UNAVAILABLE,
        overload(triton.NAMESPACE, op) if triton.UNAVAILABLE is None else None,
    )


def _cupy(op: str, dtypes: tuple[torch.dtype, ...], also: tuple[str, ...]) -> Backend:
    reason = cupy.UNAVAILABLE
    if reason is None and not all(cupy.registered(name) for name in (op, *also)):
        reason = f"CUDA kernels of {op} cannot be compiled at run time yet"
    return Backend(
        "cupy",
        op,
        ("cuda",),
        PROVEN_BY_TESTS,
        tuple(dtype for dtype in dtypes if dtype in cupy.DTYPES),
        reason,
        overload(cupy.NAMESPACE, op) if reason is None else None,
    )


def set_backend(name: str | None) -> None:
    """Force backend ``name`` for every following call; None goes back to choosing.

    Raises ValueError for a name that is unknown or not available in this installation.
    """
    global _forced_here
    if name is not None:
        _known(name)
        for rows in _TABLE.values():
            for row in rows:
                if row.name == name and row.unavailable is not None:
                    raise ValueError(
                        f"backend: expected one that is available, got {name!r}: {row.unavailable}"
                    )
    _forced_here = name


def select(op: str, device_type: str, dtype: torch.dtype, requested: str | None = None) -> Callable[..., Any]:
    """The callable that serves ``op`` on the device type and dtype.

    Raises ValueError when the forced backend is unknown or refuses.
    """
    return _choose(op, device_type, dtype, requested)[0]


def available_backends(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names of the backends whose every floating-point operator can serve the device type and dtype."""
    rows = [row for table in _TABLE.values() for row in table if FLOATS[0] in row.dtypes]
    return tuple(
        name
        for name in NAMES
        if all(row.refusal(device_type, dtype) is None for row in rows if row.name == name)
    )


def backend_report(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> list[BackendStatus]:
    """One row per operator and backend: available, chosen for the device type and dtype, and why."""
    report = []
    for op, rows in _TABLE.items():
        op_dtype = dtype if dtype in rows[-1].dtypes else rows[-1].dtypes[0]
        try:
            chosen, why = _decide(op, device_type, op_dtype, None)
        except ValueError as error:
            chosen, why = None, str(error)
        for row in rows:
            refusal = row.refusal(device_type, op_dtype) or row.hesitation(device_type, op_dtype)
            report.append(
                BackendStatus(
                    op,
                    row.name,
                    row.devices,
                    tuple(str(item).removeprefix("torch.") for item in row.dtypes),
                    row.unavailable is None,
                    row is chosen,
                    (why or "first of the table that fits")
                    if row is chosen
                    else refusal or why or "not preferred",
                )
            )
    return report


def _choose(
    op: str, device_type: str, dtype: torch.dtype, requested: str | None
) -> tuple[Callable[..., Any], str]:
    row, why = _decide(op, device_type, dtype, requested)
    if why and not why.startswith("forced by "):
        _say_once(f"ibq_fast: using the {row.name} backend, because {why}")
    assert row.call is not None
    return row.call, why


def _decide(op: str, device_type: str, dtype: torch.dtype, requested: str | None) -> tuple[Backend, str]:
    """The row for the call, and what was passed over or forced ("" when the first row fits)."""
    rows = _TABLE[op]
    name, origin = _forced(requested)
    if name is not None:
        _known(name)
        for row in rows:
            if row.name == name:
                refusal = row.refusal(device_type, dtype)
                if refusal is not None:
                    raise ValueError(f"backend: {name!r} ({origin}) cannot serve {op}: {refusal}")
                return row, f"forced by {origin}"
        if requested is not None:
            raise ValueError(f"backend: {name!r} ({origin}) cannot serve {op}: it has no such kernels")
    passed_over = "" if name is None else f"{name!r} ({origin}) has no {op}"
    for row in rows:
        refusal = row.refusal(device_type, dtype) or row.hesitation(device_type, dtype)
        if refusal is None:
            return row, passed_over
        passed_over = passed_over or refusal
    raise ValueError(f"{op}: expected a dtype that some backend takes, got {dtype} on {device_type}")


def _forced(requested: str | None) -> tuple[str | None, str]:
    if requested is not None:
        return requested, "the backend argument"
    if _forced_here is not None:
        return _forced_here, "set_backend"
    return _forced_by_environment, ENVIRONMENT_VARIABLE


def _known(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")


@torch.compiler.assume_constant_result
def _say_once(message: str) -> None:
    """Warn, the first time; under torch.compile this runs while tracing."""
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, stacklevel=2)
