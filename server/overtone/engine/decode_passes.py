"""Steps that only decode, as recorded passes.

A recorded pass serves all batches of one bucket of rows, one bucket of lengths and one set of `Use`s: whose adapters its
rows have is data. A batch without adapters runs a pass that has nothing of adapters in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from overtone.engine.config import EngineConfig
from overtone.engine.decode_inputs import DecodeInputs, bucket_of
from overtone.engine.recorded import Recorder
from overtone.engine.scheduler import Chunk
from overtone.models.adapted import StepSlot
from overtone.models.device.extents import KINDS, Use
from overtone.models.device.forward import DeviceForward
from overtone.models.device.operators import Operators
from overtone.models.device.pool import OnDevice
from overtone.models.device.rows import KindRows, uses_of
from overtone.models.device.step import DeviceStep

_SHORT_PAGES = 16
"""The fewest pages that a recorded pass has room for: shorter sequences share it."""
_LITTLE_MORE = 2
"""A pass that does at most so many times as much as is needed serves as well."""
_RECORDED = 256
"""Passes that are kept, the least recently used goes: each has the launches of a step and its inputs."""


@dataclass(frozen=True, slots=True)
class PassShape:
    """What a recorded pass depends on: its rows, the pages that a row may have, what its adapters change."""

    rows: int
    pages: int
    uses: frozenset[Use]


@dataclass(frozen=True, slots=True, eq=False)
class DecodePass:
    inputs: DecodeInputs
    compute: Callable[[], torch.Tensor]


class DecodePasses:
    """Of one model and its operators. slot: where the model's layers find their adapters."""

    def __init__(
        self, forward: DeviceForward, operators: Operators, slot: StepSlot, config: EngineConfig, device: torch.device
    ) -> None:
        self._forward, self._operators, self._slot = forward, operators, slot
        self._config, self._device = config, device
        self._recorder = Recorder(device, bucket_of(config.max_batch))
        self._passes: OrderedDict[PassShape, DecodePass] = OrderedDict()

    @property
    def last(self) -> DecodePass:
        """The one that ran last."""
        return next(reversed(self._passes.values()))

    def warm_up(self) -> None:
        """Records the base model's passes of short sequences, so that no request waits for that."""
        rows = 0
        while self._recorder.records and rows < self._config.max_batch:
            rows = bucket_of(rows + 1)
            for pages in (_SHORT_PAGES, 2 * _SHORT_PAGES):
                shape = PassShape(rows, pages, frozenset())
                self._passes[shape] = self._record(shape, [], [], None)

    def clear(self) -> None:
        """Forgets all of them."""
        self._passes.clear()

    def run(
        self, chunks: Sequence[Chunk], adapters: Sequence[OnDevice | None], tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (len(chunks), vocabulary), valid until the next run. tokens: see `DecodeInputs.fill`."""
        pages = max(chunk.sequence.computed + (tokens is not None) for chunk in chunks) // self._config.page_tokens + 1
        room = max(_SHORT_PAGES, 1 << (pages - 1).bit_length())
        shape = self._known(PassShape(bucket_of(len(chunks)), room, uses_of(adapters)))
        found = self._passes.get(shape)
        if found is None:
            found = self._passes[shape] = self._record(shape, chunks, adapters, tokens)
            while len(self._passes) > _RECORDED:
                self._passes.popitem(last=False)
        else:
            found.inputs.fill(chunks, adapters, tokens)
        self._passes.move_to_end(shape)
        return found.compute()[: len(chunks)]

    def inputs_of(self, shape: PassShape) -> DecodeInputs:
        return DecodeInputs(shape.rows, shape.pages, self._config.page_tokens, self._device)

    def compute(self, inputs: DecodeInputs, uses: frozenset[Use]) -> torch.Tensor:
        """Logits (rows, vocabulary) of one pass: the same launches each time, whatever `inputs` hold."""
        rows = {kind: KindRows.decoding(inputs.order, inputs.directories[kind]) for kind in KINDS}
        # All rows reach the head, in their order.
        self._slot.step = self._slot.head = DeviceStep(self._operators, uses, rows) if uses else None
        paged = self._forward.paged(inputs.slots, inputs.seen, inputs.pages * self._config.page_tokens)
        return self._forward.logits(inputs.ids[None], inputs.positions[None], inputs.order, paged)

    def _record(
        self,
        shape: PassShape,
        chunks: Sequence[Chunk],
        adapters: Sequence[OnDevice | None],
        tokens: torch.Tensor | None,
    ) -> DecodePass:
        inputs = self.inputs_of(shape)
        inputs.fill(chunks, adapters, tokens)
        return DecodePass(inputs, self._recorder.record(partial(self.compute, inputs, shape.uses)))

    def _known(self, shape: PassShape) -> PassShape:
        """`shape`, or one that there is a pass for and that does little more: records that a row does not have end at
        once. Else every mix of kinds of adapters would have a pass of its own."""
        if shape in self._passes or not shape.uses:
            return shape
        larger = [
            one
            for one in self._passes
            if (one.rows, one.pages) == (shape.rows, shape.pages)
            and shape.uses <= one.uses
            and len(one.uses) <= _LITTLE_MORE * len(shape.uses)
        ]
        return min(larger, key=lambda one: len(one.uses), default=shape)
