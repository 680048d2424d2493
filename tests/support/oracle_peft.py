"""delta_W of PEFT 0.21.2's families by their equations, dense and in float64. Nothing here uses Overtone or PEFT.

Strict where a parser must be: a size that the configuration does not say is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from support.oracle_random import randlora_deltas, vera_deltas
from support.oracle_spectra import circulant, inverse_fourier, inverse_wavelet
from support.oracle_tensors import Config, Tensors, Weights, check_shape, matching, matching_after_dot


def random_places(config: Config, n: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(config.get("random_loc_seed", 777))
    flat = torch.randperm(shape[0] * shape[1], generator=generator)[:n]
    return flat // shape[1], flat % shape[1]


def _fourierft(config: Config, tensors: Tensors, linears: Weights, _: Weights) -> dict[str, torch.Tensor]:
    deltas = {}
    for module in tensors.modules("fourierft_spectrum"):
        shape = tuple(linears[module].shape)
        n = matching_after_dot(config.get("n_frequency_pattern"), module, config.get("n_frequency", 1000))
        plane = torch.zeros(shape, dtype=torch.float64)
        plane[random_places(config, n, shape)] = check_shape(tensors.take(module, "fourierft_spectrum"), (n,))
        deltas[module] = inverse_fourier(plane) * config.get("scaling", 150.0)
    return deltas


def _waveft(config: Config, tensors: Tensors, linears: Weights, _: Weights) -> dict[str, torch.Tensor]:
    modules, deltas = tensors.modules("waveft_spectrum"), {}
    sizes = {m: linears[m].numel() for m in modules}
    for module in modules:
        shape, default = tuple(linears[module].shape), config.get("n_frequency", 2592)
        if config.get("proportional_parameters"):
            n = max(1, round(sizes[module] / sum(sizes.values()) * (default * len(sizes))))
        else:
            n = matching(config.get("n_frequency_pattern"), module, default)
        plane = torch.zeros(shape, dtype=torch.float64)
        plane[random_places(config, n, shape)] = check_shape(tensors.take(module, "waveft_spectrum"), (n,))
        if config.get("use_idwt", True):
            plane = inverse_wavelet(plane, config.get("wavelet_family", "db1"))
        deltas[module] = plane * config.get("scaling", 25.0)
    return deltas


def _c3a(config: Config, tensors: Tensors, linears: Weights, _: Weights) -> dict[str, torch.Tensor]:
    deltas = {}
    for module in tensors.modules("c3a_kernel"):
        p, q = linears[module].shape
        b = matching_after_dot(config.get("block_size_pattern"), module, config.get("block_size", 256))
        kernel = check_shape(tensors.take(module, "c3a_kernel"), (p // b, q // b, b))
        deltas[module] = circulant(kernel) / q
        assert deltas[module].shape == (p, q)
    return deltas


def _shira(config: Config, tensors: Tensors, linears: Weights, _: Weights) -> dict[str, torch.Tensor]:
    deltas = {}
    for module in tensors.modules("shira_weight"):
        p, q = linears[module].shape
        n = config.get("r", 32) * (p + q)
        values = check_shape(tensors.take(module, "shira_weight"), (n,))
        places = check_shape(tensors.take(module, "shira_indices"), (2, n)).numpy()
        delta = np.zeros((p, q))
        assert places.min() >= 0
        assert (places == np.trunc(places)).all()
        np.add.at(delta, tuple(places.astype(np.int64)), values.numpy())
        deltas[module] = torch.from_numpy(delta)
    return deltas


def _lora(config: Config, tensors: Tensors, linears: Weights, embeddings: Weights) -> dict[str, torch.Tensor]:
    deltas = {}
    for layers, down, up in (
        (linears, "lora_A.weight", "lora_B.weight"),
        (embeddings, "lora_embedding_A", "lora_embedding_B"),
    ):
        for module in tensors.modules(down):
            weight = layers[module].double()
            rank = matching(config.get("rank_pattern"), module, config.get("r", 8))
            alpha = matching(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
            a = check_shape(tensors.take(module, down), (rank, weight.shape[1]))
            b = check_shape(tensors.take(module, up), (weight.shape[0], rank))
            delta = b @ a * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
            if config.get("use_dora"):
                magnitude = check_shape(tensors.take(module, "lora_magnitude_vector"), (weight.shape[0],))
                whole = weight + delta
                delta = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True) - weight
            deltas[module] = delta
    return deltas


def _vblora(config: Config, tensors: Tensors, linears: Weights, _: Weights) -> dict[str, torch.Tensor]:
    r, h, length, k = (
        config.get(key, default)
        for key, default in (("r", 4), ("num_vectors", 256), ("vector_length", 256), ("topk", 2))
    )
    bank = check_shape(tensors.named("base_model.vblora_vector_bank"), (h, length))
    compact = config.get("save_only_topk_weights")

    def mixed(module: str, side: str, grid: tuple[int, int]) -> torch.Tensor:
        name = f"vblora_logits_{side}"
        if compact:
            chosen = check_shape(tensors.take(module, name + "_topk_indices"), (*grid, k)).long()
            first = check_shape(tensors.take(module, name + "_topk_weights"), (*grid, k - 1))
            # Below zero only by the rounding of the others.
            last = (1 - first.sum(-1, keepdim=True)).clamp(min=0)
            weights = torch.cat((first, last), -1) / (first.sum(-1, keepdim=True) + last)
        else:
            logits = tensors.take(module, name)
            check_shape(logits, (*grid, h))
            best, chosen = logits.topk(k, dim=-1)
            weights = torch.softmax(best.double(), -1)
        return (weights[..., None] * bank[chosen]).sum(-2)

    deltas = {}
    for module in tensors.modules("vblora_logits_A_topk_indices" if compact else "vblora_logits_A"):
        p, q = linears[module].shape
        a = mixed(module, "A", (r, q // length)).reshape(r, q)
        b = mixed(module, "B", (p // length, r)).transpose(1, 2).reshape(p, r)
        deltas[module] = b @ a
    return deltas


PEFT: Mapping[str, Callable[[Config, Tensors, Weights, Weights], dict[str, torch.Tensor]]] = {
    "FOURIERFT": _fourierft,
    "WAVEFT": _waveft,
    "C3A": _c3a,
    "SHIRA": _shira,
    "LORA": _lora,
    "VBLORA": _vblora,
    "VERA": vera_deltas,
    "RANDLORA": randlora_deltas,
}
"""(configuration, tensors, linear layers in the model's order, embeddings) -> module -> delta_W (p, q) float64."""
