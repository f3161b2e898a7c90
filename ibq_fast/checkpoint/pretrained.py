"""Saving and loading models: a directory of ``config.json`` and ``model.safetensors``.

:class:`PretrainedMixin` gives a module ``save_pretrained`` and ``from_pretrained``. A model that takes part

* names its frozen dataclass of settings in ``config_class``, takes one instance of it as its constructor's
  only argument and keeps it as ``self.config`` (the dataclass checks its own bounds in ``__post_init__``);
* can be built on the meta device, so that a file's shapes are compared before memory is spent on them;
* implements ``_from_reference`` when it can read checkpoints of the published implementation.

No loading path unpickles objects: own files are safetensors and JSON, reference files are read with
``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ibq_fast.checkpoint.configs import config_from_dict, config_to_dict

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1

# Refusals, a missing network, offline mode. The bases belong to the HTTP library of the hub's client.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
_MAX_CONFIG_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

CARD_NAME = "README.md"
CARD = """\
---
{{ card_data }}
---

# {{ model_class }}

An `ibq_fast` {{ model_class }}, trained with index backpropagation quantization
([arXiv 2412.02692](https://arxiv.org/abs/2412.02692)).

```python
import ibq_fast

model = ibq_fast.{{ model_class }}.from_pretrained("{{ repo_id | default("owner/name", true) }}")
```
{% if description %}
{{ description }}
{% endif %}
## Settings

```json
{{ settings }}
```
"""

M = TypeVar("M", bound="PretrainedMixin")


class PretrainedMixin(
    ModelHubMixin,
    library_name="ibq_fast",
    tags=["image-tokenizer", "vector-quantization"],
    model_card_template=CARD,
):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for an ``nn.Module`` built from one config
    dataclass. The hub's mixin gives the model card and the upload; files are written and read here.
    """

    config_class: ClassVar[type]
    config: Any

    def save_pretrained(  # type: ignore[override]
        self,
        directory: str | os.PathLike[str],
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        config: None = None,
    ) -> Path:
        """Write ``config.json`` and ``model.safetensors`` into ``directory`` and return it.

        ``model_card_kwargs`` (a dict, possibly empty) asks for a model card, ``README.md``, unless there is
        one. ``config`` exists for the hub's mixin only: a model's settings are its own.

        A reader never sees half a model, nor one model's settings with another's weights: a new directory
        appears whole; in one that exists the weights are replaced in a single rename, and when the settings
        change too, ``config.json`` is absent until the new weights are in place. Other files there stay.

        Tensors keep their dtype and their bits. Raises ``NotADirectoryError`` when ``directory`` is a file.
        """
        assert isinstance(self, nn.Module)
        target = Path(directory)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(
                f"directory: expected a directory to save into, got the file {str(target)!r}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "model": type(self).__name__,
            "format": FORMAT_VERSION,
            "config": config_to_dict(self.config),
        }
        text = json.dumps(document, indent=2) + "\n"
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            save_file(_storable(self.state_dict()), str(staging / WEIGHTS_NAME), metadata={"format": "pt"})
            (staging / CONFIG_NAME).write_text(text, encoding="utf-8")
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (staging / name).chmod(0o666 & ~umask())
                sync(staging / name)
            _publish(staging, target, text)
            if model_card_kwargs is not None and not (target / CARD_NAME).exists():
                self.generate_model_card(**model_card_kwargs).save(target / CARD_NAME)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        sync(target.parent)
        return target

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with a model card to the hub's ``repo_id`` (owner/name); returns the commit's
        address.

        ``options`` are those of ``huggingface_hub.ModelHubMixin.push_to_hub``: ``private``, ``token``,
        ``branch``, ``commit_message``, ``create_pr``, ``model_card_kwargs``. Raises ConnectionError when the
        hub cannot be reached or refuses.
        """
        try:
            return str(super().push_to_hub(repo_id, **{"model_card_kwargs": {}, **options}))
        except _HUB_ERRORS as error:
            raise ConnectionError(f"repo_id: the hub did not take {repo_id!r}: {error}") from error

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The hub's card of this model: what it is, how to load it, its settings."""
        settings = json.dumps(config_to_dict(self.config), indent=2)
        return super().generate_model_card(
            *args, **{"model_class": type(self).__name__, "settings": settings, **kwargs}
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[M],
        path_or_repo: str | os.PathLike[str],
        *,
        ema: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | torch.device | None = None,
        **overrides: Any,
    ) -> M:
        """Load a model, in eval mode, from one of

        * a directory written by :meth:`save_pretrained`,
        * a checkpoint file of the published implementation (``.ckpt``), its architecture read off the shapes,
        * the id of a repository on the Hugging Face hub that holds either (``revision``: a commit or tag;
          ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` as the hub's own functions).

        ``ema`` chooses the averaged weights of a reference checkpoint that has them; own directories hold one
        set. ``overrides`` state what the shapes of a reference checkpoint cannot say (each model's page lists
        them). Loading draws no numbers from the global random generator.

        Raises ``FileNotFoundError`` when nothing is there, ``ValueError`` naming the file and what is wrong
        in it: unknown or out-of-range settings, missing, unexpected or misshapen weights, truncation, pickled
        objects.
        """
        options = {"cache_dir": cache_dir, "token": token}
        flags = {"local_files_only": local_files_only, "force_download": force_download}
        given = {name: value for name, value in options.items() if value is not None}
        path = resolve(path_or_repo, revision, **given, **{name: True for name, on in flags.items() if on})
        with torch.random.fork_rng(devices=[]):
            if path.is_dir():
                if overrides:
                    raise ValueError(
                        f"{', '.join(sorted(overrides))}: expected only with a reference checkpoint, "
                        f"got the directory {str(path)!r}, which records its own settings"
                    )
                model = cls._from_directory(path)
            else:
                from ibq_fast.checkpoint.reference import load_reference_state

                model = cls._from_reference(path, load_reference_state(path), ema=ema, **overrides)
        assert isinstance(model, nn.Module)
        if device is not None:
            model.to(device)
        return model.eval()

    @classmethod
    def _from_reference(
        cls: type[M], path: Path, state_dict: dict[str, Tensor], *args: Any, **overrides: Any
    ) -> M:
        """Build the model from a checkpoint of the published implementation. Subclasses implement this as
        ``_from_reference(cls, path, state_dict, *, ema, <their overrides by name>)``.

        ``state_dict`` is the file's flat dict of tensors as it stands (the outer ``state_dict`` entry taken
        off, no prefix removed); ``path`` is for error messages. ``ema`` asks for averaged weights where the
        file has them. Declare the overrides you know as keyword parameters, derive a config from them and the
        tensors' shapes, rename the tensors and return ``build_and_load(cls, config, renamed, path)``.
        """
        raise ValueError(f"{path}: {cls.__name__} reads no checkpoints of the published implementation")

    @classmethod
    def _from_directory(cls: type[M], directory: Path) -> M:
        config = read_config(directory / CONFIG_NAME, cls.__name__, cls.config_class)
        weights = directory / WEIGHTS_NAME
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}: no such file; the directory has no weights")
        return build_and_load(cls, config, read_weights(weights), weights)


def build_and_load(cls: type[M], config: Any, state: Mapping[str, Tensor], source: Path) -> M:
    """``cls(config)`` with ``state`` loaded; shapes are compared on the meta device before any memory."""
    try:
        with torch.device("meta"):
            outline = cls(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{source}: no model can have these settings: {error}") from error
    assert isinstance(outline, nn.Module)
    check_weights(outline.state_dict(), state, source)
    model = cls(config)
    assert isinstance(model, nn.Module)
    load_weights(model, state, source)
    return model


def check_weights(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path) -> None:
    """Raise ``ValueError`` naming the first missing, misshapen or unexpected key of ``state``."""
    for name, wanted in expected.items():
        if name not in state:
            raise ValueError(f"{source}: weight {name!r} {list(wanted.shape)} is missing")
        if state[name].shape != wanted.shape:
            raise ValueError(
                f"{source}: weight {name!r}: expected shape {list(wanted.shape)} from the settings, "
                f"got {list(state[name].shape)}"
            )
        if state[name].is_floating_point() != wanted.is_floating_point():
            raise ValueError(f"{source}: weight {name!r}: expected {wanted.dtype}, got {state[name].dtype}")
    for name in state:
        if name not in expected:
            raise ValueError(f"{source}: unexpected weight {name!r} {list(state[name].shape)}")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Check ``state`` against ``model`` and copy it in, each tensor keeping the dtype it was stored in."""
    own = model.state_dict(keep_vars=True)
    check_weights(own, state, source)
    for name, tensor in own.items():
        if tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(dict(state), strict=True)


def read_config(path: Path, model: str, config_class: type) -> Any:
    """Parse a ``config.json`` into ``config_class``. ``ValueError`` names the file and the wrong setting."""
    document = _read_document(path)
    if document["model"] != model:
        raise ValueError(f"{path}: model: expected {model!r}, got {document['model']!r}")
    try:
        return config_from_dict(config_class, document["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def model_name(path: Path) -> Any:
    """The class that a ``config.json`` names, unchecked. Raises as :func:`read_config`."""
    return _read_document(path)["model"]


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a directory written by save_pretrained")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict) or set(document) != {"model", "format", "config"}:
        got = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{path}: expected an object with the keys model, format and config, got {got}")
    if document["format"] != FORMAT_VERSION or isinstance(document["format"], bool):
        raise ValueError(f"{path}: format: expected {FORMAT_VERSION}, got {document['format']!r}")
    return document


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    try:
        with safe_open(str(path), framework="pt") as file:
            file.keys()
        return load_file(str(path), device="cpu")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a readable safetensors file (truncated or corrupt): {error}"
        ) from error


def resolve(path_or_repo: str | os.PathLike[str], revision: str | None = None, **hub: Any) -> Path:
    """The local directory or file that ``path_or_repo`` stands for, fetched from the hub if need be.

    ``hub``: options of ``huggingface_hub.snapshot_download``. Raises as ``from_pretrained``.
    """
    path = Path(path_or_repo)
    if path.is_file() and path.suffix == ".safetensors":
        raise ValueError(f"path_or_repo: expected the directory that holds {path.name}, got {str(path)!r}")
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision: expected only with a hub id, got the local path {str(path)!r}")
        return path
    name = os.fspath(path_or_repo)
    if not _HUB_ID.fullmatch(name) or path.suffix in (".ckpt", ".pt", ".pth"):
        raise FileNotFoundError(
            f"path_or_repo: {name!r} is neither a file, a directory nor a hub id (owner/name)"
        )
    return _download(name, revision, **hub)


def _download(repository: str, revision: str | None, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **hub
            )
        )
        if (snapshot / WEIGHTS_NAME).is_file():
            return snapshot
        found = snapshot_download(repository, revision=revision, allow_patterns=["*.ckpt"], **hub)
        snapshot = Path(found)
    except _HUB_ERRORS as error:
        raise FileNotFoundError(
            f"path_or_repo: no local path {repository!r}, and the hub could not give it: {error}"
        ) from error
    checkpoints = sorted(snapshot.glob("*.ckpt"))
    if len(checkpoints) != 1:
        raise FileNotFoundError(
            f"path_or_repo: expected {WEIGHTS_NAME} or one .ckpt file in the hub's {repository!r}, "
            f"got {[file.name for file in checkpoints]}"
        )
    return checkpoints[0]


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing storage with another (safetensors refuses shared storage)."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            tensor = tensor.clone()
        seen.add(address)
        tensors[name] = tensor
    return tensors


def _publish(staging: Path, target: Path, text: str) -> None:
    if not target.exists() or not any(target.iterdir()):
        sync(staging)
        staging.chmod(0o777 & ~umask())
        os.replace(staging, target)
        return
    config = target / CONFIG_NAME
    changed = not config.is_file() or config.read_bytes() != text.encode("utf-8")
    if changed:
        config.unlink(missing_ok=True)
        sync(target)
    os.replace(staging / WEIGHTS_NAME, target / WEIGHTS_NAME)
    if changed:
        sync(target)
        os.replace(staging / CONFIG_NAME, config)
    sync(target)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """The process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
