"""The skip tolerance as a setting: its values, its environment variable, what it refuses."""

import os
import subprocess
import sys

import pytest

from ibq_fast.ops import set_skip_tolerance, skip_tolerance


def test_default_and_restoring() -> None:
    assert skip_tolerance() == 2.0**-32
    set_skip_tolerance(1e-4)
    assert skip_tolerance() == 1e-4
    set_skip_tolerance(None)
    assert skip_tolerance() == 2.0**-32


@pytest.mark.parametrize("value", [-1e-9, 0.02, float("nan"), float("inf")])
def test_refuses_what_is_no_tolerance(value) -> None:
    with pytest.raises(ValueError, match="tolerance: expected a number from 0 to"):
        set_skip_tolerance(value)
    assert skip_tolerance() == 2.0**-32


@pytest.mark.parametrize(("text", "shown"), [("0", "0.0"), ("0.001", "0.001"), ("much", "IBQ_FAST_SKIP")])
def test_environment_variable(text, shown) -> None:
    program = "import ibq_fast.ops; print(ibq_fast.ops.skip_tolerance())"
    environment = {**os.environ, "IBQ_FAST_SKIP_TOLERANCE": text}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert shown in done.stdout + done.stderr
    assert (done.returncode == 0) == (text != "much")
