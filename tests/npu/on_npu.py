"""Every op on device npu against the CPU, then a tiny tokenizer trained with ``device: npu``.

Run by test_npu.py in a process of its own; prints what it found as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch_npu

from ibq_fast import ops
from ibq_fast.train.config import TokenizerRun, load_config
from ibq_fast.train.device import build_accelerator
from ibq_fast.train.tokenizer import train_tokenizer

agreed: list[str] = []
generator = torch.Generator().manual_seed(0)


def leaves(*tensors: torch.Tensor, device: str) -> list[torch.Tensor]:
    return [tensor.clone().to(device).requires_grad_() for tensor in tensors]


def agree(name: str, function, *tensors: torch.Tensor) -> None:
    results = []
    for device in ("cpu", "npu"):
        operands = leaves(*tensors, device=device)
        loss = function(*operands, device)
        loss.backward()
        results.append([loss.detach().cpu(), *(tensor.grad.cpu() for tensor in operands)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    agreed.append(name)


z = torch.randn(37, 12, generator=generator)
codebook = torch.randn(50, 12, generator=generator)
labels = torch.randint(50, (37,), generator=generator)


def quantize(z, codebook, device):
    out = ops.index_backprop(z, codebook, temperature=0.3, norm_weight=0.5, scale=1.0, backend="composite")
    return out.z_q.square().sum() + out.sample_entropy - out.codebook_entropy


def cross_entropy(hidden, head, device):
    return ops.linear_cross_entropy(hidden, head, labels.to(device), label_smoothing=0.1, backend="composite")


agree("index_backprop", quantize, z, codebook)
agree("linear_cross_entropy", cross_entropy, z, codebook)
on_cpu = ops.codebook_search(z, codebook, with_lse=True, backend="composite")
on_npu = ops.codebook_search(z.to("npu"), codebook.to("npu"), with_lse=True, backend="composite")
assert torch.equal(on_cpu.indices, on_npu.indices.cpu())
torch.testing.assert_close(on_npu.lse.cpu(), on_cpu.lse)
agreed.append("codebook_search")
assert torch.equal(ops.code_histogram(labels.to("npu"), 50).cpu(), labels.bincount(minlength=50))
agreed.append("code_histogram")

folder = Path(sys.argv[1])
config = load_config(
    TokenizerRun,
    sys.argv[2],
    run__dir=str(folder / "run"),
    run__device="npu",
    run__steps=2,
    run__max_minutes=None,
    run__mixed_precision="auto",
    run__eval_batches=1,
    run__pictures=2,
    run__tensorboard=False,
    data__batch_size=4,
    model__base_channels=32,
    model__quantizer__codebook_size=64,
)
accelerator = build_accelerator(config.run)
exported = train_tokenizer(config)
figures = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
chosen = {row.op: row.backend for row in ops.backend_report("npu") if row.chosen}
sys.stdout.write(
    json.dumps(
        {
            "agree": agreed,
            "device": str(accelerator.device),
            "precision": accelerator.mixed_precision,
            "exported": (exported / "model.safetensors").is_file(),
            "figures": figures,
            "chosen": chosen,
            "products in bf16": any("in torch.bfloat16" in call for call in torch_npu.CALLED),
        }
    )
)
