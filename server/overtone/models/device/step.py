"""What one forward pass on the device adds for its adapters: the same launches for every batch of one shape.

    y[t] += sum over the records of row t's adapter for the layer        (`overtone.kernels.gpu.records`)

Which operators run, and on which layers, depends on `uses` alone; whose records they read is data. So a pass can be
recorded once and repeated for other adapters. Slow twin: `overtone.models.adapter_step.AdapterStep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from overtone.models.adapter_rows import Output
from overtone.models.adapter_step import AdapterStep
from overtone.models.device.extents import EXPAND, PAIR, Use
from overtone.models.device.operators import Operators, Target
from overtone.models.device.rows import KindRows, kinds_of


class DeviceStep:
    """One pass's view of the adapters. uses: of all adapters that it may meet; rows: by kind."""

    def __init__(self, operators: Operators, uses: frozenset[Use], rows: Mapping[str, KindRows]) -> None:
        self._operators, self._rows = operators, rows
        self._kinds = kinds_of(uses)
        self._input: torch.Tensor | None = None
        self._analysed: dict[str, torch.Tensor] = {}

    def reads_output(self, module: str) -> bool:
        """No kernel here needs what the layer answers."""
        return False

    def add(self, x: torch.Tensor, *outputs: Output) -> None:
        """Adds to layers' outputs what their adapters say. x: (..., q), what all of the layers read; the outputs' last
        dimension is contiguous."""
        if not x.is_floating_point():  # a token embedding: no adapter here changes one
            return
        if self._input is not x:
            self._input, self._analysed = x, {}
        inputs = x.reshape(-1, x.shape[-1])
        for kind, modules in self._kinds.items():
            chosen = [one for one in outputs if one.module in modules]
            rows = self._rows.get(kind)
            if not chosen or rows is None:
                continue
            for target in self._operators.targets(chosen):
                self._apply(kind, inputs, rows, target, max(modules[name] for name in target.modules))

    def _apply(self, kind: str, x: torch.Tensor, rows: KindRows, target: Target, rank: int) -> None:
        if kind == PAIR:
            self._operators.add_pairs(x, rows, target, rank)
        elif kind == EXPAND:
            self._operators.add_expansions(x, rows, target, rank)
        else:
            self._operators.add_spectral(kind, x, rows, target, self._analysed)


class Steps:
    """Several views of one pass, each of other adapters: no row is changed by two of them."""

    def __init__(self, steps: Sequence[DeviceStep | AdapterStep]) -> None:
        self._steps = steps

    def reads_output(self, module: str) -> bool:
        return any(step.reads_output(module) for step in self._steps)

    def add(self, x: torch.Tensor, *outputs: Output) -> None:
        for step in self._steps:
            step.add(x, *outputs)
