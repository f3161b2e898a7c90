"""code_histogram: exact counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ibq_fast.ops import code_histogram, histogram


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(0, 12), max_size=60))
def test_counts(indices, backend) -> None:
    tensor = torch.tensor(indices, dtype=torch.int64)
    counts = code_histogram(tensor, 13, backend=backend)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, histogram.reference(tensor, 13))
    assert int(counts.sum()) == len(indices)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_any_shape_and_integer(dtype, backend) -> None:
    indices = torch.tensor([[1, 2], [2, 0]], dtype=dtype).T
    assert code_histogram(indices, 4, backend=backend).tolist() == [1, 1, 2, 0]
