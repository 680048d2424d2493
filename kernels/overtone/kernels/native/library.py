"""The native CPU kernels as functions of torch tensors: float32, last dimension contiguous.

Each has a twin in torch's operators, which tests compare it with (`overtone.kernels.native.reference`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import platform
from dataclasses import dataclass

import torch

from overtone.kernels.native import reference
from overtone.kernels.native.build import NotBuilt, load_library

log = logging.getLogger(__name__)

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "pack": (_INT, _INT, _POINTER, _POINTER),
    "product": (_INT, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER, _INT),
    "rms_norm": (_INT, _INT, _POINTER, _INT, _POINTER, _FLOAT, _POINTER),
    "silu_times": (_INT, _INT, _POINTER, _POINTER),
    "rotate_and_write": (*[_INT] * 4, _POINTER, _INT, *[_POINTER] * 4, _FLOAT, *[_POINTER] * 2),
    "dct": (_INT, _INT, _INT, *[_POINTER] * 3, *[_POINTER, _INT] * 2),
    "inverse_dct": (_INT, _INT, _INT, *[_POINTER] * 3, *[_POINTER, _INT] * 3),
    "sparse_rows": (_INT, _INT, *[_POINTER] * 2, _INT, _POINTER),
    "attend_rows": (*[_INT] * 5, _FLOAT, *[_POINTER] * 5, _INT, _INT, _POINTER, _INT, *[_POINTER] * 3),
}
_RESULTS = {"dct": ctypes.c_int, "inverse_dct": ctypes.c_int}  # 0 if memory is short


@dataclass(frozen=True, slots=True)
class DctPlan:
    """The tables of the DCT of one even size N.

    factors: of N / 2, none above `NativeKernels.largest_radix`, int64; roots: (N, 2), exp(-2 pi i k / N); phases: (N, 2),
    s_k / 2 times cosine and sine of pi k / 2 N, s_0 = sqrt(1 / N), else s_k = sqrt(2 / N).
    """

    size: int
    factors: torch.Tensor
    roots: torch.Tensor
    phases: torch.Tensor

    @property
    def arguments(self) -> tuple[int, int, int, int, int]:
        return (
            self.size,
            len(self.factors),
            self.factors.data_ptr(),
            self.roots.data_ptr(),
            self.phases.data_ptr(),
        )


@dataclass(frozen=True, slots=True)
class SeenRows:
    """m tokens that attend one by one.

    tokens: (m,), which of the packed tokens each is; sequences: (m,), its sequence's row of `table`; first, last: (m,), it
    sees the keys [first, last) of its sequence; table: (sequences, pages), where they are. All int64. parts: of
    `NativeKernels.part_keys` keys each, the most that [first, last) of one of them touches.
    """

    tokens: torch.Tensor
    sequences: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    table: torch.Tensor
    parts: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each query head and each key head (Qwen3): weights (D,)."""

    query: torch.Tensor
    key: torch.Tensor
    epsilon: float


