"""What the kernels compute, in plain torch, with the same tables: `overtone.kernels.gpu.plans` says what they mean."""

from __future__ import annotations

import torch

from overtone.kernels.gpu.plans import BLOCK, RADIX, Plan


def analysis(plan: Plan, x: torch.Tensor) -> torch.Tensor:
    """z by places, without weights. x, z: (T, N) float64."""
    assert not plan.inverse
    v = x.new_zeros(len(x), plan.padded, plan.whole)
    v[:, : plan.cut] = x[:, _source(plan)].view(len(x), plan.cut, plan.whole)
    a = _complex(plan.f) @ v.to(torch.complex128)
    b = _complex(plan.t) * a
    if plan.inner is None:
        z = (b @ _complex(plan.m).conj()).real
    else:
        small, turn = _complex(plan.inner.f[:2]), _complex(plan.inner.t)
        inner = turn * (small @ b.view(*b.shape[:2], RADIX, RADIX))
        z = (inner @ _complex(plan.m).conj()).real.flatten(2)
    return z[:, : plan.cut].flatten(1)


def synthesis(plan: Plan, u: torch.Tensor) -> torch.Tensor:
    """y of u by blocks, without weights. u: (T, blocks * BLOCK) float64; y: (T, N)."""
    assert plan.inverse
    by_k1 = u.view(len(u), plan.padded // BLOCK, plan.whole, BLOCK).transpose(1, 2).reshape(len(u), plan.whole, -1)
    a = _complex(plan.t).conj() * (by_k1.to(torch.complex128) @ _complex(plan.m))
    if plan.inner is None:
        v = (_complex(plan.f).conj().mT @ a).real
    else:
        small, turn = _complex(plan.inner.f[:2]).conj(), _complex(plan.inner.t).conj()
        of_ka = torch.einsum("kn,tkac->tanc", small, a.view(len(u), RADIX, RADIX, -1)) * turn[None, :, :, None]
        v = torch.einsum("am,tanc->tmnc", small, of_ka).real.reshape(len(u), plan.whole, -1)
    y = u.new_zeros(len(u), plan.size)
    y[:, _source(plan)] = v[:, :, : plan.cut].flatten(1)
    return y


def _source(plan: Plan) -> torch.Tensor:
    n = torch.arange(plan.size)
    return n if plan.frame == "dft" else torch.where(n < (plan.size + 1) // 2, 2 * n, 2 * (plan.size - 1 - n) + 1)


def _complex(table: torch.Tensor) -> torch.Tensor:
    return torch.complex(table[0].double(), table[1].double())
