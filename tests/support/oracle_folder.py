"""delta_W of a folder of any family by its definition, dense and in float64. Nothing here uses Overtone or PEFT.

Strict where a parser must be: a tensor that no equation needs, a size that the configuration does not say, or a key that
asks for another forward pass is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.oracle import dcft_delta, dense_delta, pica_deltas
from support.oracle_peft import PEFT
from support.oracle_tensors import Config, Tensors, Weights

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_qalora", "ensure_weight_tying", "use_bdlora"), (None, False)),
    **dict.fromkeys(("modules_to_save", "layer_replication", "loftq_config", "target_parameters"), (None, [], {})),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens"), (None, [], {})),
}
"""What these keys may say without changing delta_W."""

_OWN = {
    "LOCA": (dense_delta, ("spectrum", "spectrum_indices")),
    "SDCTFT": (dense_delta, ("spectrum", "indices")),
    "MACP": (dense_delta, ("spectrum", "indices")),
    "DCFT": (dcft_delta, ("lora_A", "lora_B", "lora_C")),
}


def folder_deltas(folder: Path, linears: Weights, embeddings: Weights) -> dict[str, torch.Tensor]:
    """Module -> delta_W (p, q) float64. linears: in the order in which the model has them."""
    pica = (folder / "pica_config.json").exists()
    config_name, weights_name = (
        ("pica_config.json", "pica_adapter.safetensors")
        if pica
        else ("adapter_config.json", "adapter_model.safetensors")
    )
    config = json.loads((folder / config_name).read_text(encoding="utf-8"))
    for key, allowed in NEUTRAL.items():
        assert config.get(key) in allowed, key
    tensors = Tensors(load_file(folder / weights_name))
    _take_base_copies(tensors, linears, embeddings)
    if pica:
        deltas = pica_deltas(folder, linears)
        _take_pica(config, tensors, linears, list(deltas))
    elif config["peft_type"] in _OWN:
        deltas = _own(folder, config, tensors, linears)
    else:
        deltas = PEFT[config["peft_type"]](config, tensors, linears, embeddings)
    tensors.finish()
    return deltas


def _take_base_copies(tensors: Tensors, linears: Weights, embeddings: Weights) -> None:
    """PEFT's copies of frozen weights; an embedding's is (q, p)."""
    for module in tensors.modules("base_layer.weight"):
        weight = linears[module] if module in linears else embeddings[module].T
        copy = tensors.take(module, "base_layer.weight")
        assert copy.shape == weight.shape
        assert bool(((copy.double() - weight.double()).abs() <= 2**-8 * weight.double().abs()).all())


def _own(folder: Path, config: Config, tensors: Tensors, linears: Weights) -> dict[str, torch.Tensor]:
    """LoCA, sDCTFT and DCFT."""
    one, parts = _OWN[config["peft_type"]]
    deltas = {}
    for module in tensors.modules(parts[0]):
        p, q = linears[module].shape
        deltas[module] = torch.as_tensor(one(folder, module, (p, q)))
        found = [tensors.take(module, part) for part in parts]
        assert config.get("n_frequency") in (None, found[0].numel())
        assert config.get("rank") in (None, found[0].shape[0])
        assert config.get("kernel_size") in (None, found[-1].shape[-1])
    return deltas


def _take_pica(config: Config, tensors: Tensors, linears: Weights, adapted: list[str]) -> None:
    """M of every kind, and either all layers' P or none; the digest of P, if the configuration has one."""
    rank = config.get("rank", 256)
    for kind in config["target_modules"]:
        assert tensors.named(kind).shape[1] == rank
    own = tensors.has(f"basis.{adapted[0]}")
    bases = {}
    for module in adapted:
        full = tensors.named(f"basis.{module}") if own else torch.linalg.svd(linears[module].float(), False)[2]
        bases[module] = full[:rank].float().contiguous()
        assert bases[module].shape == (rank, linears[module].shape[1])
    assert config.get("basis_sha256") in (None, basis_digest(bases))


def basis_digest(bases: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of, in sorted order, each module's name, a zero byte and its P as float32, little-endian, by rows."""
    digest = hashlib.sha256()
    for module in sorted(bases):
        digest.update(module.encode() + b"\0" + bases[module].numpy().astype("<f4").tobytes())
    return digest.hexdigest()
