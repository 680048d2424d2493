"""The one table of tolerances: how far a fast path may be from its float64 twin, by dtype of the data."""

from __future__ import annotations

import torch

# (rtol, atol) for values of order one; sums over n such values may be off by a few roundings of the largest partial sum.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, scale: float = 1.0) -> None:
    """`actual` equals `expected` within the table's tolerance for `actual`'s dtype; scale: the size of what was summed."""
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol * max(1.0, scale))
