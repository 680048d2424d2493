"""A trained LoRA as its largest DCT coefficients, and a random delta of the same size, of which little can be kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from overtone.adapters.files import PEFT_LAYOUT

if TYPE_CHECKING:
    from bench.quality.workbench import Setting

SOURCE = "LoRA r=8"
COEFFICIENTS = (60, 250, 1000, 4000, 16000)
"""For each adapted layer on average; they are shared out to where the largest are."""


def compressed(source: Path, target: Path, total: int, setting: Setting) -> dict[str, Any]:
    """Writes `target` with `total` coefficients of all layers together; energy kept, what chance would keep, the verdict."""
    from overtone.tuning.compress import Config, compress

    budget = Config(source=source, target=target, model=setting.model, model_cache=setting.cache, total=total)
    report = compress(budget)
    told = {"kept": report.kept, "random_kept": report.random_kept, "verdict": report.verdict}
    sizes = {"source_bytes": report.bytes_in, "bytes": report.bytes_out, "coefficients": report.coefficients}
    return {**told, "relative_error": report.relative_error, **sizes}


def random_like(lora: Path, folder: Path, seed: int) -> Path:
    """The same LoRA folder with Gaussian factors, each as large as the one in its place."""
    shutil.copytree(lora, folder)
    weights = folder / PEFT_LAYOUT.weights
    draw = torch.Generator().manual_seed(seed)
    tensors = safetensors.torch.load_file(weights)
    drawn = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in sorted(tensors.items())}
    sized = {name: tensor * (tensors[name].norm() / tensor.norm()) for name, tensor in drawn.items()}
    weights.write_bytes(safetensors.torch.save(sized, {"format": "pt"}))
    return folder
