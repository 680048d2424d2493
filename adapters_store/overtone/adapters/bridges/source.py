"""An adapter's folder as it was brought: configuration and tensors, also from files that the server refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from overtone.adapters.bridges.pickles import read_pickle
from overtone.adapters.failures import operation
from overtone.adapters.files import (
    DOCUMENTATION,
    LAYOUTS,
    MAX_CONFIG_BYTES,
    PEFT_LAYOUT,
    PICA_LAYOUT,
    Layout,
    refuse_pickle,
)
from overtone.adapters.safetensors_reader import Limits, read_safetensors
from overtone.adapters.text import read_json_object, shown
from overtone.errors import InvalidAdapter

_PICKLED = {PEFT_LAYOUT: "adapter_model.bin", PICA_LAYOUT: "pica_adapter.bin"}
_BARE = (".bin", ".pt", ".pth")
_LIMITS = Limits(header_bytes=32 << 20, tensors=200_000)
"""Wider than the server's: what is read here may be split or renamed before it gets there."""


@dataclass(frozen=True)
class Source:
    """config: as written; weights: the name of the file that the tensors came from; ignored: files that are no part of the
    adapter."""

    layout: Layout
    config: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor]
    weights: str
    ignored: tuple[str, ...]


def read_source(folder: Path) -> Source:
    """Raises `InvalidAdapter` for a folder that is not one adapter, `StoreFailed` for what the disk refuses."""
    if not folder.is_dir():
        raise InvalidAdapter(f"{folder} is not a folder", field="source")
    with operation("list the adapter's folder"):
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    layout = _layout(folder, names)
    weights = _weights_file(folder, names, layout)
    raw = _read(folder, layout.config)
    if len(raw) > MAX_CONFIG_BYTES:
        message = f"{layout.config} has {len(raw)} bytes, more than the {MAX_CONFIG_BYTES} allowed"
        raise InvalidAdapter(message, field=layout.config)
    refuse_pickle(layout.config, raw)
    config = read_json_object(raw, layout.config)
    data = _read(folder, weights)
    if weights.endswith(".safetensors"):
        tensors = dict(read_safetensors(data, weights, _LIMITS).tensors)
    else:
        tensors = read_pickle(data, weights)
    used = {layout.config, weights, *DOCUMENTATION}
    ordered = dict(sorted(tensors.items()))  # safetensors gives them in another order every time
    return Source(layout, config, ordered, weights, tuple(name for name in names if name not in used))


def _layout(folder: Path, names: list[str]) -> Layout:
    found = [layout for layout in LAYOUTS if layout.config in names]
    if not found:
        raise InvalidAdapter(f"{folder} has no {PEFT_LAYOUT.config}", field=PEFT_LAYOUT.config)
    if len(found) > 1:
        both = " and ".join(layout.config for layout in found)
        raise InvalidAdapter(f"{folder} has {both}: which of them is meant is not clear", field=found[1].config)
    return found[0]


def _weights_file(folder: Path, names: list[str], layout: Layout) -> str:
    """The file that the layout knows, else the only one of torch.save."""
    known = [name for name in (layout.weights, _PICKLED[layout]) if name in names]
    found = known or [name for name in names if name.endswith(_BARE)]
    if not found:
        raise InvalidAdapter(f"{folder} has no {layout.weights} and no file of torch.save", field=layout.weights)
    if len(found) > 1:
        listed = ", ".join(shown(name) for name in found)
        raise InvalidAdapter(f"{folder} has several files of weights ({listed}): keep one of them", field=found[1])
    return found[0]


def _read(folder: Path, name: str) -> bytes:
    with operation(f"read {shown(name)}"):
        return (folder / name).read_bytes()
