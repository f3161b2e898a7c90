"""A generator's training: published recipes, the codes it reads with, corrupted context, images without a
cache.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import final_state, same, shortened
from test_token_cache import as_shards

from ibq_fast.data import Loader, build_loader
from ibq_fast.generator import Generator, GeneratorConfig
from ibq_fast.tokenizer import Tokenizer
from ibq_fast.train import GeneratorRun, OptimConfig, ScheduleConfig, load_config, train_generator
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.generator import GeneratorTask
from ibq_fast.train.token_source import EncodedImages

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ("B", "L", "XL", "XXL")


def task_of(config: GeneratorRun) -> GeneratorTask:
    tokenizer = Tokenizer.from_pretrained(config.tokenizer).requires_grad_(False)
    return GeneratorTask(config, build_accelerator(config.run), tokenizer)


@pytest.mark.parametrize("codes", [16384, 262144])
@pytest.mark.parametrize("size", SIZES)
def test_a_published_recipe_makes_its_step(
    size: str, codes: int, generator_run: GeneratorRun, photos: Path, tmp_path: Path
) -> None:
    """One block and few channels; everything else as the file says, but for a tokenizer of a few pixels."""
    wide = codes == 262144
    model = Tokenizer.from_pretrained(generator_run.tokenizer).config
    quantizer = replace(model.quantizer, codebook_size=codes, dim=8)
    folder = Tokenizer(replace(model, quantizer=quantizer)).save_pretrained(tmp_path / "tokenizer of many")
    config = load_config(
        GeneratorRun,
        CONFIGS / f"generator_{size}{'_262144' if wide else ''}.yaml",
        tokenizer=str(folder),
        cache_dir=str(tmp_path / "tokens"),
        run__dir=str(tmp_path / "run"),
        run__device="cpu",
        run__fsdp=False,
        data__root=str(photos),
        data__val_root=str(photos),
        data__resolution=8,
        data__num_workers=0,
        data__batch_size=2,
        model__grid=(4, 4),
        model__depth=1,
        model__num_heads=2,
        model__width=16,
        **({"model__token_dim": 8} if wide else {}),
    )
    assert config.model.vocab_size == codes
    assert config.run.activation_checkpointing == (size == "XXL")
    task = task_of(config)
    before = {name: p.detach().clone() for name, p in task.parameters().items()}
    task.update(0, 0.0)
    second = task.update(1, 0.0)  # the head starts at zero: only now does a gradient reach what is below it
    assert 0 < float(second["loss"]) < float("inf")
    assert float(second["grad_norm"]) > 0
    # Norms in blocks that are still closed get gradients below Adam's eps.
    still = {n for n, p in task.parameters().items() if p.equal(before[n]) and not n.endswith("_norm.weight")}
    assert still == ({"token_embedding.weight"} if wide else set())
    groups = {g["weight_decay"] for g in task.generator._optimizer.param_groups if g["decays"]}
    assert groups == {0.05}


@pytest.mark.parametrize("size", SIZES)
def test_both_vocabularies_have_one_recipe(size: str) -> None:
    narrow, wide = (
        load_config(GeneratorRun, CONFIGS / f"generator_{size}{suffix}.yaml") for suffix in ("", "_262144")
    )
    assert wide.model == replace(narrow.model, vocab_size=262144, token_dim=256)
    assert (wide.optim, wide.sample) == (narrow.optim, narrow.sample)
    assert (wide.data, wide.cache_crops) == (narrow.data, narrow.cache_crops)
    assert replace(wide.run, dir=narrow.run.dir) == narrow.run


@pytest.mark.parametrize(
    ("size", "depth", "heads", "width", "epochs", "warm", "last", "decay"),
    [
        ("B", 16, 16, 1024, 300, 6, 0.1, None),
        ("L", 20, 20, 1280, 350, 7, 0.1, None),
        ("XL", 24, 24, 1536, 400, 8, 0.01, None),
        ("XXL", 30, 30, 1920, 450, 9, 0.01, 0.08),
    ],
)
def test_published_sizes_and_schedules(
    size: str, depth: int, heads: int, width: int, epochs: int, warm: int, last: float, decay: float | None
) -> None:
    config = load_config(GeneratorRun, CONFIGS / f"generator_{size}.yaml")
    assert (config.model.depth, config.model.num_heads, config.model.width) == (depth, heads, width)
    assert config.run.steps == epochs * (1_281_167 // 768)
    assert config.optim == OptimConfig(
        kind="adamw",
        lr=3e-4,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        weight_decay_end=decay,
        clip_norm=1.0,
        schedule=ScheduleConfig(
            kind="linear",
            warmup_steps=warm * (1_281_167 // 768),
            warmup_start=0.005,
            plateau=0.05,
            final_ratio=last,
        ),
    )


@pytest.mark.parametrize("codes", [16384, 262144])
def test_grouped_heads_save_keys_and_values_at_both_vocabularies(codes: int) -> None:
    suffix = "_262144" if codes == 262144 else ""
    config = load_config(GeneratorRun, CONFIGS / f"generator_B{suffix}.yaml", model__num_kv_heads=4)
    with torch.device("meta"):
        grouped, whole = Generator(config.model), Generator(replace(config.model, num_kv_heads=None))
    saved = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in grouped.parameters())
    assert saved == 16 * 1024 * 2 * 12 * 64


def test_pkeep_replaces_what_is_seen_and_only_in_training() -> None:
    torch.manual_seed(0)
    config = GeneratorConfig(vocab_size=1000, num_classes=2, depth=1, num_heads=2, width=16, pkeep=0.7)
    model = Generator(config)
    tokens = torch.randint(0, 1000, (50, 256))
    context = model._context(tokens)
    assert context.shape == (50, 255)
    assert float((context == tokens[:, :-1]).double().mean()) == pytest.approx(0.7, abs=0.02)
    replaced = context[context != tokens[:, :-1]].double()  # any code as likely as any other
    assert float(replaced.mean()) == pytest.approx(500, abs=30)
    assert (int(replaced.min()), int(replaced.max())) == pytest.approx((0, 999), abs=5)
    assert model.eval()._context(tokens).equal(tokens[:, :-1])
    kept = Generator(replace(config, pkeep=1.0)).train()
    assert kept._context(tokens).equal(tokens[:, :-1])


def test_pkeep_does_not_change_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    silent = {f"{kind}_dropout": 0.0 for kind in ("class", "token", "residual", "mlp")}
    config = GeneratorConfig(
        vocab_size=9, num_classes=2, grid=(2, 2), depth=1, num_heads=2, width=16, gate_bias=1.0, **silent
    )
    model = Generator(replace(config, pkeep=0.5))
    torch.nn.init.normal_(model.head.weight)
    tokens, classes = torch.randint(0, 9, (6, 4)), torch.zeros(6, dtype=torch.int64)
    torch.manual_seed(1)
    seen = model._context(tokens)
    assert not seen.equal(tokens[:, :-1])
    torch.manual_seed(1)
    torch.testing.assert_close(model.loss(tokens, classes), model.eval().loss(tokens, classes, inputs=seen))


@pytest.mark.parametrize("input_codes", ["trained", "frozen"])
def test_tokens_are_read_with_the_tokenizers_codes(
    input_codes: Any, generator_run: GeneratorRun, tmp_path: Path
) -> None:
    run = replace(
        generator_run,
        input_codes=input_codes,
        model=replace(generator_run.model, token_dim=8),
        run=replace(generator_run.run, steps=3, save_every=0),
    )
    codes = Tokenizer.from_pretrained(run.tokenizer).quantizer.codebook.detach()
    assert task_of(run).parameters()["token_embedding.weight"].equal(codes)
    folder = train_generator(run)
    frozen = input_codes == "frozen"
    assert Generator.from_pretrained(folder).token_embedding.weight.equal(codes) == frozen
    state = final_state(run)["generator"]
    assert ("generator.token_embedding.weight" in state["optimizer"]) != frozen
    assert "generator.token_projection.expand.weight" in state["optimizer"]
    resumed = shortened(run, Path(run.run.dir), steps=5, resume=True)
    assert Generator.from_pretrained(train_generator(resumed)).token_embedding.weight.equal(codes) == frozen


def test_codes_of_another_size_are_refused(generator_run: GeneratorRun) -> None:
    with pytest.raises(
        ValueError, match=r"model\.token_dim: expected the dimension of the tokenizer's codes"
    ):
        replace(generator_run, input_codes="frozen")
    model = replace(generator_run.model, token_dim=5)
    with pytest.raises(ValueError, match=r"model\.token_dim: expected the tokenizer's 8, got 5"):
        train_generator(replace(generator_run, input_codes="frozen", model=model))
    with pytest.raises(
        ValueError, match=r"codes: expected \[vocab_size, token_dim\] = \[16, 5\].*got \[16, 8\]"
    ):
        Generator(model).set_input_codes(torch.zeros(16, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_crops": 0}, "cache_crops: expected at least 1, got 0"),
        ({"cache": "none", "cache_crops": 2}, "cache_crops: expected 1 without a cache, got 2"),
        ({"cache": "memory", "cache_dir": "x"}, "cache_dir: expected none with cache memory, got 'x'"),
    ],
)
def test_settings_of_the_cache(settings: dict[str, Any], message: str, generator_run: GeneratorRun) -> None:
    with pytest.raises(ValueError, match=message):
        replace(generator_run, **settings)


def test_without_a_cache_a_step_takes_the_images_of_a_tokenizers_training(
    generator_run: GeneratorRun,
) -> None:
    run = replace(generator_run, cache="none")
    tokenizer = Tokenizer.from_pretrained(run.tokenizer)
    source = EncodedImages(tokenizer, run.data, seed=3, rank=0, world_size=1)
    loader = build_loader(run.data, "train", seed=3)
    assert isinstance(loader, Loader)
    for _, (images, labels) in zip(range(5), loader.forever(), strict=False):
        tokens, classes = source.next()
        assert tokens.equal(tokenizer.encode(images).flatten(1))
        assert classes.equal(labels)
    assert source.batches == 3
    assert source.classes == 2


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_run_on_folders_or_shards_resumes_exactly(
    cache: Any, shards: bool, generator_run: GeneratorRun, photos: Path, tmp_path: Path
) -> None:
    root = str(photos)
    if shards:
        (tmp_path / "tar").mkdir()
        for number, file in enumerate(sorted(photos.rglob("*.png"))):
            place = tmp_path / "labelled" / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(file.read_bytes())
        root = as_shards(tmp_path / "tar", tmp_path / "labelled")
    kind = "shards" if shards else "image_folder"
    run = replace(
        generator_run, cache=cache, data=replace(generator_run.data, kind=kind, root=root, val_root=root)
    )
    whole = shortened(run, tmp_path / "whole", steps=8, save_every=0)
    train_generator(whole)
    broken = shortened(run, tmp_path / "broken", steps=5, save_every=0)
    train_generator(broken)
    train_generator(shortened(broken, tmp_path / "broken", steps=8, resume=True))
    same(final_state(whole)["generator"], final_state(broken)["generator"])


def test_a_position_in_shards_is_none_in_a_cache(generator_run: GeneratorRun) -> None:
    task = task_of(generator_run)
    with pytest.raises(ValueError, match="cache: expected none for tar shards exactly as when"):
        task.source.load_state({"lanes": [], "workers": 1})


def test_labels_that_the_model_does_not_have(
    generator_run: GeneratorRun, photos: Path, tmp_path: Path
) -> None:
    root = as_shards(tmp_path, photos, labels=False)
    data = replace(generator_run.data, kind="shards", root=root, val_root=str(photos))
    run = replace(generator_run, cache="none", data=data)
    with pytest.raises(ValueError, match=r"data\.(root|val_root): expected a label"):
        train_generator(replace(run, data=replace(data, val_root=root)))
    few = replace(generator_run, model=replace(generator_run.model, num_classes=1))
    with pytest.raises(
        ValueError, match=r"model\.num_classes: expected at least the data's 2 classes, got 1"
    ):
        train_generator(few)
