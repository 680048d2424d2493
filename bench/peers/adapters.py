"""Random adapters in the layouts that tuning libraries save; the same folders go to every system."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from overtone.api.cli.samples import write_sample_adapter

Modules = Mapping[str, tuple[int, int]]
"""Name -> (out features, in features)."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSet:
    """`count` adapters of one family: LoCA with `size` coefficients a module, or LoRA of rank `size`."""

    name: str
    family: Literal["LOCA", "LORA"]
    size: int
    targets: tuple[str, ...]
    count: int = 64

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{seed}" for seed in range(self.count))


def write_set(adapters: AdapterSet, modules: Modules, root: Path) -> dict[str, Path]:
    """id -> folder; what is there already stays."""
    chosen = {name: shape for name, shape in modules.items() if name.endswith(adapters.targets)}
    if not chosen:
        raise ValueError(f"the model has none of the modules {', '.join(adapters.targets)}")
    folders = {}
    for seed, adapter_id in enumerate(adapters.ids):
        folders[adapter_id] = folder = root / adapter_id
        if (folder / "adapter_model.safetensors").exists():
            continue
        if adapters.family == "LOCA":
            write_sample_adapter(folder, chosen, family="LOCA", seed=seed, coefficients=adapters.size, norm=2.0)
        else:
            write_lora(folder, chosen, rank=adapters.size, seed=seed)
    return folders


def write_lora(folder: Path, modules: Modules, *, rank: int, seed: int, norm: float = 2.0) -> None:
    """PEFT's LoRA folder: delta_W = (alpha / r) B A with alpha = r, B (p x r) and A (r x q) normal in float32.

    The expected Frobenius norm of each delta_W is about `norm`.
    """
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (p, q) in modules.items():
        a, b = torch.randn(rank, q, generator=draw), torch.randn(p, rank, generator=draw)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a / q**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = b * norm / (p * rank) ** 0.5
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
