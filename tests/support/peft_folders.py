"""PEFT itself as the reference: adapters trained by nobody, saved by its own save_pretrained, merged by its own code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def _quietly() -> Iterator[None]:
    """PEFT warns of what it does on purpose: keys of other adapters, embeddings that it saves too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peft_config(kind: str, **settings: Any) -> Any:
    """A configuration by the name of its class in PEFT."""
    import peft

    with _quietly():
        return getattr(peft, kind)(**settings)


def peft_folder(folder: Path, model: Any, config: Any, *, seed: int = 0, strength: float = 0.3) -> Path:
    """A folder as PEFT saves it for `config` on a copy of `model`, its trainable parameters perturbed at random.

    strength: the perturbation's standard deviation relative to each parameter's own, or to 1 where that is zero.
    """
    import peft

    with _quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                    parameter.add_(torch.randn_like(parameter), alpha=strength * (spread or 1.0))
        adapted.save_pretrained(str(folder))
    return folder


def load_peft(folder: Path, model: Any) -> Any:
    """PEFT's own model of the adapter in `folder` on a copy of `model`, not merged."""
    import peft

    with _quietly():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def peft_deltas(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Module -> delta_W (p, q) float64: what PEFT's merge in float64 adds to each weight that it changes."""
    wide = copy.deepcopy(model).double()
    before = {name: parameter.detach().clone() for name, parameter in wide.named_parameters(remove_duplicate=False)}
    with _quietly():
        merged = load_peft(folder, wide).double().merge_and_unload()
    deltas = {}
    for name, parameter in merged.named_parameters(remove_duplicate=False):
        change = parameter.detach() - before[name]
        if name.endswith(".weight") and bool(change.any()):
            deltas[name.removesuffix(".weight")] = change
    return deltas
