"""Several processes train as one does: the same losses and weights, the same images, the same files."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import exit_codes, run_ranks, start_ranks
from test_checkpoint import same

from ibq_fast.checkpoint.training import latest_checkpoint, load_checkpoint
from ibq_fast.quantizer import IndexBackpropQuantizer
from ibq_fast.train import GeneratorRun, TokenizerRun, read_metrics, train_generator, train_tokenizer
from ibq_fast.train.__main__ import main
from ibq_fast.train.config import dump_config
from ibq_fast.train.peers import EXIT_CODE

STEPS = 20


def trained(
    config: TokenizerRun, folder: Path, world: int, work: Callable[[list[str]], int] = main
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The last checkpoint and the logged figures of ``config`` run by ``world`` processes."""
    config = replace(config, run=replace(config.run, dir=str(folder)))
    folder.mkdir()
    dump_config(config, folder / "given.yaml")
    run_ranks(world, work, ["tokenizer", f"--config={folder / 'given.yaml'}"])
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    return load_checkpoint(newest), read_metrics(folder, "train")


def steady(config: TokenizerRun, batch: int, entropy_reduce: str) -> TokenizerRun:
    """A run in which rounding stays rounding.

    τ = 0.01 makes a difference of the last digit in a logit a hundred of them in the entropies, until a code
    flips; channels alone in their group have biases without a gradient, which Adam would move by its noise.
    """
    quantizer = replace(config.model.quantizer, entropy_reduce=entropy_reduce, entropy_temperature=0.1)
    return replace(
        config,
        run=replace(config.run, steps=STEPS, log_every=1, save_every=0),
        data=replace(config.data, batch_size=batch),
        model=replace(config.model, channel_multipliers=(2, 2), quantizer=quantizer),
        optim=replace(config.optim, lr=1e-4, eps=1e-5),
    )


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_two_processes_train_as_one_with_the_doubled_batch(
    tokenizer_run: TokenizerRun, tmp_path: Path
) -> None:
    one, one_log = trained(steady(tokenizer_run, 4, "all"), tmp_path / "one", 1)
    two, two_log = trained(steady(tokenizer_run, 2, "all"), tmp_path / "two", 2)
    assert one["step"] == two["step"] == STEPS
    for part in ("model", "ema"):
        tensors = [
            c["tokenizer"][part] if part == "model" else c["tokenizer"][part]["average"] for c in (one, two)
        ]
        assert largest_difference(*tensors) <= 1e-5
    assert len(one_log) == len(two_log) == STEPS
    for first, second in zip(one_log, two_log, strict=True):
        for name in set(first) - {"split", "time", "images_per_second"}:
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5), (first["step"], name)
    assert torch.equal(one["progress"]["usage"]["counts"], two["progress"]["usage"]["counts"])
    # With the entropy of each device's own mean it is another training.
    apart, _ = trained(steady(tokenizer_run, 2, "device"), tmp_path / "apart", 2)
    assert largest_difference(one["tokenizer"]["model"], apart["tokenizer"]["model"]) > 1e-4


