"""Sparse cores between cosine and Fourier frames as dense matrices, by Triton against float64, in its interpreter or on a
GPU."""

from __future__ import annotations

import math

import pytest
import torch

from overtone.kernels import DCT, DFT, Frame, SparseCore, Term, compress, sparse_core
from overtone.kernels.gpu.materialise import MaterialiseConfig, filled_rows, materialise, waves
from overtone.kernels.reference import dct_matrix, dense_term
from support.cores import random_core

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = MaterialiseConfig(block_j=512, block_p=64, block_q=64, block_m=16, warps=4)
DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def shape_of(shape: tuple[int, int], frames: tuple[Frame, Frame]) -> tuple[int, int]:
    synthesis, analysis = (frame.coefficients(size) for frame, size in zip(frames, shape, strict=True))
    assert synthesis is not None
    assert analysis is not None
    return synthesis, analysis


def computed(
    core: SparseCore, shape: tuple[int, int], frames: tuple[Frame, Frame], operand: torch.dtype,
    addend: torch.Tensor | None, out: torch.Tensor, config: MaterialiseConfig = SMALL,
) -> torch.Tensor:  # fmt: skip
    synthesis, analysis = (waves(frame, size, DEVICE) for frame, size in zip(frames, shape, strict=True))
    rows = filled_rows(compress(core, DEVICE), analysis, synthesis)
    between = torch.full((len(rows.rows), shape[1]), torch.nan, dtype=operand, device=DEVICE)
    materialise(rows, analysis, synthesis, between, addend, out, config)
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frames", [(DCT, DCT), (DFT, DFT), (DFT, DCT)], ids=["dct", "dft", "both"])
@pytest.mark.parametrize("shape", [(96, 64), (75, 130), (64, 576)], ids=str)
def test_deltas(shape: tuple[int, int], frames: tuple[Frame, Frame], dtype: torch.dtype) -> None:
    """With entries at all borders: the first and last coefficients have weights of their own. Odd sizes too."""
    synthesis, analysis = frames
    p, q = shape_of(shape, frames)
    generator = torch.Generator().manual_seed(0)
    at = torch.tensor([[0, 0], [0, q - 1], [p - 1, 0], [p - 1, q - 1], [p // 2, q // 2], [(p - 1) // 2, (q - 1) // 2]])
    at = torch.cat((at, random_core((p, q), 40, generator).pattern.rows[:, None] * torch.tensor([1, 0])))
    at[6:, 1] = torch.randint(0, q, (len(at) - 6,), generator=generator)
    core = sparse_core(at[:, 0], at[:, 1], 1e-4 * torch.randn(len(at), generator=generator), (p, q))
    expected = dense_term(Term(analysis, core, synthesis), shape)
    found = computed(core, shape, frames, dtype, None, torch.full(shape, torch.nan, device=DEVICE))
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nnz", [0, 1, 200])
def test_added_to_a_weight_in_place(nnz: int, dtype: torch.dtype) -> None:
    """Rows of a larger weight; what lies beside them stays."""
    shape, generator = (96, 64), torch.Generator().manual_seed(1)
    weight = torch.randn(130, 80, generator=generator).to(dtype)
    core = random_core(shape, nnz, generator)
    expected = weight.double()
    expected[16:112, :64] += dense_term(Term(DCT, core, DCT), shape)
    found = weight.to(DEVICE).clone()
    part = found[16:112, :64]
    computed(core, shape, (DCT, DCT), dtype, part, part)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    changed = torch.zeros_like(weight, dtype=torch.bool)
    changed[16:112, :64] = nnz > 0
    assert torch.equal(found.cpu()[~changed], weight[~changed])


@pytest.mark.parametrize("frame", [DCT, DFT], ids=["dct", "dft"])
def test_phases_of_more_than_31_bits(frame: Frame) -> None:
    """The highest coefficients of a layer as long as a vocabulary."""
    size, inputs = 128256, 16
    assert waves(frame, size, DEVICE).wide
    assert not waves(frame, 18944, DEVICE).wide
    p, q = shape_of((size, inputs), (frame, DCT))
    rows, cols = torch.tensor([size // 2 - 1, p - 2]), torch.tensor([5, 3])
    out = torch.full((size, inputs), torch.nan, device=DEVICE)
    config = MaterialiseConfig(block_j=16, block_p=8192, block_q=16, block_m=16)
    core = sparse_core(rows, cols, torch.ones(2), (p, q))
    found = computed(core, (size, inputs), (frame, DCT), torch.float32, None, out, config).double()
    n = torch.arange(size)[:, None]
    if frame is DCT:
        synthesis = torch.cos(math.pi * (rows * (2 * n + 1) % (4 * size)).double() / (2 * size)) * math.sqrt(2 / size)
    else:  # frequency N / 2 - 1 twice, of the real and of the imaginary parts
        angle = 2 * math.pi * (rows[:1] * n % size).double() / size
        synthesis = torch.cat((torch.cos(angle), -torch.sin(angle)), 1) * 2 / math.sqrt(size)
    torch.testing.assert_close(found, synthesis @ dct_matrix(inputs)[cols], rtol=0, atol=1e-7)
