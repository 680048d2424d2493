"""One forward pass of the base model over the paged cache of its device."""

from __future__ import annotations

import torch

from overtone.kernels.gpu.attend_decode import SeenKeys
from overtone.models.base import BaseModel
from overtone.models.device.memory import DeviceMemory
from overtone.models.device.paged import Chunks, DevicePaged


class DeviceForward:
    """What passes have in common. The adapters of a pass are what its caller has left in the base's slot."""

    def __init__(self, base: BaseModel, memory: DeviceMemory) -> None:
        assert base.capability is not None
        self._base, self._memory, self.capability = base, memory, base.capability

    def paged(
        self, slots: torch.Tensor, decoded: SeenKeys | None, longest: int, chunks: Chunks | None = None
    ) -> DevicePaged:
        """See `DevicePaged`."""
        cache, windows = self._memory.cache, self._base.windows
        return DevicePaged(cache, slots, windows, self.capability, decoded, longest, chunks, self._base.varlen)

    def logits(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, paged: DevicePaged
    ) -> torch.Tensor:
        """(len(rows), vocabulary). ids, positions: (1, T) int64; rows: which tokens' logits are wanted, (R,) int64."""
        output = self._base.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows, paged=paged
        )
        logits: torch.Tensor = output.logits[0]
        return logits
