"""Calls as a training loop makes them: repeated, on side streams, in CUDA graphs, without waiting."""

from __future__ import annotations

import pytest
import torch
from calls import CALLS
from conftest_of_ops import make_operands

EVERY = pytest.mark.ops(*CALLS)


def made(device, subject, seed=0, size=(150, 700, 48)):
    dtype = torch.float32 if subject.dtype == torch.int64 else subject.dtype
    return device.put(make_operands(*size, dtype=dtype, bias=True, scale=0.5, seed=seed))


def call(subject, x):
    return CALLS[subject.op](x, subject.backend)


@EVERY
def test_the_same_call_gives_the_same_bits(subject, device, deterministic) -> None:
    x = made(device, subject)
    first = [value.clone() for value in call(subject, x)]
    for _ in range(3):
        for a, b in zip(first, call(subject, x), strict=True):
            assert torch.equal(a, b)


@EVERY
def test_a_graph_replays_the_call_on_new_values(subject, device, deterministic) -> None:
    x, other = made(device, subject), made(device, subject, seed=1)
    expected = [value.clone() for value in call(subject, other)]
    replay, out = device.capture(lambda: call(subject, x))
    for name in ("z", "codebook", "bias", "grad_z_q", "grad_codes", "grad_rows"):
        getattr(x, name).copy_(getattr(other, name))
    replay()
    device.wait()
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)


@EVERY
def test_the_current_stream_is_the_one_it_runs_on(subject, device, deterministic) -> None:
    """Operands arrive late on a side stream: a call on any other stream would read what was there before."""
    x, other = made(device, subject), made(device, subject, seed=1)
    expected = [value.clone() for value in call(subject, other)]
    device.wait()
    with device.side_stream():
        device.keep_busy()
        for name in ("z", "codebook", "bias", "grad_z_q", "grad_codes", "grad_rows"):
            getattr(x, name).copy_(getattr(other, name), non_blocking=True)
        out = call(subject, x)
    device.wait()
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)


@EVERY
def test_the_host_never_waits(subject, device) -> None:
    x = made(device, subject)
    call(subject, x)
    device.wait()
    with device.forbid_waiting():
        call(subject, x)


@EVERY
def test_every_output_element_is_written(subject, device) -> None:
    """The allocator hands back memory full of NaN; nothing of it may be left."""
    x = made(device, subject)
    expected = [value.clone() for value in call(subject, x)]
    for value in expected:
        poison = torch.full_like(value, -7 if value.dtype == torch.int64 else float("nan"))
        del poison
    for a, b in zip(call(subject, x), expected, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a, b)
