"""One adapter folder of every family for any model: PEFT's by PEFT itself, the others by their definitions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from support.adapters import make_loca_folder, make_sdctft_folder
from support.peft_folders import peft_config, peft_folder

Shapes = Mapping[str, tuple[int, int]]
Make = Callable[[Path, Any, Sequence[str], float], Path]
"""(folder, model, modules, strength) -> folder. strength: the size of delta_W relative to the weight's, about."""


def _shapes(model: Any, modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    weights = {name: model.get_submodule(name).weight for name in modules}
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}


def _loca(folder: Path, model: Any, modules: Sequence[str], strength: float) -> Path:
    return make_loca_folder(folder, _shapes(model, modules), n=200, seed=1, strength=strength)


def _sdctft(folder: Path, model: Any, modules: Sequence[str], strength: float) -> Path:
    return make_sdctft_folder(folder, _shapes(model, modules), n=200, seed=2, strength=strength)


def make_dcft_folder(folder: Path, shapes: Shapes, *, d: int, rank: int, strength: float, seed: int = 3) -> Path:
    """DCFT in its own layout. strength: the Frobenius norm of delta_W is about strength sqrt(p)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (p, q) in shapes.items():
        size = (strength**2 / q / rank) ** (1 / 6)
        parts = {"lora_A": (rank, q // d), "lora_B": (p // d, rank), "lora_C": (d, d)}
        for part, shape in parts.items():
            tensors[f"base_model.model.{name}.{part}"] = torch.randn(shape, generator=generator) * size
    config = {"peft_type": "DCFT", "lora_r": 2, "lora_alpha": 2, "target_modules": sorted(shapes)}
    return _write(folder, "adapter_config.json", config, "adapter_model.safetensors", tensors)


def _dcft(folder: Path, model: Any, modules: Sequence[str], strength: float) -> Path:
    return make_dcft_folder(folder, _shapes(model, modules), d=8, rank=1, strength=strength)


def make_pica_folder(folder: Path, keys: Mapping[str, int], *, rank: int, strength: float, **config: Any) -> Path:
    """keys: part of module names -> p. strength: the Frobenius norm of delta_W is about strength sqrt(p)."""
    generator = torch.Generator().manual_seed(4)
    tensors = {key: torch.randn(p, rank, generator=generator) * strength / math.sqrt(rank) for key, p in keys.items()}
    full = {"target_modules": list(keys), "rank": rank, **config}
    return _write(folder, "pica_config.json", full, "pica_adapter.safetensors", tensors)


def _pica(folder: Path, model: Any, modules: Sequence[str], strength: float) -> Path:
    keys = {name: shape[0] for name, shape in _shapes(model, modules).items() if name.endswith(("q_proj", "down_proj"))}
    return make_pica_folder(folder, keys, rank=12, strength=strength)


def _write(folder: Path, config_name: str, config: Any, weights: str, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / config_name).write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / weights)
    return folder


def _peft(kind: str, strength: float = 1.0, **settings: Any) -> Make:
    """PEFT's configuration class; strength: multiplies the caller's."""

    def make(folder: Path, model: Any, modules: Sequence[str], wanted: float) -> Path:
        config = peft_config(kind, target_modules=list(modules), **settings)
        return peft_folder(folder, model, config, seed=len(kind), strength=strength * wanted)

    return make


FAMILIES: Mapping[str, Make] = {
    "loca": _loca,
    "sdctft": _sdctft,
    "dcft": _dcft,
    "pica": _pica,
    "lora": _peft("LoraConfig", 0.3, r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 16}),
    "rslora": _peft("LoraConfig", 0.2, r=4, use_rslora=True),
    "dora": _peft("LoraConfig", 0.2, r=4, use_dora=True),
    "fourierft": _peft("FourierFTConfig", n_frequency=200, scaling=30.0),
    "waveft": _peft("WaveFTConfig", 0.2, n_frequency=200, scaling=1.0),
    "waveft-db2": _peft("WaveFTConfig", 0.2, n_frequency=200, scaling=1.0, wavelet_family="db2", random_loc_seed=5),
    "c3a": _peft("C3AConfig", block_size=16, init_weights="gaussian"),
    "vera": _peft("VeraConfig", 3.0, r=8),
    "vera-unsaved": _peft("VeraConfig", r=8, save_projection=False, projection_prng_key=7),
    "randlora": _peft("RandLoraConfig", 0.15, r=8, randlora_alpha=8, save_projection=False),
    "vblora": _peft("VBLoRAConfig", r=4, num_vectors=16, vector_length=16, init_vector_bank_bound=0.1),
    "vblora-top": _peft(
        "VBLoRAConfig", r=4, num_vectors=16, vector_length=16, save_only_topk_weights=True, init_vector_bank_bound=0.2
    ),
    "shira": _peft("ShiraConfig", 0.1, r=2),
}
"""By name; more than one where a family has several forms."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(model: Any, layers: Sequence[int]) -> list[str]:
    """All seven projections of these decoder layers."""
    wanted = tuple(f".layers.{layer}." for layer in layers)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if name.endswith(PROJECTIONS) and any(part in f".{name}" for part in wanted)]


def make_all(folder: Path, model: Any, modules: Sequence[str], strength: float) -> dict[str, Path]:
    return {name: make(folder / name, model, modules, strength) for name, make in FAMILIES.items()}
