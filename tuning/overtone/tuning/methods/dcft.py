"""DCFT: deconvolution in a subspace (COLING 2025, pp. 3924-3935, arXiv 2503.01419).

    delta_W = c [(A^T B^T) kron K]^T        A: (R, q / d), B: (p / d, R), K: (d, d)        c = alpha / (lora_r + 1e-5)

To x it is applied without the product: x as (q / d, d) -> A x -> (A x) K -> B (A x K), (p / d, d) -> y. The loss gets
reg times the mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from overtone.adapters.families.tensors import PREFIX
from overtone.errors import InvalidRequest
from overtone.tuning.methods.attach import Branch, target_layers
from overtone.tuning.methods.budget import Budget, check_choice, check_count, check_dropout, check_number
from overtone.tuning.methods.spectrum import working_dtype
from overtone.tuning.methods.tuned import TunedBranches
from overtone.tuning.methods.types import Group

_EPSILON = 1e-5
_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class DcftMethod(Budget):
    """d: the kernel's size, a divisor of both sides of every layer; rank: R; alpha, lora_r: of c, the authors have 16 or 32
    and 2 or 3; reg: of the penalty, 0.1 to 0.3 for the authors.

    init: "normal", A, B and K ~ N(0, 0.02) as in the authors' code, a product of three small factors, which learns slowly at
    first; or "zero", K = 0 with random A and B that are orthonormal already, which is where the penalty draws them, so that
    delta_W is zero and the penalty too.
    """

    name: ClassVar[str] = "dcft"
    d: int = 8
    rank: int = 1
    alpha: float = 16.0
    lora_r: int = 2
    reg: float = 0.1
    init: str = "zero"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.d, "d")
        check_count(self.rank, "rank")
        check_number(self.alpha, "alpha", positive=True)
        check_count(self.lora_r, "lora_r")
        check_number(self.reg, "reg")
        if self.reg < 0:
            raise InvalidRequest(f"reg must not be below 0, not {self.reg!r}", field="reg")
        check_choice(self.init, "init", ("zero", "normal"))
        check_dropout(self.dropout)

    @property
    def scale(self) -> float:
        """c"""
        return self.alpha / (self.lora_r + _EPSILON)

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> TunedDcft:
        """See `Method.attach`. The factors are drawn on the CPU, layer by layer in the model's order."""
        shapes = target_layers(model, self.targets)
        for name, (p, q) in shapes.items():
            if p % self.d or q % self.d:
                message = f"d is {self.d}, which does not divide both sides of {name}, {p} x {q}"
                raise InvalidRequest(message, field="d")
            if self.rank > min(p, q) // self.d:
                message = f"rank is {self.rank}, but of {name}, {p} x {q}, it can be at most {min(p, q) // self.d}"
                raise InvalidRequest(message, field="rank")
        generator = torch.Generator().manual_seed(seed)
        branches = {name: self._branch(shape, generator) for name, shape in shapes.items()}
        return TunedDcft(self, model, branches)

    def _branch(self, shape: tuple[int, int], generator: torch.Generator) -> DcftBranch:
        (p, q), d = shape, self.d
        a, b, k = (
            torch.randn(*size, generator=generator) * _DEVIATION
            for size in ((self.rank, q // d), (p // d, self.rank), (d, d))
        )
        if self.init == "zero":
            a, b, k = torch.linalg.qr(a.T)[0].T.contiguous(), torch.linalg.qr(b)[0], torch.zeros_like(k)
        return DcftBranch(shape, a, b, k, self.scale)


class DcftBranch(Branch):
    """a: (R, q / d), b: (p / d, R), k: (d, d), float32; scale: c."""

    def __init__(self, shape: tuple[int, int], a: torch.Tensor, b: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        super().__init__(shape)
        self.a, self.b, self.k = nn.Parameter(a), nn.Parameter(b), nn.Parameter(k)
        self._scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype, d = working_dtype(x), self.k.shape[0]
        a, b, k = self.a.to(dtype), self.b.to(dtype), self.k.to(dtype)
        patches = x.to(dtype).reshape(*x.shape[:-1], -1, d)  # (..., q / d, d)
        grown: torch.Tensor = b @ ((a @ patches) @ k)  # (..., p / d, d)
        return grown.flatten(-2) * self._scale


class TunedDcft(TunedBranches):
    def __init__(self, method: DcftMethod, model: nn.Module, branches: Mapping[str, DcftBranch]) -> None:
        super().__init__(method, model, branches, dropout=method.dropout)
        self._method = method
        self._factors = dict(branches)

    @property
    def groups(self) -> Sequence[Group]:
        return [Group("factors", [part for f in self._factors.values() for part in (f.a, f.b, f.k)])]

    def penalty(self) -> torch.Tensor | None:
        if not self._method.reg:
            return None
        gaps = [_gap(rows) for f in self._factors.values() for rows in (f.a, f.b.T)]
        return self._method.reg * torch.stack(gaps).mean()

    def _contents(self) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        for name, factors in self._factors.items():
            parts = {"lora_A": factors.a, "lora_B": factors.b, "lora_C": factors.k}
            tensors |= {f"{PREFIX}{name}.{part}": tensor for part, tensor in parts.items()}
        config: dict[str, object] = {
            "peft_type": "DCFT",
            "lora_r": self._method.lora_r,
            "lora_alpha": self._method.alpha,
            "kernel_size": self._method.d,
            "rank": self._method.rank,
            "lora_dropout": self._method.dropout,
        }
        return config, tensors


def _gap(rows: torch.Tensor) -> torch.Tensor:
    """||R R^T - I||_F, rows: (R, N)."""
    gap: torch.Tensor = torch.linalg.matrix_norm(rows @ rows.T - torch.eye(rows.shape[0]).to(rows))
    return gap
