"""Configs: every file in configs/ is valid, what is unknown is refused, what is written reads back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ibq_fast.generator import Generator
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train import GeneratorRun, RunConfig, TokenizerRun, load_config
from ibq_fast.train.config import dump_config, parse_run

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
IMAGES_OF_IMAGENET = 1_281_167


def test_there_are_configs() -> None:
    assert len(FILES) >= 10


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_file_is_valid_and_builds_its_model(file: Path) -> None:
    generator = "generator" in file.stem
    config = load_config(GeneratorRun if generator else TokenizerRun, file)
    with torch.device("meta"):
        model = Generator(config.model) if isinstance(config, GeneratorRun) else Tokenizer(config.model)
    assert sum(p.numel() for p in model.parameters()) > 0
    if isinstance(config, TokenizerRun):
        assert config.data.resolution == config.model.resolution
        assert config.data.channels == config.model.image_channels


@pytest.mark.parametrize(("size", "epochs"), [(1024, 330), (8192, 280), (16384, 330), (262144, 330)])
def test_published_tokenizers(size: int, epochs: int) -> None:
    config = load_config(TokenizerRun, CONFIGS / f"imagenet256_ibq_{size}.yaml")
    assert config.model.quantizer.codebook_size == size
    assert config.run.steps == IMAGES_OF_IMAGENET // 256 * epochs
    assert config.model.grid == (16, 16)


@pytest.mark.parametrize(("name", "millions"), [("B", 343), ("L", 650), ("XL", 1076), ("XXL", 2063)])
def test_published_generators(name: str, millions: int) -> None:
    config = load_config(GeneratorRun, CONFIGS / f"generator_{name}.yaml")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Generator(config.model).parameters())
    assert round(parameters / 1e6) == millions


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run: {steps: 10}\ndata: {kind: fashion_mnist, resolution: 32}\noptim: {lr: 2e-3}\n")
    return path


def test_the_command_line_overrides_the_file(file: Path) -> None:
    config = parse_run(TokenizerRun, [f"--config={file}", "--optim.lr=0.5", "--resume", "--run.steps", "7"])
    assert (config.optim.lr, config.run.resume, config.run.steps) == (0.5, True, 7)
    assert config.optim.betas == (0.5, 0.9)


def test_from_python(file: Path) -> None:
    config = load_config(
        TokenizerRun, file, run__dir="x", loss__generator_weight=None, optim__betas=(0.9, 0.95)
    )
    assert config.run.dir == "x"
    assert config.loss.generator_weight is None
    assert config.optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("addition", "option", "message"),
    [
        ("modle: {resolution: 32}", "", "unknown key 'modle.resolution'; did you mean 'model.resolution'?"),
        ("model: {resolutoin: 32}", "", "unknown key 'model.resolutoin'; did you mean 'model.resolution'?"),
        ("model: {quantizer: {codebok_size: 3}}", "", "did you mean 'model.quantizer.codebook_size'?"),
        ("", "--optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("", "--optim.lr=fast", "optim.lr: expected float, got fast"),
        ("", "--optim.lr=-1", "lr: expected a positive number, got -1.0"),
        ("", "--run.steps=0", "run.steps: expected at least 1, got 0"),
        ("", "--run.device=gpu", "run.device: expected Literal['auto', 'cpu', 'cuda', 'npu'], got gpu"),
        ("", "--model.base_channels=33", "base_channels: expected a multiple of 32, got 33"),
    ],
)
def test_what_is_wrong_is_named(addition: str, option: str, message: str, file: Path) -> None:
    file.write_text(file.read_text() + addition + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_run(TokenizerRun, [f"--config={file}", *([option] if option else [])])


def test_a_run_needs_an_end() -> None:
    with pytest.raises(ValueError, match=r"run\.steps: expected a number of steps \(or run\.max_minutes\)"):
        RunConfig()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config: expected a YAML file, got .*none\.yaml"):
        load_config(TokenizerRun, tmp_path / "none.yaml")


def test_a_config_reads_back_as_it_was_written(
    tokenizer_run: TokenizerRun, generator_run: GeneratorRun, tmp_path: Path
) -> None:
    odd = replace(tokenizer_run, loss=replace(tokenizer_run.loss, generator_weight=None))
    for config in (tokenizer_run, odd, generator_run):
        dump_config(config, tmp_path / "config.yaml")
        assert load_config(type(config), tmp_path / "config.yaml") == config
