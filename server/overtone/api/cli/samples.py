"""Sample adapters: random spectra in the layouts that the server accepts. They stand in for tuned ones and teach nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

FAMILIES = ("LOCA", "SDCTFT")


def write_sample_adapter(
    folder: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    family: str,
    seed: int,
    coefficients: int = 1000,
    norm: float = 4.0,
    base_model: str = "",
) -> Path:
    """A PEFT-style folder with `coefficients` random coefficients for each module.

    modules: name -> (p, q). The expected Frobenius norm of each delta_W is `norm`, for either family: LoCA's coefficients
    belong to the orthonormal DCT, sDCTFT's to the unnormalised one, which makes them 2 sqrt(p q) times as large.
    """
    assert family in FAMILIES
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (p, q) in modules.items():
        values = torch.randn(coefficients, generator=generator) * norm / coefficients**0.5
        if family == "LOCA":
            tensors[f"base_model.model.{module}.spectrum"] = values
            tensors[f"base_model.model.{module}.spectrum_indices"] = torch.rand(2, coefficients, generator=generator)
        else:
            rows = torch.randint(1, p, (coefficients,), generator=generator)
            cols = torch.randint(1, q, (coefficients,), generator=generator)
            tensors[f"base_model.model.{module}.spectrum"] = values * 2 * (p * q) ** 0.5
            tensors[f"base_model.model.{module}.indices"] = torch.stack([rows, cols])
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": family, "target_modules": targets, "n_frequency": coefficients}
    if base_model:
        config["base_model_name_or_path"] = base_model
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
