"""delta_W of a whole adapter folder, dense and in float64, by whoever is the authority on its family.

LoCA, sDCTFT, DCFT and PiCa: the definitions, in `support.oracle`. PEFT's families: PEFT itself. Nothing here uses Overtone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from support.oracle import dcft_delta, dense_delta, pica_deltas
from support.peft_folders import peft_deltas


def deltas_in(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Module -> what the adapter adds to the weight of that layer, in the weight's own shape, float64."""
    if (folder / "pica_config.json").exists():
        return pica_deltas(folder, {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    family = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    if family not in ("LOCA", "SDCTFT", "MACP", "DCFT"):
        return peft_deltas(folder, model)
    one = dcft_delta if family == "DCFT" else dense_delta
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            turned = isinstance(module, Conv1D)
            delta = one(folder, name, tuple((module.weight.T if turned else module.weight).shape))
            if delta is not None:
                found[name] = torch.as_tensor(delta.T if turned else delta)
    return found
