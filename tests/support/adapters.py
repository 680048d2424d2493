"""Adapters to test with: folders as a user would bring them, a small base with layers that are not square, a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from overtone.adapters import (
    AdapterFiles,
    AdapterRecord,
    AdapterStore,
    BaseDescription,
    ParsedAdapter,
    ParserContext,
    StoreConfig,
    parse_adapter,
)
from overtone.adapters.files import DOCUMENTATION, layout_of
from support.oracle import dense_delta

__all__ = [
    "BASE",
    "SHAPES",
    "adapter_files",
    "dense_delta",
    "files_of",
    "make_loca_folder",
    "make_sdctft_folder",
    "open_store",
    "parse",
    "put",
]

SHAPES: dict[str, tuple[int, int]] = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (24, 24),
        "self_attn.v_proj": (8, 24),
        "mlp.up_proj": (40, 24),
        "mlp.down_proj": (24, 40),
    }.items()
}
BASE = BaseDescription("example/small", "f" * 64, SHAPES)


def make_loca_folder(
    folder: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    n: int,
    seed: int,
    scale: float = 1.0,
    strength: float = 0.1,
    float_indices: bool = True,
    base_name: str | None = None,
) -> Path:
    """A LoCA adapter with n coefficients a module. strength: the Frobenius norm of delta_W is about strength sqrt(p),
    where a weight (p, q) with entries of variance 1 / q has sqrt(p)."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (p, q) in modules.items():
        places = rng.random((2, n))
        whole = np.floor(places * [[p], [q]])
        values = rng.standard_normal(n) * strength * np.sqrt(p / n) / scale
        tensors[f"base_model.model.{module}.spectrum"] = torch.tensor(values, dtype=torch.float32)
        tensors[f"base_model.model.{module}.spectrum_indices"] = (
            torch.tensor(places, dtype=torch.float32) if float_indices else torch.tensor(whole, dtype=torch.int32)
        )
    return _write(folder, tensors, {"peft_type": "LOCA", "n_frequency": n, "scale": scale}, modules, base_name)


def make_sdctft_folder(
    folder: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    n: int,
    seed: int,
    scale: float = 1.0,
    strength: float = 0.1,
    transform: str | None = None,
    base_name: str | None = None,
) -> Path:
    """The same in the files of sDCTFT; transform None: unnormalised, left unsaid."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (p, q) in modules.items():
        indices = np.floor(rng.random((2, n)) * [[p], [q]])
        values = rng.standard_normal(n) * strength * np.sqrt(p / n) / scale
        if transform != "dct_orthonormal":
            gains = [np.where(k == 0, 2 * np.sqrt(s), np.sqrt(2 * s)) for k, s in zip(indices, (p, q), strict=True)]
            values *= gains[0] * gains[1]
        tensors[f"base_model.model.{module}.spectrum"] = torch.tensor(values, dtype=torch.float32)
        tensors[f"base_model.model.{module}.indices"] = torch.tensor(indices, dtype=torch.int64)
    config: dict[str, Any] = {"peft_type": "SDCTFT", "n_frequency": n, "scale": scale}
    if transform is not None:
        config["transform"] = transform
    return _write(folder, tensors, config, modules, base_name)


def _write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    modules: Mapping[str, tuple[int, int]],
    base_name: str | None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    full = {"task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True, "target_modules": targets, **config}
    full["base_model_name_or_path"] = base_name
    (folder / "adapter_config.json").write_text(json.dumps(full, indent=2), encoding="utf-8")
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def adapter_files(folder: Path) -> AdapterFiles:
    """Both files of a folder, in whichever layout."""
    layout = layout_of({path.name for path in folder.iterdir()} - DOCUMENTATION)
    return AdapterFiles((folder / layout.config).read_bytes(), (folder / layout.weights).read_bytes(), layout)


def files_of(folder: Path) -> tuple[bytes, bytes]:
    """(configuration, weights)"""
    files = adapter_files(folder)
    return files.config, files.weights


def parse(config: bytes, weights: bytes, base: BaseDescription = BASE, *, strict_base: bool = False) -> ParsedAdapter:
    return parse_adapter(AdapterFiles(config, weights), ParserContext(base), strict_base=strict_base)


def open_store(root: Path, *, base: BaseDescription = BASE, **changes: Any) -> AdapterStore:
    """A store below `root`; `changes`: fields of its `StoreConfig`."""
    settings = {"memory_bytes": 1 << 24, "max_upload_bytes": 1 << 22, **changes}
    return AdapterStore(StoreConfig(root=root, **settings), base)


def put(store: AdapterStore, folder: Path, adapter_id: str, **options: Any) -> AdapterRecord:
    """Uploads the files of `folder` in small chunks."""
    with store.begin_upload() as upload:
        files = adapter_files(folder)
        for name, data in ((files.layout.config, files.config), (files.layout.weights, files.weights)):
            for start in range(0, len(data), 1000):
                upload.write(name, data[start : start + 1000])
        commit: Callable[..., AdapterRecord] = store.commit_upload
        return commit(upload, adapter_id, **options)
