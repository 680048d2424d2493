"""Parsed adapters against PEFT's own merge, and changes to PEFT's folders that make them wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from overtone.adapters import AdapterFiles, ParsedAdapter, ParserContext, parse_adapter
from overtone.kernels import reference, sound
from support.peft_base import base_of
from support.peft_folders import peft_deltas

RELATIVE = 1e-6
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
"""Of `tiny_model`: 96 x 64."""


class Layers(nn.Module):
    """Linear layers of any shapes (p, q), called blocks.<name>, with seeded weights."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: nn.Linear(q, p, bias=False) for name, (p, q) in shapes.items()})
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


def files_in(folder: Path) -> AdapterFiles:
    return AdapterFiles(
        (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    )


def parse_folder(folder: Path, model: Any) -> ParsedAdapter:
    return parse_adapter(files_in(folder), ParserContext(base_of(model)))


def assert_as_peft(folder: Path, model: Any) -> ParsedAdapter:
    """Same modules, delta_W within 1e-6 of PEFT's by the Frobenius norm, cores that are what they promise to be."""
    parsed, expected = parse_folder(folder, model), peft_deltas(folder, model)
    assert parsed.deltas.keys() == expected.keys()
    for module, delta in parsed.deltas.items():
        got, wanted = reference.dense_delta(delta), expected[module]
        assert got.shape == wanted.shape
        assert float((got - wanted).norm()) <= RELATIVE * float(wanted.norm()), module
        assert all(sound(term.core) for term in delta.terms)
    return parsed


def changed(
    files: AdapterFiles,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
) -> AdapterFiles:
    """`files` with other configuration keys and other tensors; None for a tensor takes it away, ... for a key."""
    keys = json.loads(files.config) | dict(config or {})
    kept = load(files.weights) | dict(tensors or {})
    return AdapterFiles(
        json.dumps({key: value for key, value in keys.items() if value is not ...}).encode(),
        save({name: tensor.contiguous() for name, tensor in kept.items() if tensor is not None}),
    )
