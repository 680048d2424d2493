"""The refit of all modules on the activations of the plain base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from overtone.errors import InvalidRequest
from overtone.tuning.compress.base import Base, load_model
from overtone.tuning.compress.choosing import OnModule, Selection
from overtone.tuning.compress.config import DTYPES, Config
from overtone.tuning.compress.moments import in_parts, measure
from overtone.tuning.compress.prompts import read_prompts
from overtone.tuning.compress.refit import Refitted, features_of, refit
from overtone.tuning.compress.source import Source


def refit_all(
    config: Config, base: Base, source: Source, chosen: Mapping[str, Selection], on_module: OnModule
) -> dict[str, Refitted]:
    """Of every module with coefficients. The prompts are run as often as the memory for moments needs it.

    A module that no prompt reaches (an expert) keeps its plain values: its energy is 0.
    """
    assert config.refit is not None
    with_some = {module: one for module, one in chosen.items() if one.values.numel()}
    prompts = list(tokenised(base.source, config.refit, config.max_prompt_tokens))
    model = load_model(base.source)
    features = {module: features_of(one, source.spectrum(module)) for module, one in with_some.items()}
    found = {}
    for part in in_parts(features, config.refit_memory_mib << 20):
        for module, moments in measure(model, prompts, part).items():
            spectrum = source.spectrum(module)
            found[module] = refit(with_some[module], spectrum, moments, config.ridge, DTYPES[config.dtype])
            on_module("refitting", module)
    return found


def tokenised(source: str, path: Path, most: int) -> Iterator[torch.Tensor]:
    """Each prompt's ids (1, tokens), its first `most`, one prompt at a time: no padding is ever seen.

    Raises `InvalidRequest` if no prompt has a token.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    found = False
    for prompt in read_prompts(path):
        ids = tokenizer(prompt)["input_ids"][:most]
        if ids:
            found = True
            yield torch.tensor([ids])
    if not found:
        raise InvalidRequest(f"no prompt in {path} has a token", field="refit")
