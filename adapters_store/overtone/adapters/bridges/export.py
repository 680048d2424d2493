"""Any adapter as LoRA, module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from overtone.adapters.base import BaseDescription
from overtone.adapters.bridges.lora_folder import lora_files
from overtone.adapters.bridges.low_rank import Choice, Fitted, fit, relative
from overtone.adapters.families import ParsedAdapter
from overtone.adapters.files import AdapterFiles


@dataclass(frozen=True)
class Exported:
    """files: of the LoRA adapter; modules: what became of each delta."""

    files: AdapterFiles
    modules: Mapping[str, Fitted]

    @property
    def relative_error(self) -> float:
        """Of the whole adapter: the root of the sum of squares over its modules, of the error and of the deltas."""
        fitted = self.modules.values()
        return relative(_root(each.error for each in fitted), _root(each.norm for each in fitted))

    @property
    def parameter_count(self) -> int:
        return sum(each.a.numel() + each.b.numel() for each in self.modules.values())


def to_lora(
    parsed: ParsedAdapter,
    base: BaseDescription,
    config: Mapping[str, object],
    choice: Choice,
    on_module: Callable[[str], None] = lambda module: None,
) -> Exported:
    """config: the adapter's own; on_module: told each module once it is done. Raises as `fit`."""
    modules = {}
    for module, delta in parsed.deltas.items():
        modules[module] = fit(module, delta, partial(base.weight, module), choice)
        on_module(module)
    return Exported(lora_files(modules, base, config), modules)


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))
