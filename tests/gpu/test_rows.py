"""The Triton kernels of what a layer does to each token by itself against torch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from overtone.kernels.gpu.layer_kernels import GpuKernels
from overtone.kernels.layers import HeadNorms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
KERNELS = GpuKernels(90)
GENERATOR = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of float16, half a unit in the last place more or less."""
    tolerance = 2e-6 if found.dtype is torch.float32 else 2e-3
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


def llama_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As transformers has it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@BOTH
@pytest.mark.parametrize("n", [64, 576, 4096])
def test_rms_norm(dtype: torch.dtype, n: int) -> None:
    """Rows of a wider tensor; with a residual, the sum is rounded before it is normed."""
    x, residual = (numbers(3, n + 5).to(dtype).to(DEVICE)[:, :n] for _ in range(2))
    weight = (1 + 0.1 * numbers(n)).to(dtype).to(DEVICE)
    found = KERNELS.rms_norm(x, weight, 1e-5)
    assert found.dtype is dtype
    close(found, llama_norm(x, weight, 1e-5).cpu())
    assert torch.equal(found[1:2], KERNELS.rms_norm(x[1:2], weight, 1e-5))
    total, normed = KERNELS.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    close(normed, llama_norm(total, weight, 1e-5).cpu())
    assert torch.equal(normed, KERNELS.rms_norm(total, weight, 1e-5))


@BOTH
def test_silu_times(dtype: torch.dtype) -> None:
    both = 5 * numbers(3, 2 * 1100)
    both[0, :4] = torch.tensor([-1e3, 1e3, 0.0, -100.0])
    both = both.to(dtype).to(DEVICE)
    found = KERNELS.silu_times(both)
    assert found.dtype is dtype
    gate, up = both.cpu().chunk(2, dim=-1)
    close(found, F.silu(gate) * up)
    assert torch.equal(found[2:], KERNELS.silu_times(both[2:]))


@BOTH
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (2, 1, 80), (32, 8, 128)])
def test_rotate_and_write(dtype: torch.dtype, normed: bool, heads: int, kv_heads: int, dim: int) -> None:
    """Queries and keys turned in place, values as they were, keys and values in their slots; a row of slot -1 nowhere."""
    slots = torch.tensor([5, -1, 0, 3])
    qkv = numbers(4, (heads + 2 * kv_heads) * dim).to(dtype)
    angles = numbers(4, dim // 2)
    cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(dtype)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(dtype)
    weights = [(1 + 0.1 * numbers(dim)).to(dtype) for _ in range(2)]
    expected = qkv.view(4, -1, dim).double()
    if normed:
        by_head = qkv.view(4, -1, dim)
        expected[:, :heads] = llama_norm(by_head[:, :heads], weights[0], 1e-6).double()
        expected[:, heads:-kv_heads] = llama_norm(by_head[:, heads:-kv_heads], weights[1], 1e-6).double()
    turned = expected[:, :-kv_heads]
    swapped = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
    expected[:, :-kv_heads] = turned * cos.double()[:, None] + swapped * sin.double()[:, None]
    found, cache = qkv.clone().to(DEVICE), torch.full((2, 3, 4, 2, kv_heads, dim), 9.0, dtype=dtype, device=DEVICE)
    norms = HeadNorms(*(one.to(DEVICE) for one in weights), 1e-6) if normed else None
    KERNELS.rotate_and_write(found, cos.to(DEVICE), sin.to(DEVICE), slots.to(DEVICE), cache[:, 1], norms)
    close(found.view(4, -1, dim), expected)
    assert torch.equal(found.cpu().view(4, -1, dim)[:, -kv_heads:], qkv.view(4, -1, dim)[:, -kv_heads:])
    for row in (0, 2, 3):
        page, place = divmod(int(slots[row]), 4)
        assert torch.equal(cache[page, 1, place].flatten(), found[row, heads * dim :])
        cache[page, 1, place] = 9.0
    assert (cache == 9.0).all()
