"""Bytes, operations and predicted times against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from bench.roofline import (
    ALL,
    FAMILIES,
    LLAMA_3_8B,
    Assumptions,
    Ceilings,
    Family,
    Work,
    base_layer,
    base_step,
    decode_attention_work,
    expand_work,
    family_layer,
    low_rank_work,
    materialise_work,
    pair_bytes,
    prompt_attention_work,
    share,
    spectral_bytes,
    spectral_work,
    synthesis_work,
    tables,
    transform_flops,
    two_stage_flops,
)

from overtone.kernels.gpu.plans import make_plan
from overtone.kernels.gpu.records import pair_record, spectral_record

LORA, LOCA = Family("LoRA", "pair", 16), Family("LoCA", "spectral", 1000)


def test_transforms() -> None:
    """4 N (N1 + N2) in two stages; in three the stage of 256 is one of 16 twice."""
    assert two_stage_flops(64, 64) == transform_flops(4096) == 4 * 4096 * 128 == 2_097_152
    assert transform_flops(1024) == 4 * 1024 * 64
    assert transform_flops(14336, stages=2) == 4 * 14336 * (112 + 128)
    assert transform_flops(14336) == 14336 * (4 * 56 + 12 * 16)


def test_records_have_the_bytes_that_are_counted() -> None:
    n, (p, q) = 300, (1024, 512)
    inverse = make_plan(p, torch.float32, torch.device("cpu"), inverse=True)
    assert inverse is not None
    at = torch.randint(0, q, (n,))
    record = spectral_record(at, at, torch.randn(n), inverse, torch.float16)
    assert 0 <= 4 * len(record) - spectral_bytes(n, p) < 32  # each of its parts filled up
    record = pair_record(torch.randn(8, q), torch.randn(8, p), torch.bfloat16)
    assert 4 * len(record) == pair_bytes(8, p, q) == 16 + 8 * (p + q) * 2


def test_works() -> None:
    assert low_rank_work(64, 64, 4096, (4096,), 16) == Work(
        64 * 16 * 8192 * 2 + 64 * (8192 + 16384), 2.0 * 64 * 16 * 8192
    )
    assert expand_work(2, 1, (10, 20), 4) == Work(4 * 30 * 2 + 2 * (16 + 2 * 30 * 2), 2.0 * 2 * 4 * 30)
    one = spectral_work(1, 1, 4096, (1024, 1024), 1000)
    assert one.flops == 2_097_152 + 2 * (262_144 + 2000)
    assert one.bytes == 4096 * 2 + 2 * 2 * 2048 + 2 * spectral_bytes(1000, 1024)
    assert synthesis_work(1, 0, 4096, (1024,), 1000).bytes == 2 * 1000 + 2 * 2 * 1024
    assert materialise_work(1000, 4096, 4096) == Work(2 * 4096 * 4096 * 2, 2.0 * 1000 * 4096 * 4096)
    assert decode_attention_work(3, 1000, 32, 8, 128).bytes == 3 * (2 * 1000 * 8 * 128 * 2 + 2 * 32 * 128 * 2)
    assert prompt_attention_work(3, 1, 1, 2).flops == 4 * 2 * (1 + 2 + 3)


def test_ceilings() -> None:
    ceilings = Ceilings(100.0, 1000.0)
    assert ceilings.seconds(Work(200, 1000)) == 2.0
    assert ceilings.bound(Work(200, 1000)) == "memory"
    assert ceilings.bound(Work(50, 1000)) == "arithmetic"


def test_a_llama_layer() -> None:
    """436 MB of weights; 64 distinct LoRA adapters of rank 16 add 182 MB, spectral ones two-stage 54.4 MFLOP a token."""
    assert LLAMA_3_8B.weights == 4096 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336) + 14336 * 4096 == 218_103_808
    assert base_layer(LLAMA_3_8B, 1).bytes == pytest.approx(436.3e6, rel=1e-3)
    lora, launches = family_layer(LLAMA_3_8B, LORA, 64, 64)
    assert lora.bytes == pytest.approx(182.2e6, rel=1e-3)
    assert launches == 8
    loca, _ = family_layer(LLAMA_3_8B, Family("", "spectral", 0), 1, 1, stages=2)
    assert loca.flops == pytest.approx(54.4e6, rel=1e-3)
    assert {family.targets for family in FAMILIES} == {ALL, ("q_proj", "v_proj")}


@pytest.mark.parametrize(("rows", "base_ms", "lora"), [(1, 3.88, 0.08), (64, 3.95, 0.42), (256, 6.11, 0.94)])
def test_steps(rows: int, base_ms: float, lora: float) -> None:
    given = Assumptions()
    assert base_step(LLAMA_3_8B, rows, given) * 1e3 == pytest.approx(base_ms, abs=0.015)
    assert share(LLAMA_3_8B, LORA, rows, rows, given) == pytest.approx(lora, abs=0.01)
    assert share(LLAMA_3_8B, LOCA, rows, rows, given) < lora + 0.02


def test_a_past_costs_the_base_alone() -> None:
    """64 rows of 1024 keys are 268 MB a layer."""
    given = Assumptions()
    more = base_step(LLAMA_3_8B, 64, given, 1024) - base_step(LLAMA_3_8B, 64, given)
    assert more == pytest.approx(32 * 268.4e6 / 4.3e12, rel=0.01)
    assert share(LLAMA_3_8B, LORA, 64, 64, given, 1024) == pytest.approx(0.28, abs=0.01)


def test_two_stages_in_a_step() -> None:
    two = Assumptions(stages=2)
    assert share(LLAMA_3_8B, LOCA, 64, 64, two) == pytest.approx(0.20, abs=0.01)
    assert share(LLAMA_3_8B, LOCA, 256, 256, two) == pytest.approx(0.37, abs=0.01)
    assert share(LLAMA_3_8B, LOCA, 2048, 1, two) == pytest.approx(0.36, abs=0.01)


def test_table_says_what_it_is() -> None:
    text = tables()
    assert text.startswith("PREDICTED, not measured")
    assert all(family.name in text for family in FAMILIES)
