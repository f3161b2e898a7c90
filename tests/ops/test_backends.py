"""The table of backends: what is chosen, what is refused, what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from ibq_fast import ops
from ibq_fast.ops import backends


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_forced_here", None)
    monkeypatch.setattr(backends, "_forced_by_environment", None)
    monkeypatch.setattr(backends, "_SAID", set())


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table as it is in an installation whose extension was not built."""
    monkeypatch.setattr(backends.native, "UNAVAILABLE", "the C++ extension is not built")
    monkeypatch.setattr(backends, "_TABLE", {})
    for op in ("codebook_search", "straight_through_select", "softmax_statistics"):
        backends.add(op, backends.FLOATS)
    backends.add("code_histogram", (torch.int64,))


def test_native_is_available() -> None:
    """The build is part of running the tests: an extension that does not load fails here, with the reason."""
    reasons = {row.reason for row in ops.backend_report() if not row.available}
    assert ops.available_backends() == ("native", "composite"), reasons
    for dtype in (torch.bfloat16, torch.float16):
        assert ops.available_backends("cpu", dtype) == ("native", "composite")


def test_native_is_preferred_on_the_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("codebook_search", "cpu", torch.float32) is (
            torch.ops.ibq_fast.codebook_search.default
        )
    assert {row.backend for row in ops.backend_report() if row.chosen} == {"native"}


def test_falling_back_is_said_once_with_the_reason() -> None:
    z, codebook = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"composite backend, because native does not take torch.float64"):
        ops.codebook_search(z, codebook)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.codebook_search(z, codebook)


def test_without_the_extension_everything_still_works(monkeypatch) -> None:
    without_extension(monkeypatch)
    z, codebook = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="the C\\+\\+ extension is not built"):
        ops.straight_through_select(z, codebook).z_q.sum().backward()
    assert ops.available_backends() == ("composite",)
    rows = ops.backend_report()
    assert [row.available for row in rows if row.backend == "native"] == [False] * 4
    assert {row.backend for row in rows if row.chosen} == {"composite"}
    with pytest.raises(ValueError, match="the C\\+\\+ extension is not built"):
        ops.codebook_search(z, codebook, backend="native")
    with pytest.raises(ValueError, match="expected one that is available, got 'native'"):
        ops.set_backend("native")


def test_order_of_choices(monkeypatch) -> None:
    def chosen(requested=None) -> str:
        return backends.select("codebook_search", "cpu", torch.float32, requested).namespace

    monkeypatch.setattr(backends, "_forced_by_environment", "composite")
    assert chosen() == "ibq_fast_composite"
    ops.set_backend("native")
    assert chosen() == "ibq_fast"
    assert chosen("composite") == "ibq_fast_composite"
    ops.set_backend(None)
    assert chosen() == "ibq_fast_composite"


@pytest.mark.parametrize("force", [ops.set_backend, lambda name: ops.code_histogram(_INDEX, 2, backend=name)])
def test_an_unknown_choice_is_refused(force) -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of native, .*, got 'cudnn'"):
        force("cudnn")


_INDEX = torch.tensor([0])


def test_a_forced_backend_that_cannot_serve_is_refused() -> None:
    z = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'native' .the backend argument. cannot serve codebook_search"):
        ops.codebook_search(z, z, backend="native")
    ops.set_backend("native")
    with pytest.raises(ValueError, match=r"'native' .set_backend. cannot serve codebook_search"):
        ops.codebook_search(z, z)
    assert not any(
        row.chosen for row in ops.backend_report("cpu", torch.float64) if row.op != "code_histogram"
    )


def test_environment_variable(monkeypatch) -> None:
    program = (
        "import torch; from ibq_fast.ops import backends;"
        "print(backends.select('codebook_search', 'cpu', torch.float32).namespace)"
    )
    environment = {**os.environ, "IBQ_FAST_BACKEND": "composite", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ibq_fast_composite"]
    monkeypatch.setattr(backends, "_forced_by_environment", "cudnn")
    with pytest.raises(ValueError, match=r"expected one of native, .*, got 'cudnn'"):
        ops.codebook_search(torch.zeros(1, 2), torch.zeros(3, 2))


def test_a_row_of_the_table_checks_itself() -> None:
    with pytest.raises(ValueError, match="name: expected one of"):
        backends.Backend("cudnn", "op", (), (), (torch.float32,), "absent", None)
    with pytest.raises(ValueError, match="either a callable or a reason"):
        backends.Backend("native", "op", (), (), (torch.float32,), None, None)
