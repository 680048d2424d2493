"""The native CPU kernels as functions of torch tensors: float32, last dimension contiguous.

Each has a twin in torch's operators, which tests compare it with (`overtone.kernels.native.reference`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from collections.abc import Callable, Sequence

import torch

from overtone.kernels.layers import HeadNorms
from overtone.kernels.native import reference
from overtone.kernels.native.build import NotBuilt, load_library
from overtone.kernels.native.records import OwnedRows, SeenRows, TransformPlan, low_rank_address

log = logging.getLogger(__name__)

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "pack": (_INT, _INT, _POINTER, _POINTER),
    "product": (_INT, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER, _INT),
    "rms_norm": (_INT, _INT, _POINTER, _INT, _POINTER, _FLOAT, _POINTER),
    "silu_times": (_INT, _INT, _POINTER, _POINTER),
    "rotate_and_write": (*[_INT] * 4, _POINTER, _INT, *[_POINTER] * 4, _FLOAT, *[_POINTER] * 2),
    "analyse": (_INT, _POINTER, *[_POINTER, _INT] * 2),
    "synthesise": (_INT, _POINTER, *[_POINTER, _INT] * 2),
    "sparse_rows": (_INT, _INT, *[_POINTER] * 2, _INT, _POINTER),
    "add_spectral": (_INT, *[_POINTER] * 2, _INT, *[_POINTER] * 2, _INT, _POINTER, _INT, _INT, _POINTER),
    "add_low_rank": (_INT, _INT, _POINTER, _INT, *[_POINTER] * 2, _INT, _INT, _POINTER),
    "attend_rows": (*[_INT] * 5, _FLOAT, *[_POINTER] * 5, _INT, _INT, _POINTER, _INT, *[_POINTER] * 3),
}
_RESULTS = dict.fromkeys(("analyse", "synthesise", "add_spectral"), ctypes.c_int)  # 0 if memory is short


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

    def dct_plan(self, size: int) -> TransformPlan | None:
        """None if `size` is odd or has a prime factor above `largest_radix`: rare, and torch's FFT does those."""
        return TransformPlan.of_dct(size, self.largest_radix)

    def dft_plan(self, size: int) -> TransformPlan | None:
        """The same for the real DFT."""
        return TransformPlan.of_dft(size, self.largest_radix)

    def analyse(self, plan: TransformPlan, x: torch.Tensor) -> torch.Tensor:
        """F x, the orthonormal DCT-II or DFT of each row. x: (m, N); returns (m, coefficients). Raises MemoryError."""
        return self._transformed(self._library.analyse, plan, x, plan.coefficients)

    def synthesise(self, plan: TransformPlan, u: torch.Tensor) -> torch.Tensor:
        """F^-1 u for each row. u: (m, coefficients); returns (m, N). Raises MemoryError."""
        return self._transformed(self._library.synthesise, plan, u, plan.size)

    @staticmethod
    def _transformed(transform: Callable[..., int], plan: TransformPlan, x: torch.Tensor, width: int) -> torch.Tensor:
        y = torch.empty(len(x), width)
        if not transform(len(x), plan.address, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0)):
            raise MemoryError("no memory for a transform")
        return y

    def sparse_rows(self, cores: torch.Tensor, z: torch.Tensor, p: int) -> torch.Tensor:
        """u[t] = K_t z[t]. cores: (m, 4) int64, addresses of K_t's rows and cols (int32) and values, and how many; returns
        (m, p)."""
        u = torch.empty(len(z), p)
        self._library.sparse_rows(len(z), p, cores.data_ptr(), z.data_ptr(), z.stride(0), u.data_ptr())
        return u

    def room_in_lanes(self, m: int, plan: TransformPlan) -> int:
        """Numbers that `add_spectral` keeps of m rows of x."""
        return -(-m // self.lanes) * plan.coefficients * self.lanes

    def add_spectral(
        self,
        plan: TransformPlan,
        x: torch.Tensor,
        z: torch.Tensor,
        owned: OwnedRows,
        layers: Sequence[tuple[TransformPlan, int, torch.Tensor]],
        *,
        known: bool = False,
    ) -> None:
        """y[t] += F^-1 K_t (F x[t]) for each of `owned` and each of `layers`. Raises MemoryError.

        plan: of x's columns; x: (n, q); z: at least `room_in_lanes` numbers, where F x is left for other layers on the same
        rows of the same x, and found if `known`. layers: the plan of its columns, the slot of its cores, (n, p) y, a view
        of a wider one or not.
        """
        targets = [
            n for other, slot, y in layers for n in (other.address, _slot(owned, slot), y.data_ptr(), y.stride(0))
        ]
        done = self._library.add_spectral(
            len(owned.owners),
            plan.address,
            x.data_ptr(),
            x.stride(0),
            None if owned.rows is None else owned.rows.data_ptr(),
            z.data_ptr(),
            known,
            owned.owners.data_ptr(),
            owned.cores.shape[1],
            len(layers),
            (_INT * len(targets))(*targets),
        )
        if not done:
            raise MemoryError("no memory for a transform")

    def add_low_rank(self, x: torch.Tensor, owned: OwnedRows, layers: Sequence[tuple[int, torch.Tensor]]) -> None:
        """y[t] += U_t^T (D_t x[t]) for each of `owned` and each of `layers`: the slot of its cores, (n, p) y. x: (n, q)."""
        targets = [n for slot, y in layers for n in (y.shape[1], _slot(owned, slot), y.data_ptr(), y.stride(0))]
        self._library.add_low_rank(
            len(owned.owners),
            x.shape[1],
            x.data_ptr(),
            x.stride(0),
            None if owned.rows is None else owned.rows.data_ptr(),
            owned.owners.data_ptr(),
            owned.cores.shape[1],
            len(layers),
            (_INT * len(targets))(*targets),
        )

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


def _slot(owned: OwnedRows, slot: int) -> int:
    """The address of the first adapter's core in a slot."""
    cores = owned.cores
    return cores.data_ptr() + slot * cores.stride(1) * cores.element_size()


@functools.cache
def native_kernels() -> NativeKernels | None:
    """This machine's, built and tried once a process; None, and a line in the log, where there are none."""
    try:
        kernels = NativeKernels()
    except NotBuilt as reason:
        log.warning("no native CPU kernels, torch's operators do their work, slower: %s", reason)
        return None
    if not _right(kernels):
        log.error("the native CPU kernels compute wrongly here and are not used")
        return None
    return kernels


def _right(kernels: NativeKernels) -> bool:
    """A product, and rows alone as among others: another compiler may have made other instructions of the loops."""
    generator = torch.Generator().manual_seed(0)
    x, w, up = (torch.randn(shape, generator=generator) for shape in ((7, 70), (50, 70), (50, 43)))
    cores, owners, y = (
        torch.tensor([[low_rank_address(w, up)]]),
        torch.zeros(7, dtype=torch.int64),
        torch.zeros(2, 7, 43),
    )
    kernels.add_low_rank(x, OwnedRows(None, owners, cores), [(0, y[0])])
    for row in range(7):
        kernels.add_low_rank(x, OwnedRows(torch.tensor([row]), owners[:1], cores), [(0, y[1])])
    product = kernels.product(x, kernels.pack(w), 50)
    return torch.allclose(product, reference.product(x, w), atol=1e-4) and torch.equal(y[0], y[1])
