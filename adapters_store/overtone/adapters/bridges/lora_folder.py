"""LoRA pairs as the two files that PEFT 0.21.2 writes. Every scale is 1: lora_alpha equals the rank, everywhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import safetensors.torch
import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.bridges.low_rank import Fitted
from overtone.adapters.families.tensors import PREFIX
from overtone.adapters.files import AdapterFiles

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")

_PEFT_DEFAULTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

_PLAIN = re.compile(r"[\w\-.]+")


def lora_files(pairs: Mapping[str, Fitted], base: BaseDescription, source: Mapping[str, object]) -> AdapterFiles:
    """The files of an adapter with these pairs. source: the configuration that it came from, for what tells its origin."""
    tensors: dict[str, torch.Tensor] = {}
    for module, pair in pairs.items():
        down, up = _EMBEDDING if module in base.embeddings else _LINEAR
        tensors[f"{PREFIX}{module}.{down}"], tensors[f"{PREFIX}{module}.{up}"] = pair.a, pair.b
    ranks = {module: pair.rank for module, pair in pairs.items()}
    # The commonest, of equally common ones the smallest.
    rank = min(Counter(ranks.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    others = pattern_of(ranks, rank)
    config = {
        **_PEFT_DEFAULTS,
        **{key: source.get(key) for key in ("base_model_name_or_path", "revision", "task_type")},
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": target_modules(ranks, {*base.modules, *base.embeddings}),
    }
    # Not with sort_keys: the order of the patterns counts.
    text = json.dumps(dict(sorted(config.items())), indent=2, ensure_ascii=False)
    return AdapterFiles(text.encode(), safetensors.torch.save(tensors, {"format": "pt"}))


def pattern_of(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """PEFT's rank_pattern for modules of other ranks than `default`.

    A key is a regular expression that may match the end of a name, and the first that matches counts: names that some key
    of another module matches are therefore listed too, and the longest names come first.
    """
    keys = {m: m if _PLAIN.fullmatch(m) else re.escape(m) for m, rank in ranks.items() if rank != default}
    expressions = [re.compile(rf"(.*\.)?({key})$") for key in keys.values()]
    for module in ranks:
        if module not in keys and any(expression.match(module) for expression in expressions):
            keys[module] = re.escape(module)
    # A dot of a plain name stands for any character: of equally long names the one with fewer dots comes first.
    ordered = sorted(keys, key=lambda module: (-len(module), module.count("."), module))
    return {keys[module]: ranks[module] for module in ordered}


def target_modules(adapted: Collection[str], known: Collection[str]) -> list[str] | str:
    """What PEFT matches exactly `adapted` with, out of `known`: the last component of names where all modules so called are
    adapted, else full names, and if another module's name ends with one of those, a regular expression."""
    others = [module for module in known if module not in adapted]
    rest = {_last(module) for module in others}
    names = {module if _last(module) in rest else _last(module) for module in adapted}
    if any(module.endswith("." + name) for module in others for name in names):
        return "|".join(re.escape(module) for module in sorted(adapted))
    return sorted(names)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
