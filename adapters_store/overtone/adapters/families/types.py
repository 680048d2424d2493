"""What a family's parser takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.families.config import AdapterConfig, Rule
from overtone.adapters.memo import Memo
from overtone.adapters.projectors import Projectors
from overtone.kernels import Delta


@dataclass(frozen=True)
class ParserContext:
    """What parsers may need besides an adapter's files.

    base: the model that is served; memo: what many adapters share and only one should have to compute; projectors: the
    singular vectors of the base's weights; max_numbers: how many numbers a file may expand to that it does not hold itself,
    drawn from a seed or mixed from a bank.
    """

    base: BaseDescription
    memo: Memo = field(default_factory=Memo)
    projectors: Projectors = field(default_factory=Projectors)
    max_numbers: int = 1 << 28


@dataclass(frozen=True)
class ParsedAdapter:
    """An adapter in the kernels' vocabulary, completely validated against one base model.

    `deltas`: module -> what is added to its weight; `parameter_count`: stored coefficients, before duplicates merge;
    `basis`: where PiCa's singular vectors came from, else "".
    """

    family: str
    deltas: Mapping[str, Delta]
    base_model_name_or_path: str
    base_fingerprint: str
    parameter_count: int
    warnings: tuple[str, ...]
    basis: str = ""


@dataclass(frozen=True)
class ParsedWeights:
    """A family's share of a `ParsedAdapter`."""

    deltas: Mapping[str, Delta]
    parameter_count: int
    basis: str = ""


@dataclass(frozen=True)
class Family:
    """One adapter family.

    `keys`: the configuration keys that it allows beyond the common ones, or in their place; `checks_targets`: whether
    target_modules must tell the same modules as the tensors; False if the parser reads more into them.
    """

    name: str
    keys: Mapping[str, Rule]
    parse: Callable[[AdapterConfig, Mapping[str, torch.Tensor], ParserContext], ParsedWeights]
    checks_targets: bool = True
