"""The hub, without a network: a local cache, and a stand-in for its client."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin, hub_mixin
from huggingface_hub.errors import OfflineModeIsEnabled

from ibq_fast.generator import Generator, GeneratorConfig
from ibq_fast.quantizer import QuantizerConfig
from ibq_fast.tokenizer import Tokenizer, TokenizerConfig


@pytest.fixture
def tokenizer() -> Tokenizer:
    config = TokenizerConfig(
        image_channels=1,
        resolution=8,
        base_channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        latent_channels=8,
        quantizer=QuantizerConfig(codebook_size=16, dim=4),
    )
    return Tokenizer(config)


class FakeApi:
    """Keeps what is uploaded in a folder."""

    store: ClassVar[Path]
    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, "token": self.token, **options})
        shutil.copytree(folder_path, self.store / repo_id)
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    FakeApi.store, FakeApi.calls = tmp_path / "hub", []
    monkeypatch.setattr(hub_mixin, "HfApi", FakeApi)
    return FakeApi.store


def test_models_are_hub_models(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, ModelHubMixin)


def test_push_uploads_the_model_and_its_card(tokenizer: Tokenizer, hub: Path) -> None:
    address = tokenizer.push_to_hub(
        "someone/tok", token="t", private=True, branch="v1", commit_message="first"
    )
    assert address == "https://huggingface.co/someone/tok/commit/1"
    assert FakeApi.calls[0]["token"] == "t"
    assert FakeApi.calls[0]["revision"] == "v1"
    folder = hub / "someone" / "tok"
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = Tokenizer.from_pretrained(folder)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in tokenizer.state_dict().items())
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "ibq_fast"
    assert {"image-tokenizer", "model_hub_mixin"} <= set(card.data.tags)
    assert "ibq_fast.Tokenizer.from_pretrained(" in card.text
    assert '"codebook_size": 16' in card.text


def test_a_card_may_say_more_and_is_not_written_twice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = {"description": "Of garments.", "repo_id": "someone/tok"}
    folder = tokenizer.save_pretrained(tmp_path / "m", model_card_kwargs=words)
    text = (folder / "README.md").read_text()
    assert "Of garments." in text
    assert 'from_pretrained("someone/tok")' in text
    (folder / "README.md").write_text("mine")
    tokenizer.save_pretrained(folder, model_card_kwargs={})
    assert (folder / "README.md").read_text() == "mine"


def test_a_generator_pushes_too(hub: Path) -> None:
    config = GeneratorConfig(vocab_size=16, num_classes=2, grid=(2, 2), depth=1, num_heads=2, width=16)
    Generator(config).push_to_hub("someone/gen")
    assert Generator.from_pretrained(hub / "someone" / "gen").config == config
    assert "# Generator" in (hub / "someone" / "gen" / "README.md").read_text()


def cached(cache: Path, repo: str, folder: Path, commit: str) -> None:
    """``folder`` as the hub's cache keeps a downloaded commit of ``repo``."""
    root = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)


def test_loads_from_the_cache_without_a_network(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cached(tmp_path / "cache", "someone/tok", tokenizer.save_pretrained(tmp_path / "m"), "0" * 40)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = Tokenizer.from_pretrained("someone/tok", **options)  # type: ignore[arg-type]
    assert torch.equal(loaded.quantizer.codebook, tokenizer.quantizer.codebook)
    by_commit = Tokenizer.from_pretrained("someone/tok", revision="0" * 40, **options)  # type: ignore[arg-type]
    assert by_commit.config == tokenizer.config
    with pytest.raises(
        FileNotFoundError, match="no local path 'someone/else', and the hub could not give it"
    ):
        Tokenizer.from_pretrained("someone/else", **options)  # type: ignore[arg-type]


def test_offline_is_said(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(FakeApi, "create_repo", offline)
    monkeypatch.setattr(hub_mixin, "HfApi", FakeApi)
    with pytest.raises(ConnectionError, match="the hub did not take 'someone/tok': offline mode is enabled"):
        tokenizer.push_to_hub("someone/tok")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="the hub could not give it: offline mode is enabled"):
        Tokenizer.from_pretrained("someone/tok")
