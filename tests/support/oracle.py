"""delta_W by the definitions, dense and in float64, straight from an adapter's files. Nothing here uses Overtone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

Array = npt.NDArray[np.float64]


def dense_delta(folder: Path, module: str, shape: tuple[int, int]) -> Array | None:
    """What the adapter in `folder` adds to the weight (p, q) of `module`; None if it leaves it alone."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}."
    if prefix + "spectrum" not in tensors:
        return None
    spectrum = tensors[prefix + "spectrum"].double().numpy() * config.get("scale", 1.0)
    if config["peft_type"] == "LOCA":
        rows, cols = locations(tensors[prefix + "spectrum_indices"], shape)
        waves = [orthonormal_waves(k, size) for k, size in ((rows, shape[0]), (cols, shape[1]))]
    else:
        rows, cols = tensors[prefix + "indices"].long().numpy()
        orthonormal = config.get("transform", "dct_unnormalized") == "dct_orthonormal"
        make = orthonormal_waves if orthonormal else unnormalised_waves
        waves = [make(k, size) for k, size in ((rows, shape[0]), (cols, shape[1]))]
    return (waves[0] * spectrum[:, None]).T @ waves[1]


def dcft_delta(folder: Path, module: str, shape: tuple[int, int]) -> Array | None:
    """c D^T with D = conv_transpose2d(A^T B^T, K, stride d), which is (in, out), as the authors compute it."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}."
    if prefix + "lora_A" not in tensors:
        return None
    a, b, k = (tensors[prefix + name].double() for name in ("lora_A", "lora_B", "lora_C"))
    small = a.T @ b.T
    kernel = k.reshape(1, 1, *k.shape[-2:])
    grown = torch.nn.functional.conv_transpose2d(small[None, None], kernel, stride=kernel.shape[-1])[0, 0]
    rank, alpha = config["lora_r"], config["lora_alpha"]
    scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    assert grown.shape == shape[::-1]
    delta: Array = (scale * grown.T).numpy()
    return delta


def pica_deltas(folder: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """M P for every linear layer whose name has a key of the adapter in it; P = the first r rows of Vh of its weight, in
    float32, or what the adapter brought itself."""
    config = json.loads((folder / "pica_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "pica_adapter.safetensors")
    found = {}
    for name, weight in weights.items():
        key = next((key for key in config["target_modules"] if key in name), None)
        if key is None:
            continue
        own = tensors.get(f"basis.{name}")
        basis = torch.linalg.svd(weight.float(), full_matrices=False)[2] if own is None else own
        found[name] = tensors[key].double() @ basis[: tensors[key].shape[1]].double()
    return found


def locations(indices: torch.Tensor, shape: tuple[int, int]) -> list[npt.NDArray[np.int64]]:
    """Integers as they are; floats as the LoCA authors decode them, in their own precision, at least float32."""
    if not indices.is_floating_point():
        return list(indices.long().numpy())
    kind = np.float64 if indices.dtype == torch.float64 else np.float32
    t = indices.to(torch.float64).numpy().astype(kind)
    clamped = np.clip(t, kind(0), kind(0.999))
    return [np.rint(clamped[axis] * kind(shape[axis] - 1)).astype(np.int64) for axis in range(2)]


def orthonormal_waves(frequencies: npt.NDArray[np.int64], size: int) -> Array:
    """Rows k of the orthonormal DCT-II: s_k cos(pi (2 j + 1) k / (2 N)), s_0 = sqrt(1 / N), s_k = sqrt(2 / N)."""
    gains = np.where(frequencies == 0, np.sqrt(1 / size), np.sqrt(2 / size))
    return gains[:, None] * _cosines(frequencies, size)


def unnormalised_waves(frequencies: npt.NDArray[np.int64], size: int) -> Array:
    """What torch_dct's idct makes of a unit at k: x_j = (X_0 / 2 + sum over k > 0 of X_k cos(...)) / N."""
    return np.where(frequencies == 0, 0.5, 1.0)[:, None] * _cosines(frequencies, size) / size


def _cosines(frequencies: npt.NDArray[np.int64], size: int) -> Array:
    return np.cos(np.pi * (2 * np.arange(size)[None, :] + 1) * frequencies[:, None] / (2 * size))
