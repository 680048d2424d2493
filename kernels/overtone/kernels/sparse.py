"""The sparse core: u[t] = K_a(t) z[t] for packed tokens t, each with the core of its own adapter."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from overtone.kernels.cores import SparseCore, SparsePattern


@dataclass(frozen=True, eq=False)
class CsrPattern:
    """A `SparsePattern` as compressed rows, on a device.

    row_counts: (p,) int32, entries in each row; pointers: (p + 1,), cols: (n,) int32.
    """

    row_counts: torch.Tensor
    pointers: torch.Tensor
    cols: torch.Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.row_counts, self.pointers, self.cols))


PatternCache: TypeAlias = MutableMapping[str, CsrPattern]
"""The patterns of one device that adapters share, by key."""


@dataclass(frozen=True, slots=True, eq=False)
class CsrCore:
    """A `SparseCore` ready to be applied. values: (n,) float32; `matrix` is the same as a torch CSR tensor and shares their
    memory; shared: the pattern belongs to many adapters."""

    pattern: CsrPattern
    values: torch.Tensor
    matrix: torch.Tensor
    shared: bool

    @property
    def row_counts(self) -> torch.Tensor:
        return self.pattern.row_counts

    @property
    def cols(self) -> torch.Tensor:
        return self.pattern.cols

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    @property
    def nbytes(self) -> int:
        """Without a shared pattern, which is not this core's."""
        return self.values.numel() * self.values.element_size() + (0 if self.shared else self.pattern.nbytes)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        return apply_segment(z, self)


def pattern_key(pattern: SparsePattern) -> str:
    """Under which a `PatternCache` has it, "" if it is not shared: layers of two shapes may have the same coordinates."""
    return f"{pattern.key} {pattern.shape}" if pattern.key else ""


def compress(core: SparseCore, device: torch.device | None = None, patterns: PatternCache | None = None) -> CsrCore:
    """Compressed rows of `core`, on `device`."""
    key = pattern_key(core.pattern) if patterns is not None else ""
    pattern = patterns.get(key) if key and patterns is not None else None
    if pattern is None:
        pattern = _compressed(core.pattern, device)
        if key and patterns is not None:
            patterns[key] = pattern
    return csr_core(pattern, core.values.to(device), shared=bool(key))


def csr_core(pattern: CsrPattern, values: torch.Tensor, *, shared: bool) -> CsrCore:
    """values: (n,) float32 on the pattern's device."""
    matrix = torch.sparse_csr_tensor(pattern.pointers, pattern.cols, values, size=pattern.shape, check_invariants=False)
    return CsrCore(pattern, values, matrix, shared)


def _compressed(pattern: SparsePattern, device: torch.device | None) -> CsrPattern:
    """The coordinates are sorted already, so this is one count."""
    p = pattern.shape[0]
    counts = torch.bincount(pattern.rows, minlength=p).to(torch.int32)
    pointers = torch.zeros(p + 1, dtype=torch.int32)
    pointers[1:] = counts.cumsum(0)
    return CsrPattern(counts.to(device), pointers.to(device), pattern.cols.to(device), pattern.shape)


@dataclass(frozen=True, slots=True)
class BagPlan:
    """The cores of T tokens as T * p bags over the flattened z: made once per composition of a batch, used every step.

    indices: (N,) int32 into z.flatten(); offsets: (T * p,) int32, where each bag begins; weights: (N,) float32.
    """

    indices: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor
    tokens: int
    shape: tuple[int, int]


def plan_bags(cores: Sequence[CsrCore | None], shape: tuple[int, int]) -> BagPlan:
    """The bags of one token per entry of `cores`; None stands for a token whose adapter has no core here."""
    p, q = shape
    live = [(t, core) for t, core in enumerate(cores) if core is not None]
    assert live, "a batch without any core has nothing to plan"
    assert len(cores) * max(p, q) < 2**31
    assert all(core.shape == shape for _, core in live)
    device = live[0][1].values.device
    tokens = torch.tensor([t for t, _ in live], dtype=torch.int32, device=device)
    sizes = torch.tensor([core.values.numel() for _, core in live], device=device)
    counts = torch.zeros(len(cores), p, dtype=torch.int32, device=device)
    counts[tokens.long()] = torch.stack([core.row_counts for _, core in live])
    counts = counts.flatten()
    return BagPlan(
        indices=torch.cat([core.cols for _, core in live]) + torch.repeat_interleave(tokens * q, sizes),
        offsets=counts.cumsum(0, dtype=torch.int32) - counts,
        weights=torch.cat([core.values for _, core in live]),
        tokens=len(cores),
        shape=shape,
    )


def apply_bags(z: torch.Tensor, plan: BagPlan) -> torch.Tensor:
    """u[t, r] = sum of weights * z over bag (t, r). z: (T, q) float32; returns (T, p) float32."""
    assert z.shape == (plan.tokens, plan.shape[1])
    assert z.dtype == torch.float32
    sums = F.embedding_bag(plan.indices, z.reshape(-1, 1), plan.offsets, mode="sum", per_sample_weights=plan.weights)
    return sums.view(plan.tokens, plan.shape[0])


def apply_segment(z: torch.Tensor, core: CsrCore) -> torch.Tensor:
    """u = z K^T for consecutive tokens that share one core. z: (T, q) float32; returns (T, p) float32."""
    assert z.shape[1] == core.shape[1]
    assert z.dtype == torch.float32
    return torch.mm(core.matrix, z.T.contiguous()).T


class SparseStep:
    """u[t] = K_a(t) z[t] for the packed tokens of one forward pass: the dispatcher over the two operators above.

    The first `bags.tokens` rows have a core each (decoding sequences), then come stretches of consecutive rows that share
    one (prompts); a stretch whose core is None stays zero.
    """

    def __init__(
        self,
        bags: BagPlan | None,
        bag_tokens: int,
        segments: Sequence[tuple[int, CsrCore | None]],
        shape: tuple[int, int],
    ) -> None:
        assert bags is None or bags.tokens == bag_tokens
        self.shape = shape
        self.tokens = bag_tokens + sum(length for length, _ in segments)
        self._bags = bags
        self._bag_tokens = bag_tokens
        self._segments: list[tuple[slice, CsrCore]] = []
        start = bag_tokens
        for length, core in segments:
            if core is not None:
                self._segments.append((slice(start, start + length), core))
            start += length

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """z: (T, q) float32; returns (T, p) float32."""
        assert z.shape == (self.tokens, self.shape[1])
        if self._bags is not None and self._bag_tokens == self.tokens:
            return apply_bags(z, self._bags)
        u = z.new_zeros(self.tokens, self.shape[0])
        if self._bags is not None:
            u[: self._bag_tokens] = apply_bags(z[: self._bag_tokens], self._bags)
        for span, core in self._segments:
            u[span] = apply_segment(z[span], core)
        return u
