"""Sparse cores in the order of the GPU's transforms, as records of an arena.

The kernels have the DFT of real numbers in Hartley form, H[k] = Re X[k] - Im X[k], where a core's frame
(`overtone.kernels.types.FrameKind.DFT`) has Re X[k] and Im X[k], k = 0 to N // 2. With H[-k] for H[(N - k) mod N],

    analysis     Re X[k] = (H[k] + H[-k]) / 2                Im X[k] = (H[-k] - H[k]) / 2
    synthesis    sqrt(N) irfft: of a real part  cas_k + cas_-k, of an imaginary one  cas_-k - cas_k

but for k = 0 and N / 2, where -k is k: one term H[k], cas_k, and imaginary parts count for nothing. So an entry of a core
becomes up to four; where a family's entries come in conjugate pairs, as FourierFT's do, they cancel and add up to fewer.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.kernels.gpu.plans import Plan
from overtone.kernels.gpu.records import spectral_record

_NOTHING = 1e-7
"""What is left of numbers that cancel, beside them."""


def spectral_core(
    rows: torch.Tensor,
    cols: torch.Tensor,
    values: torch.Tensor,
    shape: tuple[int, int],
    forward: Plan,
    inverse: Plan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """rows, cols: (n,) integers, values: (n,), of a core between the frames that both plans name, in those frames' own
    coordinates; shape: (p, q) of the layer; forward: of q numbers, inverse: of p; dtype: of the record's values, float32
    or float16. Returns the record (`overtone.kernels.gpu.records`), int32."""
    assert (inverse.size, forward.size) == shape
    assert forward.frame == inverse.frame
    rows, cols, values = rows.long().cpu(), cols.long().cpu(), values.double().cpu()
    if forward.frame == "dft":
        rows, cols, values = hartley_core(rows, cols, values, shape)
    weighted = values.numpy() * weights(inverse, rows.numpy()) * weights(forward, cols.numpy())
    places = torch.from_numpy(forward.place(cols.numpy()))
    return spectral_record(rows, places, torch.from_numpy(weighted), inverse, dtype)


def weights(plan: Plan, k: NDArray[np.int64]) -> NDArray[np.float64]:
    """`Plan.weight`, in numpy."""
    return np.where((k == 0) & (plan.frame == "dct"), math.sqrt(0.5), 1.0)


def hartley_core(
    rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A core of the DFT frame between Hartley forms: each place once, sorted by row, then by column."""
    p, q = shape
    out, out_signs = _parts(rows, p)
    into, into_signs = _parts(cols, q)
    # An analysis halves what it takes from two places.
    into_signs = torch.where((into[0] == into[1])[None], into_signs, into_signs / 2)
    places = out[:, None] * q + into[None, :]
    numbers = out_signs[:, None] * into_signs[None, :] * values
    found, where = torch.unique(places.flatten(), return_inverse=True)
    sums = values.new_zeros(len(found)).index_add(0, where, numbers.flatten())
    sizes = values.new_zeros(len(found)).index_add(0, where, numbers.abs().flatten())
    left = sums.abs() > _NOTHING * sizes
    return found[left] // q, found[left] % q, sums[left]


def _parts(at: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, n) k and -k, and with which sign each has a part in coordinate `at`; 0: none."""
    half = size // 2 + 1
    k = at % half
    mirrored = (size - k) % size
    imaginary, alone = at >= half, k == mirrored
    of_k = torch.where(imaginary, torch.where(alone, 0.0, -1.0), 1.0)
    of_mirrored = torch.where(alone, 0.0, 1.0)
    return torch.stack((k, mirrored)), torch.stack((of_k, of_mirrored)).double()
