"""A torch-npu for tests: device "npu" on the CPU, by PyTorch's Python backend for PrivateUse1.

Imported as ``torch_npu``, it registers the device and a fallback for every operator, which runs it on the CPU
tensor behind each NPU tensor. Dispatch, autograd, autocast, device modules and accelerate see an NPU; the
arithmetic is the CPU's. Operators that PyTorch expects such a backend to bring (the ``overrideable`` ones)
are mapped to the CPU's.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

__version__ = "0.0-stand-in"
aten = torch.ops.aten


class NpuTensor(torch.Tensor):
    """A tensor of device npu."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Module(_DummyBackendModule):
    """``torch.npu``, as far as PyTorch and accelerate look into it."""

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def device(self, device: Any) -> Any:
        return nullcontext()

    def get_device_name(self, index: int = 0) -> str:
        return "stand-in"

    def is_bf16_supported(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


# The CPU tensor that holds the values, by the (empty) storage of the NPU tensor: PyTorch copies tensors in
# ways that lose Python attributes and keep the storage. Never emptied: tests are short.
_HOSTS: dict[int, torch.Tensor] = {}


def _wrap(host: torch.Tensor) -> torch.Tensor:
    if host.dtype == torch.float64:
        raise RuntimeError("this NPU has no float64")
    wrapped = torch._C._acc.create_empty_tensor(list(host.shape), host.dtype)
    wrapped.__class__ = NpuTensor
    _HOSTS[wrapped.untyped_storage()._cdata] = host
    return wrapped


def _is_npu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def _on_cpu(value: Any) -> Any:
    if _is_npu(value):
        return _HOSTS[value.untyped_storage()._cdata]
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device("cpu")
    return value


# NPU tensors look contiguous whatever their hosts are, so PyTorch asks for views where it would copy.
_CPUS = {
    aten.convolution_overrideable.default: aten.convolution.default,
    aten.view.default: aten.reshape.default,
}


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    CALLED.add(str(op))
    if op in (aten._copy_from.default, aten._copy_from_and_resize.default):
        source, target = _on_cpu(args[0]), _on_cpu(args[1])
        target.copy_(source)
        return args[1]
    if op is aten.convolution_backward_overrideable.default:
        grad, x, weight, *rest, mask = args
        hosts = tree_map(_on_cpu, (grad, x, weight))
        out = aten.convolution_backward.default(*hosts, [weight.shape[0]] if mask[2] else None, *rest, mask)
        return tuple(None if value is None else _wrap(value) for value in out)
    wanted = kwargs.get("device")
    to_npu = any(_is_npu(value) for value in torch.utils._pytree.tree_leaves((args, kwargs)))
    if wanted is not None:
        to_npu = torch.device(wanted).type == "npu"
    seen: dict[int, Any] = {}

    def lower(value: Any) -> Any:
        lowered = _on_cpu(value)
        if _is_npu(value):
            seen[id(lowered)] = value
        return lowered

    host_args, host_kwargs = tree_map(lower, (args, kwargs))
    out = _CPUS.get(op, op)(*host_args, **host_kwargs)

    def raise_again(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not to_npu:
            return value
        return seen[id(value)] if id(value) in seen else _wrap(value)

    return tree_map(raise_again, out)


CALLED: set[str] = set()
npu = Module()
_setup_privateuseone_for_python_backend("npu", backend_module=npu)
_others = torch.library.Library("_", "IMPL")
_others.fallback(_fallback, "PrivateUse1")
# A fallback comes after an operator's kernel for all devices, and views are such kernels: they would make
# tensors without a host.
_views = torch.library.Library("aten", "IMPL")
for _name in torch._C._dispatch_get_all_op_names():
    if _name.startswith("aten::") and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(_name, f"CompositeExplicitAutograd{kind}")
        for kind in ("", "NonFunctional")
    ):
        _packet, _, _overload = _name.removeprefix("aten::").partition(".")
        _op = getattr(getattr(aten, _packet), _overload or "default")
        _views.impl(_op, functools.partial(_fallback, _op), "PrivateUse1", allow_override=True)


def _in_low_precision(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What autocast does to products: floating-point NPU operands in its dtype."""
    dtype = torch.get_autocast_dtype("npu")
    with torch.autocast("npu", enabled=False):
        narrow = [
            value.to(dtype) if _is_npu(value) and value.dtype == torch.float32 else value for value in args
        ]
        CALLED.add(f"{op} in {dtype}")
        return op(*narrow, **kwargs)


_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _op in (aten.mm.default, aten.addmm.default, aten.linear.default, aten.conv2d.default, aten.bmm.default):
    _views.impl(_op, functools.partial(_in_low_precision, _op), "AutocastPrivateUse1")


def _autoload() -> None:
    """The entry point by which PyTorch imports this module."""
