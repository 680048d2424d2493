"""A decoding step's inputs as one tensor of one shape, whatever the batch: what a recorded pass reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from overtone.engine.scheduler import Chunk
from overtone.kernels.gpu.attend_decode import SeenKeys
from overtone.models.device.extents import KINDS
from overtone.models.device.pool import OnDevice
from overtone.models.device.rows import directories

_FIXED = 4
_COLUMNS = _FIXED + len(KINDS)
_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_STEP = 64


def bucket_of(rows: int) -> int:
    """How many rows a recorded pass for `rows` has: at most a third more, from 8 on."""
    return next((one for one in _BUCKETS if one >= rows), -(-rows // _STEP) * _STEP)


class DecodeInputs:
    """rows, pages: of the shape; ids, positions, slots: (rows,) int64; directories: by kind, (rows,) int64; all views of one
    tensor, so that a step is one copy."""

    def __init__(self, rows: int, pages: int, page_tokens: int, device: torch.device) -> None:
        self.rows, self.pages, self._page_tokens = rows, pages, page_tokens
        # Each column begins at a multiple of 16 bytes: else Triton would compile its kernels once more for some.
        self._pitch = rows + rows % 2
        self._all = torch.zeros(self._pitch * _COLUMNS + rows * pages, dtype=torch.int64, device=device)
        columns = self._all[: self._pitch * _COLUMNS].view(_COLUMNS, self._pitch)[:, :rows].unbind()
        self.ids, self.positions, self.slots, lengths = columns[:_FIXED]
        self.directories: Mapping[str, torch.Tensor] = dict(zip(KINDS, columns[_FIXED:], strict=True))
        self.order = torch.arange(rows, device=device)
        self.seen = SeenKeys(self.order, lengths, self._all[self._pitch * _COLUMNS :].view(rows, pages))

    def fill(
        self, chunks: Sequence[Chunk], adapters: Sequence[OnDevice | None], tokens: torch.Tensor | None = None
    ) -> None:
        """The next pass is for these; rows beyond them write nothing and see nothing. tokens: (len(chunks),) int64 on the
        device, each sequence's next token, which is not among its tokens yet."""
        count, ahead = len(chunks), 0 if tokens is None else 1
        # A new one each time: the copy of the last step may not have been made yet.
        numbers = torch.zeros(len(self._all), dtype=torch.int64, pin_memory=self._all.is_cuda)
        columns = numbers.numpy()[: self._pitch * _COLUMNS].reshape(_COLUMNS, self._pitch)
        ids, positions, slots, lengths = columns[:_FIXED]
        slots[count:] = columns[_FIXED:, count:] = -1
        if count:
            positions[:count] = [chunk.sequence.computed + ahead for chunk in chunks]
            lengths[:count] = positions[:count] + 1
            slots[:count] = self._slots(chunks, positions[:count])
            columns[_FIXED:, :count] = [directories(adapters, kind) for kind in KINDS]
        table = numbers.numpy()[self._pitch * _COLUMNS :].reshape(self.rows, self.pages)
        for row, chunk in enumerate(chunks):
            used = int(positions[row]) // self._page_tokens + 1
            table[row, :used] = chunk.sequence.pages[:used]
        if tokens is None and count:
            ids[:count] = [_id(chunk) for chunk in chunks]
        self._all.copy_(numbers, non_blocking=True)
        if tokens is not None:
            self.ids[:count].copy_(tokens)

    def _slots(self, chunks: Sequence[Chunk], places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
        size = self._page_tokens
        return [
            chunk.sequence.pages[place // size] * size + place % size
            for chunk, place in zip(chunks, places.tolist(), strict=True)
        ]


def _id(chunk: Chunk) -> int:
    sequence = chunk.sequence
    return sequence.output_ids[-1] if sequence.output_ids else sequence.request.prompt_ids[-1]
