"""Every family against delta_W computed densely in float64 from its definition, on layers that are not square."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from overtone.adapters import BaseDescription, ParsedAdapter
from overtone.kernels import reference
from support.adapters import BASE, SHAPES, dense_delta, files_of, make_loca_folder, make_sdctft_folder, parse

RELATIVE = 2e-7
"""Values are kept in float32; nothing else is rounded."""


def assert_matches_oracle(parsed: ParsedAdapter, folder: Path, base: BaseDescription) -> None:
    for module, shape in base.modules.items():
        expected = dense_delta(folder, module, shape)
        if expected is None:
            assert module not in parsed.deltas
            continue
        got = reference.dense_delta(parsed.deltas[module]).numpy()
        assert got.shape == shape
        bound = RELATIVE * max(1e-30, float(np.linalg.norm(expected)), float(np.abs(expected).max()))
        assert np.linalg.norm(got - expected) <= bound


@pytest.mark.parametrize("scale", [1.0, -3.25, 300.0])
@pytest.mark.parametrize("float_indices", [True, False])
def test_loca(tmp_path: Path, scale: float, float_indices: bool) -> None:
    folder = make_loca_folder(tmp_path / "a", SHAPES, n=30, seed=1, scale=scale, float_indices=float_indices)
    parsed = parse(*files_of(folder), BASE)
    assert (parsed.family, parsed.parameter_count, parsed.warnings) == ("loca", 30 * len(SHAPES), ())
    assert_matches_oracle(parsed, folder, BASE)


@pytest.mark.parametrize("transform", [None, "dct_unnormalized", "dct_orthonormal"])
@pytest.mark.parametrize("peft_type", ["SDCTFT", "MACP"])
def test_sdctft(tmp_path: Path, transform: str | None, peft_type: str) -> None:
    folder = make_sdctft_folder(tmp_path / "a", SHAPES, n=30, seed=2, scale=0.1, transform=transform)
    config = json.loads(files_of(folder)[0]) | {"peft_type": peft_type}
    parsed = parse(json.dumps(config).encode(), files_of(folder)[1], BASE)
    assert parsed.family == "sdctft"
    assert_matches_oracle(parsed, folder, BASE)
    norms = [float(d.terms[0].core.values.norm()) for d in parsed.deltas.values()]
    assert max(norms) < 2  # strength 0.1: a wrong normalisation would be off by 2 sqrt(p q)


def test_strength_is_what_the_helpers_say(tmp_path: Path) -> None:
    for make in (make_loca_folder, make_sdctft_folder):
        delta = dense_delta(make(tmp_path / make.__name__, {"m": (64, 96)}, n=900, seed=3, strength=0.3), "m", (64, 96))
        assert delta is not None
        assert np.linalg.norm(delta) == pytest.approx(0.3 * 8, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_locations_are_the_authors(dtype: torch.dtype) -> None:
    """Against their formula written with torch in the precision of the file (halves widened), for sizes up to 4096."""
    for p, q in ((4096, 576), (1536, 11008), (1, 2), (7, 3)):
        base = BaseDescription("b", "", {"m": (p, q)})
        edges = torch.tensor([0.0, 1.0, 0.999, 0.9995, 0.5, 2**-14], dtype=torch.float64)
        halfway = (torch.arange(400, dtype=torch.float64) + 0.5) / max(1, p - 1)
        saved = torch.cat([edges, halfway[halfway <= 1], torch.rand(2000, dtype=torch.float64)]).to(dtype)
        indices = torch.stack([saved, saved.flip(0)])
        values = torch.arange(1, saved.numel() + 1, dtype=torch.float32)
        tensors = {"base_model.model.m.spectrum": values, "base_model.model.m.spectrum_indices": indices}
        delta = parse(b'{"peft_type": "LOCA"}', save(tensors), base).deltas["m"]
        wide = indices if dtype == torch.float64 else indices.float()
        t = torch.clamp(wide, 0, 0.999)
        rows, cols = torch.round(t[0] * (p - 1)).long(), torch.round(t[1] * (q - 1)).long()
        dense = torch.zeros(p * q, dtype=torch.float64).index_add_(0, rows * q + cols, values.double())
        got = torch.zeros(p * q, dtype=torch.float64)
        got[delta.terms[0].core.rows.long() * q + delta.terms[0].core.cols] = delta.terms[0].core.values.double()
        assert torch.equal(got, dense)


def test_duplicates_add() -> None:
    tensors = {
        "base_model.model.m.spectrum": torch.tensor([1.0, 2.0, 4.0, -8.0]),
        "base_model.model.m.spectrum_indices": torch.tensor([[1, 1, 0, 1], [2, 2, 0, 2]], dtype=torch.uint8),
    }
    parsed = parse(b'{"peft_type": "LOCA", "scale": 0.5}', save(tensors), BaseDescription("b", "", {"m": (2, 3)}))
    core = parsed.deltas["m"].terms[0].core
    # The first free locations take the places of those that came again.
    assert (core.rows.tolist(), core.cols.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 2])
    assert core.values.tolist() == [2.0, 0.0, 0.0, -2.5]
    assert parsed.parameter_count == 4


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, torch.Tensor], BaseDescription]:
    """A valid adapter of either family with random shapes, dtypes and coefficients."""
    loca = draw(st.booleans())
    shapes = draw(st.dictionaries(st.sampled_from("abcd"), st.tuples(*[st.integers(1, 40)] * 2), min_size=1))
    config: dict[str, Any] = {"peft_type": "LOCA" if loca else draw(st.sampled_from(["SDCTFT", "MACP"]))}
    config["scale"] = draw(st.floats(-1e3, 1e3).filter(lambda s: s == 0 or abs(s) > 1e-3))
    if not loca:
        config["transform"] = draw(st.sampled_from(["dct_unnormalized", "dct_orthonormal"]))
    tensors = {}
    for name, (p, q) in shapes.items():
        n = draw(st.integers(1, 20))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        spectrum_dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
        integers = torch.stack([torch.randint(0, size, (n,), generator=generator) for size in (p, q)])
        floats = torch.rand(2, n, dtype=torch.float64, generator=generator)
        if loca and draw(st.booleans()):
            indices = floats.to(draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])))
        else:
            indices = integers.to(
                draw(st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]))
            )
        prefix = f"base_model.model.{name}."
        tensors[prefix + "spectrum"] = torch.randn(n, generator=generator).to(spectrum_dtype)
        tensors[prefix + ("spectrum_indices" if loca else "indices")] = indices
    return config, tensors, BaseDescription("b", "", shapes)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(adapters())
def test_any_valid_adapter_matches_the_definition(
    case: tuple[dict[str, Any], dict[str, torch.Tensor], BaseDescription],
) -> None:
    config, tensors, base = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        assert_matches_oracle(parse(*files_of(folder), base), folder, base)
