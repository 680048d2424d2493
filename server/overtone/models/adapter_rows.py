"""What the steps have in common: the layers' outputs that they change, and what is kept of adapters between them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Protocol

import torch

from overtone.kernels import FrameBank
from overtone.kernels.native import NativeKernels
from overtone.models.channels import Outlines
from overtone.models.core_tables import NativeCores
from overtone.models.decode_batch import DecodeBatch
from overtone.models.materialised import Materialised
from overtone.models.native_rows import NativeRows

PATHS = ("sparse", "low_rank", "stacked", "shared", "prompt", "materialised", "device", "merged")


class Output(NamedTuple):
    """What a layer itself answers, to be changed in place. y: (..., p); bias: (p,), what of it is not W x."""

    module: str
    y: torch.Tensor
    bias: torch.Tensor | None = None


class AddsAdapters(Protocol):
    """One forward pass's view of the adapters: what the adapted layers ask."""

    def reads_output(self, module: str) -> bool:
        """Whether `add` needs what `module` itself answers, nothing added to it yet."""

    def add(self, x: torch.Tensor, *outputs: Output) -> None:
        """Adds to layers' outputs what the adapters of the pass's rows say. x: (..., q), what all of the layers read."""


class AdapterRows:
    """What is kept of the adapters from one forward pass to the next.

    paths: counts rows times modules by how their cores were applied: "sparse", "low_rank" and "stacked" (the cores of all
    adapters of the batch at once), "shared" (one adapter's rows in one product), "prompt" (a chunk of a prompt),
    "materialised" (a chunk of a prompt, by a dense delta), "device" (by the kernels of a GPU), "merged" (nothing was left
    to add).
    """

    def __init__(
        self, device: torch.device, paths: Counter[str] | None = None, native: NativeKernels | None = None
    ) -> None:
        self.outlines = Outlines()
        self.decodes = DecodeBatch(device, native)
        self.native_cores = NativeCores()
        self.materialised = Materialised()
        self.paths: Counter[str] = Counter() if paths is None else paths

    def native_rows(self, frames: FrameBank) -> NativeRows | None:
        """What a step may add by native kernels; None without them."""
        if frames.native is None:
            return None
        return NativeRows(frames.native, frames, self.native_cores, self.paths)
