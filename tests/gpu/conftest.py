"""Options and fixtures of the GPU tests: on which device, over which backends, and what is written down.

``pytest tests/gpu`` runs on a CUDA device; without one it collects and ends with exit code 3 and the words
"no CUDA device". ``--device cpu`` rehearses: the same code on the CPU's backends, to find mistakes in it.

``--journal FILE`` writes down what a test is about, that it begins and how it ends (bench/gpu/journal.py);
what the file says was run before is left out. A test that loses the device context, or does not end within
STEP_SECONDS, ends the process: started again with the same journal, it goes on behind that test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.journal import Journal, leave_if_dead
from ibq_fast.generator.graph import BACKEND as GRAPH
from ibq_fast.ops import backends
from ibq_fast.ops.generator_step import NAME as STEP

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # its checks serve every device

NO_DEVICE = 3
STEP_SECONDS = 40.0  # Triton and NVRTC compile in them
_JOURNAL = pytest.StashKey[Journal]()


@dataclass(frozen=True)
class Subject:
    """What a test speaks about: an operator of a backend in a dtype."""

    op: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses without a GPU")
    group.addoption("--journal", type=Path, help="write down what is run, and go on behind what was")
    group.addoption("--backend", help="this backend alone")
    group.addoption("--ops", help="these operators alone, comma-separated")
    group.addoption("--called", help="the backend's name in the journal")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the operators that the test is about")
    config.stash[_JOURNAL] = Journal(config.getoption("--journal"))


def subjects(device: str, ops: tuple[str, ...]) -> list[Subject]:
    """Every backend that serves one of ``ops`` on the device, in every dtype it takes but float64; and the
    generator's step as a CUDA graph, which is no backend of its own but proven like one."""
    graphs = [Subject(STEP, GRAPH, dtype) for dtype in (torch.float32, torch.bfloat16)] if STEP in ops else []
    return graphs + [
        Subject(op, row.name, dtype)
        for op in ops
        if op != STEP
        for row in backends._TABLE[op]
        for dtype in row.dtypes
        if dtype != torch.float64 and row.refusal(device, dtype) is None
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("ops")
        assert marker is not None, f"{metafunc.definition.name}: expected a mark ops(...)"
        option = metafunc.config.getoption
        wanted = set(option("--ops").split(",")) if option("--ops") else set(marker.args)
        found = subjects(option("--device"), tuple(name for name in marker.args if name in wanted))
        found = [subject for subject in found if option("--backend") in (None, subject.backend)]
        metafunc.parametrize("subject", found, ids=str)


@pytest.hookimpl(trylast=True)  # once -k has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what no backend serves or none was asked for, and what an earlier process ran."""
    journal, called = config.stash[_JOURNAL], config.getoption("--called")
    kept = []
    for item in items:
        subject = item.callspec.params.get("subject") if hasattr(item, "callspec") else None
        if isinstance(subject, Subject):
            dtype = str(subject.dtype).removeprefix("torch.")
            journal.note(plan=item.nodeid, subject=[subject.op, called or subject.backend, dtype])
        elif subject is not None or config.getoption("--backend"):
            continue  # nothing serves it, or it is about no backend
        if item.nodeid not in journal.ended and item.nodeid not in journal.lost:
            kept.append(item)
    for node in journal.lost:
        journal.end(node, "failed", "the process ended in it, or was ended after its limit")
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        pytest.exit(f"no CUDA device: {len(session.items)} tests collected, none run", returncode=NO_DEVICE)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with item.config.stash[_JOURNAL].step(item.nodeid, STEP_SECONDS):
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" or report.failed:
        item.config.stash[_JOURNAL].end(item.nodeid, report.outcome, report.longreprtext)
    if report.failed:
        leave_if_dead(item.config.getoption("--device"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With a journal: 1 when a test of this process or of an earlier one failed."""
    journal = session.config.stash[_JOURNAL]
    came_to_its_end = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if journal.path is not None and exitstatus in came_to_its_end:
        journal.finish()
        failed = session.testsfailed or journal.lost or "failed" in journal.ended.values()
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK


class Device:
    """The device under test; on the CPU streams and graphs are rehearsed by doing without."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cuda = name == "cuda"

    def put(self, x: Any) -> Any:
        """An ``Operands`` with its tensors on the device."""
        moved = {f.name: getattr(x, f.name) for f in fields(x)}
        moved = {k: v.to(self.name) if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
        return replace(x, **moved)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """``call`` as a CUDA graph: what replays it, and the tensors it writes. Warmed up as PyTorch asks."""
        if not self.cuda:
            held = [call()]

            def again() -> None:
                for old, new in zip(held[0], call(), strict=True):
                    old.copy_(new)

            return again, held[0]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        return graph.replay, out

    def side_stream(self) -> AbstractContextManager[Any]:
        """A stream that is not the current one, current while the context lasts."""
        return torch.cuda.stream(torch.cuda.Stream()) if self.cuda else nullcontext()

    def keep_busy(self) -> None:
        """Occupy the current stream for some ten milliseconds."""
        if self.cuda:
            torch.cuda._sleep(20_000_000)

    def forbid_waiting(self) -> AbstractContextManager[None]:
        """Whatever PyTorch waits for on the host is an error while the context lasts."""
        return _NoWaiting() if self.cuda else nullcontext()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class _NoWaiting(AbstractContextManager[None]):
    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    return Device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def sizes(device: Device) -> list[tuple[int, int, int]]:
    """Ragged N, K, D: single ones, odd rows, one past a tile, enough codes for tile bounds."""
    small = [(1, 1, 1), (97, 515, 59), (33, 3, 111)]
    return [*small, (130, 257, 64), (300, 8200, 96), (129, 1025, 256)] if device.cuda else small


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, PyTorch's and ours."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