class NativeKernels:
    """Compiled for this machine. A row of each result depends on that row's inputs alone, to the last bit."""

    def __init__(self) -> None:
        """Raises `NotBuilt`."""
        self._library = load_library()
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
        self._columns, self.lanes, self.part_keys, self.largest_radix = (
            int(getattr(self._library, name)()) for name in ("columns", "lanes", "part_keys", "largest_radix")
        )
        if self.lanes < 8 and platform.machine() == "x86_64":
            raise NotBuilt("the processor has neither AVX2 nor AVX-512")

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """(p, q) -> (ceil(p / columns), q, columns), zeros beyond p: the layout that `product` reads."""
        p, q = weight.shape
        panels = torch.empty(-(-p // self._columns), q, self._columns)
        self._library.pack(p, q, weight.contiguous().data_ptr(), panels.data_ptr())
        return panels

    def unpack(self, panels: torch.Tensor, p: int) -> torch.Tensor:
        """The (p, q) that was packed."""
        return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:p]

    def product(self, x: torch.Tensor, panels: torch.Tensor, p: int, plus: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + plus. x: (m, q); panels: W, packed; plus: (m, p), or (p,) for every row; returns (m, p)."""
        m, q = x.shape
        y = torch.empty(m, p)
        stride = 0 if plus is None or plus.ndim == 1 else plus.stride(0)
        at = None if plus is None else plus.data_ptr()
        self._library.product(m, p, q, x.data_ptr(), x.stride(0), panels.data_ptr(), at, stride, y.data_ptr(), p)
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight. x: (m, n); weight: (n,)."""
        m, n = x.shape
        y = torch.empty(m, n)
        self._library.rms_norm(m, n, x.data_ptr(), x.stride(0), weight.data_ptr(), epsilon, y.data_ptr())
        return y

    def silu_times(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. x: (m, 2 n), gate then up, contiguous; returns (m, n)."""
        m, n = x.shape[0], x.shape[1] // 2
        y = torch.empty(m, n)
        self._library.silu_times(m, n, x.data_ptr(), y.data_ptr())
        return y

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        signed_sin: torch.Tensor,
        slots: torch.Tensor,
        cache: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> None:
        """Rotates queries and keys in place, each head first normed; writes keys and values to their slots.

        qkv: (m, (heads + 2 kv_heads) D), contiguous; cos, signed_sin: (m, D), contiguous; slots: (m,) int64; cache: (slots,
        2, kv_heads, D).
        """
        m, width = qkv.shape
        kv_heads, dim = cache.shape[2:]
        self._library.rotate_and_write(
            m,
            width // dim - 2 * kv_heads,
            kv_heads,
            dim,
            qkv.data_ptr(),
            width,
            cos.data_ptr(),
            signed_sin.data_ptr(),
            None if norms is None else norms.query.data_ptr(),
            None if norms is None else norms.key.data_ptr(),
            0.0 if norms is None else norms.epsilon,
            slots.data_ptr(),
            cache.data_ptr(),
        )

    def dct_plan(self, size: int) -> DctPlan | None:
        """None if `size` is odd or has a prime factor above `largest_radix`: rare, and torch's FFT does those."""
        if size % 2:
            return None
        factors, rest = [], size // 2
        for factor in (8, 4, 2, *range(3, self.largest_radix + 1, 2)):
            while rest % factor == 0:
                factors.append(factor)
                rest //= factor
        if rest > 1:
            return None
        k = torch.arange(size, dtype=torch.float64)
        scale = torch.full_like(k, math.sqrt(2 / size))
        scale[0] = math.sqrt(1 / size)
        turn, half = 2 * math.pi * k / size, math.pi * k / (2 * size)
        roots = torch.stack((turn.cos(), -turn.sin()), dim=1)
        phases = torch.stack((half.cos(), half.sin()), dim=1) * (scale / 2)[:, None]
        return DctPlan(size, torch.tensor(factors, dtype=torch.int64), roots.float(), phases.float())

    def dct(self, plan: DctPlan, x: torch.Tensor) -> torch.Tensor:
        """The orthonormal DCT-II of each row. x: (m, N). Raises MemoryError."""
        m, n = x.shape
        z = torch.empty(m, n)
        if not self._library.dct(m, *plan.arguments, x.data_ptr(), x.stride(0), z.data_ptr(), n):
            raise MemoryError("no memory for a cosine transform")
        return z

    def inverse_dct(
        self,
        plan: DctPlan,
        u: torch.Tensor,
        y: torch.Tensor,
        rows: torch.Tensor | None = None,
        *,
        add: bool = False,
    ) -> None:
        """y[rows[i]] = the inverse DCT of u[i], added to what is there if `add`. Raises MemoryError.

        u: (m, N); y: (..., N) with rows apart as they are; rows: (m,) int64, all different, None: 0, 1, ...
        """
        at = None if rows is None else rows.data_ptr()
        done = self._library.inverse_dct(
            len(u), *plan.arguments, u.data_ptr(), u.stride(0), at, add, y.data_ptr(), y.stride(0)
        )
        if not done:
            raise MemoryError("no memory for a cosine transform")

    def sparse_rows(self, cores: torch.Tensor, z: torch.Tensor, p: int) -> torch.Tensor:
        """u[t] = K_t z[t]. cores: (m, 4) int64, addresses of K_t's rows and cols (int32) and values, and how many; returns
        (m, p)."""
        u = torch.empty(len(z), p)
        self._library.sparse_rows(len(z), p, cores.data_ptr(), z.data_ptr(), z.stride(0), u.data_ptr())
        return u

    def can_attend(self, cache: torch.Tensor) -> bool:
        """Whether `attend_rows` reads a cache (..., D) like this one."""
        return cache.dtype is torch.float32 and cache.device.type == "cpu" and cache.shape[-1] % self.lanes == 0

    def attend_rows(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        rows: SeenRows,
        out: torch.Tensor,
        page_tokens: int,
        scale: float,
    ) -> None:
        """out = softmax(scale q K^T) V for each of `rows`, written to its place; the others stay.

        query: (T, heads, D), copied if a token's heads are not contiguous; cache: (slots, 2, kv_heads, D); out: (T, heads,
        D), contiguous.
        """
        _, heads, dim = query.shape
        kv_heads, count = cache.shape[2], len(rows.tokens)
        query = query if query.stride()[1:] == (dim, 1) else query.contiguous()
        scratch = torch.empty(count * rows.parts * heads * (dim + 2))
        self._library.attend_rows(
            count,
            heads,
            kv_heads,
            dim,
            page_tokens,
            scale,
            rows.tokens.data_ptr(),
            rows.sequences.data_ptr(),
            rows.first.data_ptr(),
            rows.last.data_ptr(),
            rows.table.data_ptr(),
            rows.table.shape[1],
            rows.parts,
            query.data_ptr(),
            query.stride(0),
            cache.data_ptr(),
            scratch.data_ptr(),
            out.data_ptr(),
        )


@functools.cache
def native_kernels() -> NativeKernels | None:
    """This machine's, built and tried once a process; None, and a line in the log, where there are none."""
    try:
        kernels = NativeKernels()
    except NotBuilt as reason:
        log.warning("no native CPU kernels, torch's operators do their work, slower: %s", reason)
        return None
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator) for shape in ((7, 70), (50, 70)))
    if not torch.allclose(kernels.product(x, kernels.pack(w), 50), reference.product(x, w), atol=1e-4):
        log.error("the native CPU kernels compute wrongly here and are not used")
        return None
    return kernels
