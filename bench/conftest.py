"""pytest options and fixtures of the benchmarks: which sizes run, races in turns, what is recorded."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import machine, memory
from bench.cases import Case
from bench.race import Race, Replay, percentiles, run
from bench.suite import Entry, Record, Suite
from bench.suites import LEVELS
from ibq_fast.ops import release_memory

SECONDS = {"tiny": 0.2, "quick": 1.5, "full": 5.0}
REPLAY = Replay()
_LEFT_OUT = pytest.StashKey[dict[str, str]]()
_COMMIT = pytest.StashKey[str]()  # when the code was loaded


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--sizes", choices=LEVELS, default="full", help="tiny: does it run; quick: 2 minutes; full: all"
    )
    group.addoption("--quick", action="store_const", const="quick", dest="sizes", help="--sizes=quick")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = {}
    config.stash[_COMMIT] = machine.commit()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of a module runs its PLAN: every suite, case and entry that fits this machine."""
    if "entry" not in metafunc.fixturenames:
        return
    available = machine.available_bytes()
    measured = "memory of " if "weighed" in metafunc.fixturenames else ""
    parameters = []
    for suite, case in metafunc.module.PLAN[metafunc.config.getoption("sizes")]:
        entries, left_out = suite.entries_for(case, available)
        for name, reason in left_out.items():
            metafunc.config.stash[_LEFT_OUT][f"{suite.kernel} {case.label}: {name}"] = reason
        for entry in entries:
            label = f"{suite.kernel}-{case.label}-{entry.name}".replace(" ", "-")
            marks = pytest.mark.benchmark(group=f"{measured}{suite.kernel} {case.label}", timer=REPLAY)
            parameters.append(pytest.param(suite, case, entry, id=label, marks=marks))
    metafunc.parametrize(("suite", "case", "entry"), parameters)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for what, reason in sorted(config.stash[_LEFT_OUT].items()):
        terminalreporter.write_line(f"not measured: {what}: {reason}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(
        device=machine.device_name(),
        threads=torch.get_num_threads(),
        commit_measured=config.stash[_COMMIT],
        versions=machine.versions(),
        sizes=config.getoption("sizes"),
        read_bandwidth_gb_s=machine.read_bandwidth(),
        left_out=config.stash[_LEFT_OUT],
    )


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> Callable[[str, Suite[Any], Case], Race]:
    """The race of a suite at a case among the entries that this session selected; the last one is kept."""
    kept: dict[tuple[str, str, Case], Race] = {}

    def race(test: str, suite: Suite[Any], case: Case) -> Race:
        key = (test, suite.kernel, case)
        if key not in kept:
            kept.clear()
            gc.collect()  # models and their decoders hold each other
            release_memory()
            entries = [
                parameters["entry"]
                for parameters in _selected(request.session, test)
                if (parameters["suite"].kernel, parameters["case"]) == key[1:]
            ]
            kept[key] = run(suite, case, entries, SECONDS[request.config.getoption("sizes")])
        return kept[key]

    return race


@pytest.fixture
def timed(
    request: pytest.FixtureRequest, benchmark: Any, races: Callable[[str, Suite[Any], Case], Race]
) -> Record:
    """Records the entry's samples of its race; fails when the entry's result was wrong."""

    def record(suite: Suite[Any], case: Case, entry: Entry[Any]) -> None:
        race = races(request.node.originalname, suite, case)
        lane = race.lanes[entry.name]
        assert lane.wrong is None, lane.wrong
        _replay(benchmark, lane.samples)
        milliseconds = [1e3 * value for value in percentiles(lane.samples)]
        rates = [suite.flops(case) / value / 1e9 for value in lane.samples]
        peak = percentiles(race.peaks[entry.dtype])[1]
        metrics = [
            _metric("time", milliseconds, "ms"),
            _metric("throughput", percentiles(rates), "GFLOP/s"),
        ]
        benchmark.extra_info.update(_common(suite, case, entry, len(lane.samples)))
        if peak > 0:
            metrics.append(_metric("share of peak", [100 * r / peak for r in percentiles(rates)], "%"))
            benchmark.extra_info["machine_peak"] = {"dtype": entry.dtype, "gflops": peak}
        metrics += [
            _metric(more.name, percentiles(more.values), more.unit)
            for more in suite.metrics(case, entry, lane.samples)
        ]
        benchmark.extra_info["metrics"] = metrics

    return record


@pytest.fixture
def weighed(benchmark: Any) -> Record:
    """Records the peak extra memory of one call in a process of its own."""

    def record(suite: Suite[Any], case: Case, entry: Entry[Any]) -> None:
        probe = memory.measure(suite.kernel, case, entry.name, torch.get_num_threads())
        _replay(benchmark, [probe.seconds])
        benchmark.extra_info.update(_common(suite, case, entry, 1))
        benchmark.extra_info["metrics"] = [_metric("peak extra memory", [probe.bytes / 1e6] * 3, "MB")]

    return record


def _selected(session: pytest.Session, test: str) -> list[dict[str, Any]]:
    """Parameters of the items of ``test`` that this session runs."""
    items = [item for item in session.items if isinstance(item, pytest.Function)]
    return [dict(item.callspec.params) for item in items if item.originalname == test]


def _replay(benchmark: Any, samples: list[float]) -> None:
    REPLAY.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1, warmup_rounds=0)


def _metric(name: str, values: Any, unit: str) -> dict[str, Any]:
    p20, p50, p80 = values
    return {"metric": name, "p20": p20, "p50": p50, "p80": p80, "unit": unit}


def _common(suite: Suite[Any], case: Case, entry: Entry[Any], rounds: int) -> dict[str, Any]:
    mode = entry.mode if case.regime is None else f"{entry.mode} {case.regime}"
    return {
        "kernel": suite.kernel,
        "provider": entry.provider,
        "mode": mode,
        "size": case.size,
        "device": machine.device_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "read_bandwidth_gb_s": machine.read_bandwidth(),
        "rounds": rounds,
        "nominal_flops": suite.flops(case),
    }
