"""The cupy backend without a GPU: launches that a stand-in sees; compilation where NVRTC is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ibq_fast import _C, ops
from ibq_fast.ops import backends, cupy
from ibq_fast.ops.cupy import compiler, launcher, sources

H100 = (132, 233472, 232448)
SEARCH, FINISH = "codebook_search_kernel", "codebook_search_finish_kernel"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Launch:
    source: str
    name: str
    blocks: int
    threads: int
    shared_bytes: int
    arguments: tuple[bytes, ...]


class StandIn:
    """A launcher that writes down what it is asked for."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.filled: list[tuple[int, int, int]] = []

    def limits(self, device: int) -> tuple[int, int, int]:
        return H100

    def fill(self, device: int, address: int, byte: int, size: int) -> None:
        self.filled.append((address, byte, size))

    def launch(self, device: int, *what) -> None:
        self.launches.append(Launch(*what))


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    recorder = StandIn()
    before = _C.set_cupy_launcher(recorder)
    yield recorder
    _C.set_cupy_launcher(before)


class Schedule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("row_tiles", "code_tiles", "splits", "tiles_per_split")]


class Plan(ctypes.Structure):
    _fields_ = [
        ("schedule", Schedule),
        ("chunks", ctypes.c_int64),
        ("stages", ctypes.c_int),
        ("z_resident", ctypes.c_bool),
        ("blocks_per_multiprocessor", ctypes.c_int),
        ("shared_bytes", ctypes.c_int64),
    ]


