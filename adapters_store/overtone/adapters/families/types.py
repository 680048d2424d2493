"""What a family's parser takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.families.config import AdapterConfig, Rule
from overtone.kernels import Delta


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter in the kernels' vocabulary, completely validated against one base model.

    `deltas`: module -> what is added to its weight; `parameter_count`: stored coefficients, before duplicates merge.
    """

    family: str
    deltas: Mapping[str, Delta]
    base_model_name_or_path: str
    base_fingerprint: str
    parameter_count: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ParsedWeights:
    """A family's share of a `ParsedAdapter`."""

    deltas: Mapping[str, Delta]
    parameter_count: int


@dataclass(frozen=True)
class Family:
    """One adapter family. `keys`: the configuration keys that it allows beyond the common ones."""

    name: str
    keys: Mapping[str, Rule]
    parse: Callable[[AdapterConfig, Mapping[str, torch.Tensor], BaseDescription], ParsedWeights]
