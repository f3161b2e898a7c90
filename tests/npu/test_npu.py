"""Ascend without its hardware: torch-npu absent, broken, and stood in for by a device on the CPU.

PyTorch's PrivateUse1 can be renamed once in a process, so a made-up torch-npu is installed on the path of
processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, state

from ibq_fast import npu
from ibq_fast.evaluate.devices import pick_device
from ibq_fast.train.config import GeneratorRun, RunConfig, TokenizerRun, load_config
from ibq_fast.train.device import build_accelerator, precision

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BROKEN = 'raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")\n'


def install(site: Path, module: str) -> Path:
    """A torch-npu of one module, with the entry point by which PyTorch loads it."""
    info = site / "torch_npu-2.9.0.dist-info"
    info.mkdir(parents=True)
    (site / "torch_npu.py").write_text(module)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.9.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return site


def run(site: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != npu.AUTOLOAD}
    variables |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *words], env=variables, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("broken"), BROKEN)


def test_a_broken_torch_npu_takes_torch_down(broken: Path) -> None:
    """What everything below guards against."""
    done = run(broken, "-c", "import torch")
    assert done.returncode == 1
    assert "Failed to load the backend extension: torch_npu" in done.stderr


BROKEN_PROGRAM = """
import json, os
import ibq_fast, torch
from ibq_fast import doctor, npu
from ibq_fast.train.config import RunConfig
from ibq_fast.train.device import build_accelerator
quantizer = ibq_fast.IndexBackpropQuantizer(codebook_size=8, dim=4)
quantizer(torch.randn(1, 4, 2, 2)).z_q.sum().backward()
try:
    build_accelerator(RunConfig(steps=1, device="npu"))
except ValueError as error:
    refused = str(error)
variable = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
print(json.dumps([npu.unavailable(), variable, refused, doctor.report()]))
"""


def test_with_a_broken_torch_npu_everything_else_works_and_says_so(broken: Path) -> None:
    done = run(broken, "-c", BROKEN_PROGRAM)
    assert done.returncode == 0, done.stderr
    reason, variable, refused, report = json.loads(done.stdout)
    assert reason.startswith(
        "torch-npu 2.9.0 is installed but does not load (ImportError: libhccl.so: cannot"
    )
    assert "CANN" in reason
    assert "uninstalled" in reason
    assert variable is None
    assert refused == f"run.device: expected a machine with npu, accelerate found only cpu: {reason}"
    assert f"NPU             none: {reason}" in report
    assert "could not be examined" not in report


def test_autoload_that_is_switched_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "installed", lambda: True)
    monkeypatch.setenv(npu.AUTOLOAD, "0")
    assert "was not loaded (TORCH_DEVICE_BACKEND_AUTOLOAD=0)" in (npu.unavailable() or "")


def test_without_torch_npu_the_message_says_how_to_get_it() -> None:
    if npu.installed():
        assert "not installed" not in (npu.unavailable() or "")
        return
    with pytest.raises(
        ValueError, match=r"device: expected one that is available, got 'npu:0': torch-npu is not"
    ):
        pick_device("npu:0")
    with pytest.raises(ValueError, match=r"expected a machine with npu, .* torch-npu is not installed"):
        build_accelerator(RunConfig(steps=1, device="npu"))


def test_ops_and_training_on_the_stand_in(tmp_path: Path) -> None:
    """Every op as on the CPU; then encoder, losses, optimiser, evaluation and export, in bf16 unasked."""
    site = install(tmp_path / "site", (HERE / "stand_in.py").read_text())
    done = run(site, str(HERE / "on_npu.py"), str(tmp_path), str(ROOT / "configs/quickstart_tokenizer.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["agree"] == ["index_backprop", "linear_cross_entropy", "codebook_search", "code_histogram"]
    assert found["device"].startswith("npu")
    assert found["precision"] == "bf16"
    assert found["products in bf16"]
    assert found["exported"]
    assert set(found["chosen"].values()) == {"composite"}
    assert [row["split"] for row in found["figures"]] == ["train", "eval"]
    assert found["figures"][0]["loss"] > 0


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_loads_for_an_npu(file: Path) -> None:
    generator = "generator" in file.stem
    config = load_config(GeneratorRun if generator else TokenizerRun, file, run__device="npu")
    assert config.run.device == "npu"
    assert precision(config.run, "npu") == "bf16"


def test_precision_is_bf16_on_an_npu_unless_the_run_says() -> None:
    run = RunConfig(steps=1)
    assert (precision(run, "npu"), precision(run, "cpu"), precision(run, "cuda")) == ("bf16", "no", "no")
    assert precision(RunConfig(steps=1, mixed_precision="no"), "npu") == "no"


def test_processes_on_npus_are_connected_by_hccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(state, "is_npu_available", lambda *args: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend, kind = PartialState._prepare_backend(PartialState.__new__(PartialState))
    assert (backend, kind.value) == ("hccl", "MULTI_NPU")
