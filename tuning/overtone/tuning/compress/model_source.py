"""A whole fine-tuned model against its base: delta_W = W_tuned - W_base, by layers, never both models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from overtone.adapters.families.tensors import check_finite
from overtone.errors import BaseModelMismatch
from overtone.tuning.compress.base import Base
from overtone.tuning.compress.checkpoint import Checkpoint
from overtone.tuning.compress.config import Config
from overtone.tuning.compress.source import check_rest, check_targets, is_target
from overtone.tuning.compress.spectra import Spectrum, dense, spans


class _Pair(NamedTuple):
    """A tensor's name in the two checkpoints; None where it is not."""

    base: str | None
    tuned: str | None


class ModelSource:
    """Every linear layer but one that is tied to an embedding; that, norms and biases are what no delta here can hold.

    Raises `InvalidRequest` for files that are missing and for such changes unless they may be dropped,
    `BaseModelMismatch` with the tensor's name for other shapes and layers, `NonFiniteAdapter` for NaN and infinity.
    """

    kind = "model"
    warnings: tuple[str, ...] = ()

    def __init__(self, config: Config, base: Base) -> None:
        self._tuned, self._base = Checkpoint(config.source, "source"), base
        linears = [module for module in base.modules if f"{module}.weight" not in base.tied]
        check_targets(config.targets, linears)
        found = {m: self._pair(f"{m}.weight") for m in linears if is_target(m, config.targets)}
        # Files that call a layer otherwise are compared by their own names below.
        self._pairs = {module: pair for module, pair in found.items() if pair != (None, None)}
        for module, pair in self._pairs.items():
            _check(module, pair)
        self.shapes: Mapping[str, tuple[int, int]] = {module: base.modules[module] for module in self._pairs}
        self.size_bytes = self._tuned.size_bytes
        self.origin = {"base_model_name_or_path": base.name, "task_type": "CAUSAL_LM"}
        self.left_out = tuple(self._changed_elsewhere())
        check_rest(self.left_out, config.rest, "differs from the base and is no linear layer to be compressed")

    def spectrum(self, module: str) -> Spectrum:
        """D in float32: the difference of two weights is not exact beyond."""
        pair = self._pairs[module]
        assert pair.base is not None
        assert pair.tuned is not None
        delta, base = self._tuned.tensor(pair.tuned), self._base.checkpoint.tensor(pair.base)
        _check_shapes(pair.tuned, delta, base)
        delta = delta.to(torch.float32)
        for rows in spans(*delta.shape):
            delta[rows] -= base[rows].to(torch.float32)
        check_finite(pair.tuned, delta, "less the base's")
        return dense(delta.T.contiguous() if module in self._base.conv1d else delta)

    def _pair(self, parameter: str) -> _Pair:
        base, tuned = (self._base.stored_name(files, parameter) for files in (self._base.checkpoint, self._tuned))
        return _Pair(base, tuned)

    def _changed_elsewhere(self) -> list[str]:
        """Names of tensors that are not among the modules and not equal to the base's."""
        pairs = {name: self._pair(name) for name in self._base.parameters}
        used = {pair.tuned for pair in self._pairs.values()}
        known = {name for pair in pairs.values() for name in pair}
        others = sorted((self._tuned.names | self._base.checkpoint.names) - known)
        rest = [*pairs.values(), *(self._by_name(name) for name in others)]
        changed = [pair.tuned or pair.base or "" for pair in rest if pair.tuned not in used and self._differs(pair)]
        return list(dict.fromkeys(changed))

    def _by_name(self, name: str) -> _Pair:
        return _Pair(*(name if name in files.names else None for files in (self._base.checkpoint, self._tuned)))

    def _differs(self, pair: _Pair) -> bool:
        if pair.base is None or pair.tuned is None:
            return pair.base != pair.tuned
        tuned, base = self._tuned.tensor(pair.tuned), self._base.checkpoint.tensor(pair.base)
        return tuned.shape != base.shape or not torch.equal(tuned.to(torch.float64), base.to(torch.float64))


def _check(module: str, pair: _Pair) -> None:
    for name, where in zip(pair, ("the base", "the fine-tuned model"), strict=True):
        if name is None:
            raise BaseModelMismatch(f"{where} has no tensor {module}.weight", field=module)


def _check_shapes(name: str, tuned: torch.Tensor, base: torch.Tensor) -> None:
    if tuned.shape != base.shape or not (tuned.is_floating_point() and base.is_floating_point()):
        found = f"{tuple(tuned.shape)} {tuned.dtype}, in the base {tuple(base.shape)} {base.dtype}"
        raise BaseModelMismatch(f"{name} is {found}: not a fine-tune of this base", field=name)