def test_two_processes_resume_bit_for_bit(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    config = steady(tokenizer_run, 2, "all")
    optim = replace(config.optim, schedule=replace(config.optim.schedule, kind="constant"))
    config = replace(config, model=replace(config.model, dropout=0.2), optim=optim)
    unbroken, _ = trained(replace(config, run=replace(config.run, steps=6)), tmp_path / "unbroken", 2)
    half = replace(config, run=replace(config.run, steps=4))
    trained(half, tmp_path / "broken", 2)
    arguments = ["tokenizer", f"--config={tmp_path / 'broken' / 'given.yaml'}", "--run.steps=6", "--resume"]
    run_ranks(2, main, arguments)
    newest = latest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert newest is not None
    resumed = load_checkpoint(newest)
    for parts in (unbroken, resumed):
        del parts["loop"]["seconds"]
    assert same(unbroken, resumed)


K, D, ROWS = 11, 4, (3, 5, 0)


def quantizer_and_rows() -> tuple[IndexBackpropQuantizer, torch.Tensor]:
    torch.manual_seed(0)
    quantizer = IndexBackpropQuantizer(
        codebook_size=K, dim=D, entropy_temperature=0.7, sample_entropy_weight=0.0, entropy_reduce="all"
    ).double()
    return quantizer, torch.randn(sum(ROWS), D, dtype=torch.float64)


def entropy_of_own_rows(folder: Path) -> None:
    """As a data-parallel step does it: backward on the own rows, then the mean of the gradients."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    quantizer, rows = quantizer_and_rows()
    mine = rows.split(ROWS[:world])[rank].clone().requires_grad_()
    out = quantizer(mine, channel_last=True)
    out.entropy_loss.backward()
    assert quantizer.codebook.grad is not None
    dist.all_reduce(quantizer.codebook.grad)
    quantizer.eval()
    alone = quantizer(mine[:1], channel_last=True) if rank == 0 else None  # no one else is asked
    state = {
        "loss": out.entropy_loss.detach(),
        "codebook": quantizer.codebook.grad / world,
        # Each process's rows are its own: their gradient is averaged with nothing.
        "rows": mine.grad / world if mine.grad is not None else None,
        "alone": alone is not None,
    }
    torch.save(state, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_entropy_over_all_devices_has_the_gradient_of_one(world: int, tmp_path: Path) -> None:
    quantizer, rows = quantizer_and_rows()
    rows = rows[: sum(ROWS[:world])].clone().requires_grad_()
    whole = quantizer(rows, channel_last=True)
    whole.entropy_loss.backward()
    run_ranks(world, entropy_of_own_rows, tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for state in states:
        torch.testing.assert_close(state["loss"], whole.entropy_loss.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(state["codebook"], quantizer.codebook.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(torch.cat([s["rows"] for s in states]), rows.grad, rtol=1e-10, atol=1e-13)
    assert states[0]["alone"]


def with_discriminator(config: TokenizerRun, **loss: Any) -> TokenizerRun:
    losses = replace(config.loss, adversarial="hinge", lecam_decay=0.5, **loss)
    return replace(
        config,
        run=replace(config.run, steps=3, log_every=1, save_every=0),
        data=replace(config.data, batch_size=2),
        model=replace(config.model, channel_multipliers=(1,)),
        loss=losses,
    )


def lecam_of_each_process(arguments: list[str], folder: Path) -> None:
    """A training whose processes leave behind LeCam's averages and every batch's mean logits."""
    from ibq_fast.tokenizer import TokenizerLoss

    seen: list[list[torch.Tensor]] = []
    update = TokenizerLoss._update_averages

    def noted(self: TokenizerLoss, real: torch.Tensor, fake: torch.Tensor) -> None:
        update(self, real, fake)
        seen.append([real.mean(), fake.mean(), self.real_average.clone(), self.fake_average.clone()])

    TokenizerLoss._update_averages = noted  # type: ignore[method-assign]
    assert main(arguments) == 0
    torch.save(torch.tensor(seen), folder / f"{dist.get_rank()}.pt")


def test_lecam_averages_are_of_all_processes_and_saved(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    config = with_discriminator(tokenizer_run)
    dump_config(config, tmp_path / "given.yaml")
    arguments = ["tokenizer", f"--config={tmp_path / 'given.yaml'}"]
    run_ranks(2, lecam_of_each_process, arguments, tmp_path)
    ranks = torch.stack([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    means, averages = ranks[..., :2], ranks[..., 2:]
    assert not torch.equal(means[0], means[1])
    assert torch.equal(averages[0], averages[1])
    expected = torch.zeros(2)
    for step in range(3):
        expected = 0.5 * expected + 0.5 * means[:, step].mean(0)
        torch.testing.assert_close(averages[0, step], expected, rtol=1e-5, atol=1e-7)
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    parts = load_checkpoint(newest)
    buffers = parts["progress"]["loss"]["buffers"]
    saved = torch.stack([buffers["real_average"], buffers["fake_average"]])
    assert torch.equal(saved, averages[0, -1])
    # Batch norms are each device's own; their running statistics follow the main process's.
    assert any("running_mean" in name for name in parts["discriminator"]["model"])
    # Resumed, the averages go on from there.
    run_ranks(2, lecam_of_each_process, [*arguments, "--run.steps=4", "--resume"], tmp_path)
    ranks = torch.stack([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    torch.testing.assert_close(
        ranks[0, 0, 2:], 0.5 * expected + 0.5 * ranks[:, 0, :2].mean(0), rtol=1e-5, atol=1e-7
    )


def test_synchronised_batch_norm_is_refused_on_the_cpu(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    config = with_discriminator(tokenizer_run, discriminator_norm="all")
    dump_config(config, tmp_path / "given.yaml")
    processes = start_ranks(2, main, ["tokenizer", f"--config={tmp_path / 'given.yaml'}"], errors=tmp_path)
    assert set(exit_codes(processes)) <= {1, EXIT_CODE}
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    expected = 'loss.discriminator_norm: expected "device" on the CPU (with gloo)'
    assert any(expected in text for text in said)


def test_bad_images_are_counted_over_all_processes(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(str(tokenizer_run.data.root), photos)
    for name in ("flat/0.png", "flat/3.png", "rough/2.png"):
        (photos / name).write_bytes(b"")
    config = replace(
        with_discriminator(tokenizer_run),
        loss=tokenizer_run.loss,
        data=replace(tokenizer_run.data, root=str(photos), batch_size=2, max_bad_fraction=0.25),
    )
    config = replace(config, run=replace(config.run, steps=12, log_every=12))
    _, log = trained(config, tmp_path / "run2", 2)
    assert log[-1]["bad_images"] == 3
    config = replace(config, data=replace(config.data, max_bad_fraction=0.2))
    config = replace(config, run=replace(config.run, dir=str(tmp_path / "too_many")))
    dump_config(config, tmp_path / "given.yaml")
    processes = start_ranks(2, main, ["tokenizer", f"--config={tmp_path / 'given.yaml'}"], errors=tmp_path)
    assert set(exit_codes(processes)) <= {1, EXIT_CODE}
    assert "3 of 12 images are bad, more than max_bad_fraction 0.2" in (tmp_path / "0").read_text()


def test_shards_through_the_command_line(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    """Two processes with two workers each, then one and four that go on; a broken sample is counted once."""
    images = sorted(Path(str(tokenizer_run.data.root)).rglob("*.png"))
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for image in images[shard::4]:
                archive.add(image, f"{image.parent.name}_{image.stem}.png")
            archive.addfile(tarfile.TarInfo(f"empty_{shard}.png"))
    config = replace(
        tokenizer_run,
        run=replace(tokenizer_run.run, steps=5, log_every=1, save_every=0),
        data=replace(
            tokenizer_run.data,
            kind="shards",
            root=f"{tmp_path}/{{0..3}}.tar",
            val_root=f"{tmp_path}/0.tar",
            batch_size=2,
            num_workers=2,
        ),
    )
    dump_config(config, tmp_path / "given.yaml")
    arguments = ["tokenizer", f"--config={tmp_path / 'given.yaml'}", "--run.log_every=1"]
    for world, workers, steps in ((2, 2, 5), (1, 0, 8), (4, 1, 10)):
        options = [f"--run.steps={steps}", f"--data.num_workers={workers}", "--resume"]
        run_ranks(world, main, [*arguments, *options])
        newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
        assert newest is not None
        parts = load_checkpoint(newest)
        assert parts["step"] == steps
        assert len(parts["progress"]["data"]["lanes"]) == world * max(workers, 1)
    assert read_metrics(tmp_path / "run", "train")[4]["bad_images"] == 4


@pytest.mark.parametrize(
    ("optim", "run_options", "token_dim"),
    [
        ({}, {}, None),
        ({"accumulate": 3, "ema_decay": 0.0}, {"activation_checkpointing": True}, 8),  # with frozen codes
    ],
)
def test_sharded_weights_train_as_whole_ones(
    optim: dict[str, Any],
    run_options: dict[str, Any],
    token_dim: int | None,
    generator_run: GeneratorRun,
    tmp_path: Path,
) -> None:
    config = replace(
        generator_run,
        run=replace(generator_run.run, steps=6, save_every=3, log_every=1, sample_every=3, **run_options),
        data=replace(generator_run.data, batch_size=1),
        cache="memory",
        optim=replace(generator_run.optim, eps=1e-5, **optim),
        model=replace(
            generator_run.model,
            **dict.fromkeys(("class_dropout", "token_dropout", "residual_dropout", "mlp_dropout"), 0.0),
            token_dim=token_dim,
        ),
        input_codes="frozen" if token_dim else "own",
    )
    states = {}
    for world, fsdp in ((1, False), (2, True)):
        folder = tmp_path / f"fsdp {fsdp}"
        run = replace(config.run, dir=str(folder), fsdp=fsdp)
        given = replace(config, run=run, data=replace(config.data, batch_size=2 // world))
        dump_config(given, tmp_path / "given.yaml")
        run_ranks(world, main, ["generator", f"--config={tmp_path / 'given.yaml'}"])
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        states[fsdp] = load_checkpoint(newest)
        assert (folder / "generator" / "model.safetensors").is_file()
    one, sharded = states[False]["generator"], states[True]["generator"]
    assert largest_difference(one["model"], sharded["model"]) <= 1e-5
    if one["ema"] is not None:
        assert largest_difference(one["ema"]["average"], sharded["ema"]["average"]) <= 1e-5
    for name, entry in one["optimizer"].items():
        assert largest_difference(entry, sharded["optimizer"][name]) <= 1e-4
    # What was sharded over two goes on over three, and as whole weights in one process.
    sizes = {1: 6, 3: 2}
    resumed = {}
    for world, batch in sizes.items():
        folder = tmp_path / f"resumed {world}"
        shutil.copytree(tmp_path / "fsdp True", folder)
        run = replace(config.run, dir=str(folder), fsdp=world > 1, steps=8)
        given = replace(config, run=run, data=replace(config.data, batch_size=batch))
        dump_config(given, tmp_path / "given.yaml")
        run_ranks(world, main, ["generator", f"--config={tmp_path / 'given.yaml'}", "--resume"])
        newest = latest_checkpoint(folder / "checkpoints")
        assert newest is not None
        resumed[world] = load_checkpoint(newest)["generator"]["model"]
    assert largest_difference(resumed[1], resumed[3]) <= 1e-5


@pytest.mark.parametrize("world", [1, 4])
def test_a_generator_of_two_goes_on_with_the_next_images(
    world: int, generator_run: GeneratorRun, tmp_path: Path
) -> None:
    """12 images; 2 of 2 processes' steps took 8 of them, whatever the processes that go on."""
    run = replace(generator_run.run, steps=2, save_every=0, dir=str(tmp_path / "run"))
    given = replace(generator_run, run=run, cache="memory", data=replace(generator_run.data, batch_size=2))
    dump_config(given, tmp_path / "given.yaml")
    arguments = ["generator", f"--config={tmp_path / 'given.yaml'}"]
    run_ranks(2, main, arguments)
    run_ranks(world, main, [*arguments, "--resume", "--run.steps=3", "--data.batch_size=1"])
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    position = load_checkpoint(newest)["progress"]["data"]
    images = 12 * position["epoch"] + position["step"] * position["global_batch"]
    assert (images, position["global_batch"]) == (8 + world, world)


def test_what_cannot_be_sharded(tokenizer_run: TokenizerRun, generator_run: GeneratorRun) -> None:
    with pytest.raises(ValueError, match=r"run\.fsdp: expected false for a tokenizer"):
        train_tokenizer(replace(tokenizer_run, run=replace(tokenizer_run.run, fsdp=True)))
    with pytest.raises(ValueError, match=r"run\.fsdp: expected several processes"):
        train_generator(replace(generator_run, run=replace(generator_run.run, fsdp=True)))
