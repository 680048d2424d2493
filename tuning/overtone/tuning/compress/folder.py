"""The chosen coefficients as the two files that a server loads: LoCA or sDCTFT with integer locations and scale 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch

from overtone.adapters import AdapterFiles, ParserContext, parse_adapter
from overtone.adapters.families.tensors import PREFIX
from overtone.errors import NonFiniteAdapter
from overtone.kernels import SparseCore
from overtone.tuning.compress.base import Base
from overtone.tuning.compress.config import DTYPES, Config
from overtone.tuning.compress.source import Source

_LOCATIONS = {"loca": "spectrum_indices", "sdctft": "indices"}
_OWN: Mapping[str, Mapping[str, object]] = {
    "loca": {"peft_type": "LOCA"},
    "sdctft": {"peft_type": "SDCTFT", "transform": "dct_orthonormal"},
}


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """One module's, as they are stored. values: (n,) in the stored dtype; places: (n,) int64, row q + column."""

    shape: tuple[int, int]
    values: torch.Tensor
    places: torch.Tensor

    @property
    def locations(self) -> torch.Tensor:
        """(2, n): output and input frequency, in the narrowest integers that all parsers take."""
        q = self.shape[1]
        return torch.stack((self.places // q, self.places % q)).to(location_dtype(self.shape))


def location_dtype(shape: tuple[int, int]) -> torch.dtype:
    largest = max(shape) - 1
    fitting = (dtype for dtype in (torch.uint8, torch.int16) if largest <= torch.iinfo(dtype).max)
    return next(fitting, torch.int32)


def bytes_each(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Of one coefficient: its value and two locations."""
    return dtype.itemsize + 2 * location_dtype(shape).itemsize


def stored(module: str, shape: tuple[int, int], values: torch.Tensor, places: torch.Tensor, dtype: str) -> Coefficients:
    """values: (n,) float64. Raises `NonFiniteAdapter`, naming the module, for what the dtype cannot hold."""
    narrow = values.to(DTYPES[dtype])
    if not bool(narrow.isfinite().all()):
        raise NonFiniteAdapter(f"a coefficient of {module} overflows {dtype}: choose another dtype", field=module)
    return Coefficients(shape, narrow, places)


def adapter_files(modules: Mapping[str, Coefficients], config: Config, source: Source) -> AdapterFiles:
    """modules: each with at least one coefficient."""
    tensors = {}
    for module, one in modules.items():
        tensors[f"{PREFIX}{module}.spectrum"] = one.values.contiguous()
        tensors[f"{PREFIX}{module}.{_LOCATIONS[config.family]}"] = one.locations
    counts = {one.values.numel() for one in modules.values()}
    written: dict[str, object] = {
        **_OWN[config.family],
        **source.origin,
        "scale": 1.0,
        "n_frequency": counts.pop() if len(counts) == 1 else None,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
        "inference_mode": True,
    }
    if config.base_name is not None:
        written["base_model_name_or_path"] = config.base_name
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    return AdapterFiles(text.encode(), safetensors.torch.save(tensors, {"format": "pt"}))


def size_of(files: AdapterFiles) -> int:
    return len(files.config) + len(files.weights)


def size_with(counts: Mapping[str, int], config: Config, source: Source) -> int:
    """Bytes of both files for so many coefficients of each module."""
    dtype = DTYPES[config.dtype]
    empty = {
        module: Coefficients(source.shapes[module], torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=torch.int64))
        for module, n in counts.items()
        if n
    }
    return size_of(adapter_files(empty, config, source))


def check(files: AdapterFiles, base: Base, modules: Mapping[str, Coefficients]) -> None:
    """By the server's parser: what it reads from the files is what was chosen."""
    config = json.loads(files.config)
    config.pop("base_fingerprint", None)  # of the source, and looked at when that was read
    parsed = parse_adapter(AdapterFiles(json.dumps(config).encode(), files.weights), ParserContext(base.description()))
    assert parsed.deltas.keys() == modules.keys()
    for module, one in modules.items():
        core = parsed.deltas[module].terms[0].core
        assert isinstance(core, SparseCore)
        assert torch.equal(core.rows.to(torch.int64) * one.shape[1] + core.cols, one.places)
        assert torch.equal(core.values, one.values.to(torch.float32))
