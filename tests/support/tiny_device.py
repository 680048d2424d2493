"""A tiny model on the device's path, in Triton's interpreter or on a GPU, and an adapter of each kind for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from overtone.adapters import ParserContext, ResidentDelta, parse_adapter
from overtone.adapters.projectors import Projectors
from overtone.adapters.resident import make_resident
from overtone.api.backend import describe
from overtone.engine.config import EngineConfig
from overtone.models.base import BaseModel, prepare
from overtone.models.device.memory import CacheShape, DeviceMemory
from support.adapters import adapter_files, make_loca_folder
from support.all_families import make_pica_folder
from support.peft_folders import peft_config, peft_folder
from support.tiny import tiny_model, tiny_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = EngineConfig(max_batch=4, max_step_tokens=24, max_context_tokens=64, page_tokens=8, cache_pages=40)


def tiny_device_base(kind: str = "llama") -> BaseModel:
    return prepare(one_layer(kind).to(DEVICE), tiny_tokenizer(), "tiny", capability=90)


def one_layer(kind: str = "llama") -> Any:
    """The interpreter takes seconds a layer."""
    return tiny_model(kind, num_hidden_layers=1)


def memory_of(base: BaseModel, config: EngineConfig, adapter_pages: int = 40, least: int | None = None) -> DeviceMemory:
    shape = CacheShape(base.num_layers, config.page_tokens, base.num_kv_heads, base.head_dim, base.dtype)
    pages = config.cache_pages + 1
    return DeviceMemory(shape, pages, adapter_pages, least or pages, base.device)


def deltas_of(base: BaseModel, folder: Path) -> Mapping[str, ResidentDelta]:
    description = describe(base)
    context = ParserContext(description, projectors=Projectors(None, description))
    parsed = parse_adapter(adapter_files(folder), context)
    return make_resident("d", parsed.family, parsed.deltas).deltas


def tiny_folders(base: BaseModel, root: Path) -> dict[str, Path]:
    """By name: two spectral families, low-rank pairs on all linear layers, projections, and DoRA, which torch's operators
    apply."""
    every = [name.rpartition(".")[2] for name in base.modules if ".0." in name]
    two = {name: shape for name, shape in base.modules.items() if name.endswith(("q_proj", "v_proj"))}
    make_loca_folder(root / "loca", two, n=200, seed=1, strength=0.5)
    model = one_layer()
    fourier = {"n_frequency": 40, "scaling": 30.0, "target_modules": ["q_proj", "down_proj"]}
    peft_folder(root / "lora", model, peft_config("LoraConfig", r=3, lora_alpha=4, target_modules=every))
    peft_folder(root / "fourier", model, peft_config("FourierFTConfig", **fourier))
    dora = peft_config("LoraConfig", r=2, lora_alpha=4, target_modules=["k_proj"], use_dora=True)
    peft_folder(root / "dora", model, dora)
    make_pica_folder(root / "pica", {name: shape[0] for name, shape in two.items()}, rank=12, strength=0.5)
    return {name: root / name for name in ("loca", "lora", "fourier", "pica", "dora")}
