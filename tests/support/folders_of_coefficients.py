"""Random valid folders of the families whose adapters are coefficients: LoCA, sDCTFT, FourierFT, WaveFT, C3A, SHiRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from support.folders import FLOATS, INTEGERS, LARGEST, Draws, Folder, Shape
from support.oracle_tensors import matching, matching_after_dot

_Draw = Callable[[st.SearchStrategy[Any]], Any]
WAVELETS = (*(f"db{i}" for i in range(1, 11)), *(f"sym{i}" for i in range(2, 11)), "coif1", "coif2", "coif3")


def _dct(d: Draws, config: dict[str, Any], indices: str, places: Callable[[Shape, int], torch.Tensor]) -> Folder:
    """`spectrum` and its indices; as many coefficients as n_frequency says, or as each module likes."""
    shapes = {name: (d.size(), d.size()) for name in d.modules()}
    common = d.integer(1, 30) if d.flag() else None
    tensors = {}
    for name, shape in shapes.items():
        n = common or d.integer(1, 30)
        tensors |= {f"{name}.spectrum": d.floats(n), f"{name}.{indices}": places(shape, n)}
    config |= {"n_frequency": common} if common or d.flag() else {}
    config |= {"scale": d.number()} if d.flag() else {}
    return d.folder(shapes, config, tensors)


def _whole_places(d: Draws, shape: Shape, n: int) -> torch.Tensor:
    """With duplicates where there is no room."""
    return torch.stack([d.below(size, n) for size in shape]).to(d.one_of(*INTEGERS))


@st.composite
def loca(draw: _Draw) -> Folder:
    d = Draws(draw)
    floating = d.flag()

    def places(shape: Shape, n: int) -> torch.Tensor:
        if not floating:
            return _whole_places(d, shape, n)
        t = d.uniform(2, n)
        t[:, 0] = d.one_of(0.0, 1.0, 0.999)
        return t.to(d.one_of(*FLOATS))

    return _dct(d, {"peft_type": "LOCA"}, "spectrum_indices", places)


@st.composite
def sdctft(draw: _Draw) -> Folder:
    d = Draws(draw)
    config: dict[str, Any] = {"peft_type": d.one_of("SDCTFT", "MACP")}
    transform = d.one_of(None, "dct_unnormalized", "dct_orthonormal")
    config |= {"transform": transform} if transform else {}
    return _dct(d, config, "indices", lambda shape, n: _whole_places(d, shape, n))


def _random_spectrum(d: Draws, config: dict[str, Any], part: str, rule: Callable[..., Any]) -> Folder:
    """n coefficients a module, n from the configuration by `rule`."""
    names = d.modules()
    default = d.integer(1, 60)
    patterns = d.patterns(names, lambda: d.integer(1, LARGEST**2))
    if patterns or d.flag():
        config["n_frequency_pattern"] = patterns
    counts = {name: rule(patterns, name, None) for name in names}
    if None in counts.values() or d.flag():
        config["n_frequency"] = default
    counts = {name: default if n is None else n for name, n in counts.items()}
    shapes = {name: d.shape_of(n) for name, n in counts.items()}
    config |= {"scaling": d.number()} if d.flag() else {}
    config |= {"random_loc_seed": d.seed()} if d.flag() else {}
    return d.folder(shapes, config, {f"{name}.{part}": d.floats(n) for name, n in counts.items()})


@st.composite
def fourierft(draw: _Draw) -> Folder:
    return _random_spectrum(Draws(draw), {"peft_type": "FOURIERFT"}, "fourierft_spectrum", matching_after_dot)


@st.composite
def waveft(draw: _Draw) -> Folder:
    d = Draws(draw)
    config: dict[str, Any] = {"peft_type": "WAVEFT"}
    config |= {"wavelet_family": d.one_of(*WAVELETS)} if d.flag() else {}
    config |= {"use_idwt": d.flag()} if d.flag() else {}
    if not d.flag():
        return _random_spectrum(d, config, "waveft_spectrum", matching)
    shapes = {name: (d.size(), d.size()) for name in d.modules()}
    sizes = {name: p * q for name, (p, q) in shapes.items()}
    total = sum(sizes.values())
    config |= {"proportional_parameters": True, "n_frequency": d.integer(1, max(1, total // len(sizes)))}
    budget = config["n_frequency"] * len(shapes)
    counts = {name: min(size, max(1, round(size / total * budget))) for name, size in sizes.items()}
    return d.folder(shapes, config, {f"{name}.waveft_spectrum": d.floats(n) for name, n in counts.items()})


@st.composite
def c3a(draw: _Draw) -> Folder:
    d = Draws(draw)
    names, default = d.modules(), d.integer(1, LARGEST)
    patterns = d.patterns(names, lambda: d.integer(1, LARGEST))
    blocks = {name: matching_after_dot(patterns, name, default) for name in names}
    shapes = {name: (d.size(b), d.size(b)) for name, b in blocks.items()}
    kernels = {
        f"{name}.c3a_kernel": d.floats(p // blocks[name], q // blocks[name], blocks[name])
        for name, (p, q) in shapes.items()
    }
    return d.folder(shapes, {"peft_type": "C3A", "block_size": default, "block_size_pattern": patterns}, kernels)


@st.composite
def shira(draw: _Draw) -> Folder:
    """r (p + q) entries a module, which must not be more than it has weights."""
    d = Draws(draw)
    r = d.integer(1, 5)
    shapes, tensors = {}, {}
    for name in d.modules():
        p = d.integer(-(-r * LARGEST // (LARGEST - r)), LARGEST)
        q = d.integer(-(-r * p // (p - r)), LARGEST)
        shapes[name], n = (p, q), r * (p + q)
        tensors[f"{name}.shira_weight"] = d.floats(n)
        places = _whole_places(d, (p, q), n)
        tensors[f"{name}.shira_indices"] = places.to(d.one_of(places.dtype, torch.float32))
    return d.folder(shapes, {"peft_type": "SHIRA", "r": r}, tensors)
