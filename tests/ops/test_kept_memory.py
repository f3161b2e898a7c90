"""Large gradients of the CPU operators come from memory that is kept between steps."""

import gc

import torch
from torch import Tensor

from ibq_fast.ops import release_memory, straight_through_select

_CODES, _DIM = 1 << 17, 64  # 32 MB: the smallest gradient that is kept
_BYTES = _CODES * _DIM * 4


def _gradient(z: Tensor, codebook: Tensor) -> Tensor:
    codebook.grad = None
    straight_through_select(z, codebook, backend="native").z_q.sum().backward()
    assert codebook.grad is not None
    return codebook.grad


def test_a_freed_gradient_serves_the_next_step_and_can_be_given_back() -> None:
    release_memory()
    z, codebook = torch.randn(4, _DIM), torch.randn(_CODES, _DIM).requires_grad_()
    first = _gradient(z, codebook)
    kept, where = first.clone(), first.data_ptr()
    held = _gradient(z, codebook)  # `first` still lives: a second buffer
    assert held.data_ptr() != where
    torch.testing.assert_close(held, kept, rtol=0, atol=0)
    del first
    assert _gradient(z, codebook).data_ptr() == where
    codebook.grad = None
    del held
    gc.collect()
    assert release_memory() == 2 * _BYTES
    assert release_memory() == 0


def test_a_gradient_outlives_what_is_given_back() -> None:
    z, codebook = torch.randn(4, _DIM), torch.randn(_CODES, _DIM).requires_grad_()
    grad = _gradient(z, codebook)
    kept = grad.clone()
    release_memory()
    torch.testing.assert_close(grad, kept, rtol=0, atol=0)
    grad.share_memory_()  # as a data loader's worker or a checkpoint in another process would ask for
    torch.testing.assert_close(grad, kept, rtol=0, atol=0)