class SearchArguments(ctypes.Structure):
    """SearchArguments of kernels/cuda/search_plan.h."""

    _fields_ = [
        ("z", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("access", ctypes.c_int),
        ("plan", Plan),
        ("split_max", ctypes.c_void_p),
        ("split_index", ctypes.c_void_p),
        ("split_sum", ctypes.c_void_p),
        ("inverse_tau", ctypes.c_float),
        ("split_tempered_sum", ctypes.c_void_p),
        ("split_tempered_moment", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("target_logit", ctypes.c_void_p),
        ("split_logits", ctypes.c_void_p),
    ]


def integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


@pytest.mark.parametrize("dtype", list(ELEMENTS))
@pytest.mark.parametrize("with_lse", [False, True])
def test_search_launches_its_kernels_with_the_operands(stand_in, dtype, with_lse) -> None:
    n, k, d = 300, 5000, 64
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    bias = torch.randn(k)
    out = torch.ops.ibq_fast_cupy.codebook_search(z, codebook, bias, 0.5, with_lse, False)
    search, finish = stand_in.launches
    flag = str(with_lse).lower()
    assert search.name == f"ibq::cuda::{SEARCH}<ibq::cuda::Element({ELEMENTS[dtype]}),{flag}>"
    assert finish.name == f"ibq::cuda::{FINISH}<{flag}>"
    assert search.source == finish.source == "search_kernel.cuh"
    (data,) = search.arguments
    assert len(data) == ctypes.sizeof(SearchArguments)
    args = SearchArguments.from_buffer_copy(data)
    assert (args.z, args.codebook, args.bias) == (z.data_ptr(), codebook.data_ptr(), bias.data_ptr())
    assert (args.N, args.K, args.row_bytes, args.access) == (n, k, d * z.element_size(), 16)
    assert args.scale == 0.5
    assert args.plan.chunks == -(-d * z.element_size() // 128)
    assert search.blocks == args.plan.schedule.row_tiles * args.plan.schedule.splits
    assert args.plan.schedule.row_tiles == -(-n // 128)
    assert (search.threads, search.shared_bytes) == (128, args.plan.shared_bytes)
    assert search.shared_bytes <= H100[2]
    statistics = args.plan.schedule.splits * n
    assert args.split_index - args.split_max == 4 * statistics
    assert args.split_sum == (args.split_max + 8 * statistics if with_lse else None)
    assert (finish.blocks, finish.threads, finish.shared_bytes) == (-(-n // 256), 256, 0)
    assert finish.arguments[0] == data
    pointers = [out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr() if with_lse else 0]
    assert [integer(argument) for argument in finish.arguments[1:]] == pointers


def test_operands_become_contiguous_and_narrow_rows_narrow_loads(stand_in) -> None:
    z, codebook = torch.randn(7, 20).to(torch.bfloat16)[:, ::2], torch.randn(9, 10).to(torch.bfloat16)
    torch.ops.ibq_fast_cupy.codebook_search(z, codebook, None, 1.0, False, False)
    args = SearchArguments.from_buffer_copy(stand_in.launches[0].arguments[0])
    assert (args.row_bytes, args.access, args.bias) == (20, 4, None)
    assert args.z != z.data_ptr()


def test_nothing_is_launched_for_no_rows(stand_in) -> None:
    out = torch.ops.ibq_fast_cupy.codebook_search(
        torch.zeros(0, 4), torch.zeros(3, 4), None, 1.0, True, False
    )
    assert [tensor.shape for tensor in out] == [(0,)] * 3
    assert stand_in.launches == []


@pytest.mark.parametrize(("k", "kernel"), [(100, "shared"), (12288, "shared"), (12289, "global")])
def test_histogram_zeroes_and_counts(stand_in, k, kernel) -> None:
    indices = torch.randint(k, (5000,))
    counts = torch.ops.ibq_fast_cupy.code_histogram(indices, k)
    assert counts.shape == (k,)
    assert stand_in.filled == [(counts.data_ptr(), 0, 8 * k)]
    (launch,) = stand_in.launches
    assert launch.name == f"ibq::cuda::histogram_{kernel}_kernel"
    assert (launch.blocks, launch.threads) == (-(-5000 // 4096), 512)
    assert launch.shared_bytes == (4 * k if kernel == "shared" else 0)
    assert [integer(a) for a in launch.arguments] == [indices.data_ptr(), 5000, k, counts.data_ptr()]


def train(dtype: torch.dtype, codes: int, columns: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Every differentiable operator, forward and backward; the values are those of memory never written."""
    library = torch.ops.ibq_fast_cupy
    z, codebook, bias = (
        torch.ones(3, columns).to(dtype),
        torch.ones(codes, columns).to(dtype),
        torch.ones(codes),
    )
    leaves = [leaf.requires_grad_() for leaf in (z, codebook, bias)]
    targets = torch.tensor([0, -100, 2])
    found = {
        "straight_through_select": library.straight_through_select(*leaves, 0.5),
        "softmax_statistics": library.softmax_statistics(*leaves, 0.5, 0.1),
        "index_backprop": library.index_backprop(*leaves, 0.5, 0.3, 0.1),
        "linear_cross_entropy": library.linear_cross_entropy(*leaves, targets, -100, 0.1),
    }
    for outputs in found.values():
        total = sum(out.float().sum() for out in outputs if out.requires_grad)
        torch.autograd.grad(total, leaves, allow_unused=True)
    return found


@pytest.mark.parametrize("codes", [90, 9000])
@pytest.mark.parametrize("dtype", list(ELEMENTS))
def test_training_operators_launch_and_give_the_shapes_they_promise(stand_in, dtype, codes) -> None:
    found = train(dtype, codes, 16)
    names = [launch.name for launch in stand_in.launches]
    element = f"ibq::cuda::Element({ELEMENTS[dtype]})"
    for kernel in (
        f"codebook_search_kernel<{element}, true, ibq::cuda::Extra::entropy>",
        f"sweep_kernel<{element}, ibq::cuda::Sweep::both>",
        f"sweep_kernel<{element}, ibq::cuda::Sweep::cross>",
        f"product_kernel<{element}, true>",
        "statistics_kernel",
    ):
        assert f"ibq::cuda::{kernel}" in names, kernel
    assert all(launch.blocks > 0 and launch.shared_bytes <= H100[2] for launch in stand_in.launches)
    with torch.device("meta"):
        z, codebook, bias = torch.ones(3, 16).to(dtype), torch.ones(codes, 16).to(dtype), torch.ones(codes)
        promised = torch.ops.ibq_fast_cupy.index_backprop(z, codebook, bias, 0.5, 0.3, 0.1)
    for real, fake in zip(found["index_backprop"], promised, strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


def test_a_failed_launch_ends_the_sequence(stand_in, monkeypatch) -> None:
    seen = []

    def refuse(*what):
        seen.append(what)
        raise RuntimeError("out of kernels")

    monkeypatch.setattr(stand_in, "launch", refuse)
    z = torch.ones(3, 8)
    with pytest.raises(RuntimeError, match="straight_through_select failed: out of kernels"):
        torch.ops.ibq_fast_cupy.straight_through_select(z, z, None, 1.0)
    assert len(seen) == 1


def test_what_the_launcher_raises_is_the_ops_error(stand_in, monkeypatch) -> None:
    def refuse(*what):
        raise RuntimeError("out of kernels")

    monkeypatch.setattr(stand_in, "launch", refuse)
    with pytest.raises(RuntimeError, match="codebook_search failed: out of kernels"):
        torch.ops.ibq_fast_cupy.codebook_search(torch.ones(2, 4), torch.ones(3, 4), None, 1.0, False, False)
    monkeypatch.setattr(stand_in, "limits", refuse)
    with pytest.raises(RuntimeError, match="planning codebook_search failed: out of kernels"):
        torch.ops.ibq_fast_cupy.codebook_search(torch.ones(2, 4), torch.ones(3, 4), None, 1.0, False, False)


def test_the_real_launcher_refuses_cpu_tensors() -> None:
    with pytest.raises(RuntimeError, match="the cupy backend takes CUDA tensors only"):
        torch.ops.ibq_fast_cupy.codebook_search(torch.ones(2, 4), torch.ones(3, 4), None, 1.0, False, False)


def test_parameters_keep_their_bytes() -> None:
    arrays = launcher.parameters((b"\x01\x02", bytes(range(40))))
    assert [array.dtype for array in arrays] == [np.uint8] * 2
    assert [array.tobytes() for array in arrays] == [b"\x01\x02", bytes(range(40))]


def test_without_cupy_or_a_device_the_table_says_which() -> None:
    if torch.cuda.is_available() and importlib.util.find_spec("cupy"):
        assert cupy.UNAVAILABLE is None
        return
    assert cupy.UNAVAILABLE is not None
    with pytest.raises(ValueError, match="'cupy'"):
        ops.set_backend("cupy")
    row = next(row for row in backends._TABLE["codebook_search"] if row.name == "cupy")
    assert row.unavailable == cupy.UNAVAILABLE
    for reason in ("CuPy is not installed", "no CUDA device", "is built without CUDA"):
        if reason in cupy.UNAVAILABLE:
            return
    raise AssertionError(cupy.UNAVAILABLE)


def test_an_architecture_gets_its_own_instructions() -> None:
    assert [compiler.architecture(*c) for c in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0))] == [
        "sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120",
    ]  # fmt: skip


def test_the_sources_are_where_a_checkout_has_them() -> None:
    names = {path.name for path in sources.files()}
    assert {"search_kernel.cuh", "intrinsics.cuh", "host_device.h"} <= names
    assert sources.fingerprint() == sources.fingerprint()


# --- with NVRTC (CuPy's wheel and nvidia-cuda-nvrtc); no driver is needed ---------------------------------


def nvrtc_is_here() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    try:
        compiler._nvrtc().getVersion()
    except Exception:  # CuPy's loader has errors of its own kinds for a missing library
        return False
    return True


def every_kernel(recorder: StandIn) -> dict[str, set[str]]:
    """Names by source of all kernels that the operators of this backend launch, forward and backward."""
    for dtype in ELEMENTS:
        for columns in (8, 2, 1):
            z = torch.ones(3, columns).to(dtype)
            for with_lse in (False, True):
                torch.ops.ibq_fast_cupy.codebook_search(z, z, None, 1.0, with_lse, False)
            for codes in (3, 9000):
                train(dtype, codes, columns)
    for k in (10, 20000):
        torch.ops.ibq_fast_cupy.code_histogram(torch.zeros(4, dtype=torch.int64), k)
    found: dict[str, set[str]] = {}
    for launch in recorder.launches:
        found.setdefault(launch.source, set()).add(launch.name)
    return found


if nvrtc_is_here():

    @pytest.mark.slow
    @pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a"])
    def test_every_kernel_compiles_at_run_time(stand_in, target) -> None:
        for source, names in every_kernel(stand_in).items():
            code, symbols = compiler.compile_source(source, tuple(sorted(names)), target)
            assert code.startswith(b"\x7fELF")
            assert set(symbols) == names
            for symbol in symbols.values():
                assert symbol.encode() in code

    def test_a_compiled_kernel_is_kept_and_found_again(tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("IBQ_FAST_CACHE", str(tmp_path))
        what = ("histogram_kernel.cuh", "ibq::cuda::histogram_shared_kernel", "sm_80")
        first = compiler.compiled(*what)
        assert first.path.read_bytes().startswith(b"\x7fELF")
        monkeypatch.setattr(compiler, "compile_source", None)  # a second compilation would fail
        assert compiler.compiled(*what) == first
        monkeypatch.setattr(sources, "fingerprint", lambda: "changed")
        with pytest.raises(TypeError):
            compiler.compiled(*what)

    def test_errors_of_the_compiler_are_shown() -> None:
        with pytest.raises(RuntimeError, match=r"no_such_file\.cuh does not compile for sm_80"):
            compiler.compile_source("no_such_file.cuh", ("f",), "sm_80")
