"""The skip tolerance: how much of a row's softmax the native kernels may leave out.

Of P = softmax(S) and of softmax(S/τ), entries below tolerance / K of their row are negligible: together they
are less than ``tolerance`` of it, whatever K and however flat or peaked the row. A tile of nothing else adds
nothing to readouts and gradients and is skipped. The default, 2⁻³², is far below the rounding of float32; 0
skips nothing; more is faster on peaked rows and drops what you allow it to. Indices, maxima, log-sum-exps,
entropies' values and the other backends know no skipping.
"""

from __future__ import annotations

import os

from ibq_fast.ops import native

ENVIRONMENT_VARIABLE = "IBQ_FAST_SKIP_TOLERANCE"
DEFAULT = 2.0**-32
_tolerance = DEFAULT


def set_skip_tolerance(tolerance: float | None) -> None:
    """Set it for this process, from 0 (skip nothing) to 0.01; None restores the default.

    Raises ValueError for anything else. IBQ_FAST_SKIP_TOLERANCE in the environment sets the first value.
    """
    global _tolerance
    value = DEFAULT if tolerance is None else float(tolerance)
    if not 0.0 <= value <= 0.01:
        raise ValueError(f"tolerance: expected a number from 0 to 0.01, got {tolerance!r}")
    _tolerance = value
    if native.UNAVAILABLE is None:
        from ibq_fast import _C

        _C.set_skip_tolerance(value)


def skip_tolerance() -> float:
    """The tolerance in force."""
    return _tolerance


def _from_environment() -> None:
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if text is None:
        return
    try:
        set_skip_tolerance(float(text))
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected a number from 0 to 0.01, got {text!r}") from error


_from_environment()
