"""Dense deltas of layers as a merge makes them, the spectral ones by Triton, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from overtone.adapters.resident import SharedOnDevice, make_resident
from overtone.kernels import Delta, FrameBank
from overtone.kernels.gpu import materialise
from overtone.kernels.reference import dense_delta
from overtone.models.dense_deltas import DenseDeltas
from support.terms import RandomTerms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (136, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [["dct"], ["dft"], ["weight", "dct", "low_rank", "dft"]], ids=str)
def test_added_to_a_weight(kinds: Sequence[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    made = materialise.materialise
    monkeypatch.setattr(materialise, "materialise", lambda *a: (calls.append(a[3].dtype), made(*a)))
    generator = torch.Generator().manual_seed(3)
    terms = tuple(RandomTerms(SHAPE, 1).make(kind) for kind in kinds)
    weight = torch.randn(SHAPE, generator=generator).to(dtype)
    expected = weight.double() + dense_delta(Delta(terms, SHAPE), weight)
    resident = make_resident("x", "x", {"m": Delta(terms, SHAPE)}, SharedOnDevice(DEVICE)).deltas["m"]
    found = weight.to(DEVICE).clone()
    DenseDeltas(FrameBank(DEVICE)).add_to(found, resident.terms)
    assert calls == [dtype] * sum(kind in ("dct", "dft") for kind in kinds)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_with_a_gain() -> None:
    term = RandomTerms(SHAPE, 1).make("dct")
    gain = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(4))
    delta = Delta((replace(term, gain=gain),), SHAPE)
    resident = make_resident("x", "x", {"m": delta}, SharedOnDevice(DEVICE)).deltas["m"]
    found = torch.zeros(SHAPE, device=DEVICE)
    DenseDeltas(FrameBank(DEVICE)).add_to(found, resident.terms)
    torch.testing.assert_close(found.cpu().double(), dense_delta(delta), rtol=1e-5, atol=1e-6)
