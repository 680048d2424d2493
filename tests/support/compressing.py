"""Deltas to compress: folders of LoRA and of fine-tuned models on the tiny base, and spectra by their definition."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from overtone.kernels.reference import dct_matrix
from overtone.tuning.compress.spectra import Spectrum
from support.tiny import tiny_model, tiny_tokenizer

Pair = tuple[torch.Tensor, torch.Tensor]
"""B (p, r) and A (r, q)."""

Q0, V0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q0: (96, 64), V0: (48, 64), DOWN1: (64, 96)}
"""Of layers of `tiny_model`."""


class FakeSource:
    """Spectra as they are given."""

    kind, size_bytes, origin = "fake", 1 << 20, dict[str, object]()
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __init__(self, spectra: Mapping[str, Spectrum]) -> None:
        self._spectra = spectra
        self.shapes = {name: spectrum.shape for name, spectrum in spectra.items()}

    def spectrum(self, module: str) -> Spectrum:
        return self._spectra[module]


def spectrum_of(delta: torch.Tensor) -> torch.Tensor:
    """C_p delta_W C_q^T by dense matrices, float64."""
    return dct_matrix(delta.shape[0]) @ delta.double() @ dct_matrix(delta.shape[1]).T


def delta_of(spectrum: torch.Tensor) -> torch.Tensor:
    return dct_matrix(spectrum.shape[0]).T @ spectrum.double() @ dct_matrix(spectrum.shape[1])


def random_pair(shape: tuple[int, int], rank: int, seed: int = 0, strength: float = 0.1) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(shape[0], rank, generator=generator)
    return b * strength, torch.randn(rank, shape[1], generator=generator) * strength


def smooth_pair(shape: tuple[int, int], rank: int, seed: int = 0) -> Pair:
    """Of low frequencies mostly: the k-th counts 1 / (1 + k)^2."""
    b, a = random_pair(shape, rank, seed, strength=1.0)
    fade = [1 / (1 + torch.arange(size)) ** 2 for size in shape]
    c_p, c_q = (dct_matrix(size, torch.float32) for size in shape)
    return c_p.T @ (b * fade[0][:, None]), (a * fade[1]) @ c_q


def planted_pair(shape: tuple[int, int], places: list[tuple[int, int]], values: list[float]) -> Pair:
    """One that has these coefficients in the DCT plane and no others, but for float32's rounding."""
    c_p, c_q = dct_matrix(shape[0]), dct_matrix(shape[1])
    b = torch.stack([c_p[row] * value for (row, _), value in zip(places, values, strict=True)], dim=1)
    return b.float(), torch.stack([c_q[col] for _, col in places]).float()


def lora_folder(folder: Path, pairs: Mapping[str, Pair], *, alpha: float | None = None, **config: Any) -> Path:
    """alpha None: the rank, so that delta_W = B A."""
    rank = next(iter(pairs.values()))[1].shape[0]
    tensors = {}
    for module, (b, a) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    targets = sorted({module.rpartition(".")[2] for module in pairs})
    full = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha or rank, "target_modules": targets, **config}
    return write_adapter(folder, tensors, full)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def model_folder(folder: Path, model: Any | None = None) -> Path:
    """A Hugging Face folder of `model`, by default `tiny_model`."""
    made = tiny_model() if model is None else model
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def coarse_model() -> Any:
    """`tiny_model` with weights that are multiples of 2^-8, to which small ones can be added exactly."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.copy_((parameter * 256).round() / 256)
    return model


@contextmanager
def largest_tensor() -> Iterator[list[tuple[int, ...]]]:
    """A list that holds, at the end, the shape of the largest tensor that any operation gave."""
    with _Shapes() as recorded:
        yield recorded.largest


class _Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest: list[tuple[int, ...]] = [()]
        self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self._most:
                self._most, self.largest[0] = leaf.numel(), tuple(leaf.shape)
        return result
