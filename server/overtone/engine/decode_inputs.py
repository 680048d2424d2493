"""A decoding step's inputs as one tensor of one shape, whatever the batch: what a recorded pass reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

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
        self._all = torch.zeros(rows * (_COLUMNS + pages), dtype=torch.int64, device=device)
        columns = self._all[: rows * _COLUMNS].view(_COLUMNS, rows).unbind()
        self.ids, self.positions, self.slots, lengths = columns[:_FIXED]
        self.directories: Mapping[str, torch.Tensor] = dict(zip(KINDS, columns[_FIXED:], strict=True))
        self.order = torch.arange(rows, device=device)
        self.seen = SeenKeys(self.order, lengths, self._all[rows * _COLUMNS :].view(rows, pages))

    def fill(
        self, chunks: Sequence[Chunk], adapters: Sequence[OnDevice | None], tokens: torch.Tensor | None = None
    ) -> None:
        """The next pass is for these; rows beyond them write nothing and see nothing. tokens: (len(chunks),) int64 on the
        device, each sequence's next token, which is not among its tokens yet."""
        ahead = 0 if tokens is None else 1
        places = [chunk.sequence.computed + ahead for chunk in chunks]
        rest = self.rows - len(chunks)
        nothing = [0] * rest
        ids = [_id(chunk) for chunk in chunks] if tokens is None else [0] * len(chunks)
        columns = [
            *(ids, nothing),
            *(places, nothing),
            *([self._slot(chunk, place) for chunk, place in zip(chunks, places, strict=True)], [-1] * rest),
            *([place + 1 for place in places], nothing),
            *chain.from_iterable((directories(adapters, kind), [-1] * rest) for kind in KINDS),
        ]
        used = [place // self._page_tokens + 1 for place in places]
        table = [
            chunk.sequence.pages[:count] + [0] * (self.pages - count) for chunk, count in zip(chunks, used, strict=True)
        ]
        table.append([0] * (rest * self.pages))
        numbers = torch.tensor(list(chain.from_iterable((*columns, *table))), dtype=torch.int64)
        if self._all.is_cuda:
            numbers = numbers.pin_memory()
        self._all.copy_(numbers, non_blocking=True)
        if tokens is not None:
            self.ids[: len(tokens)].copy_(tokens)

    def _slot(self, chunk: Chunk, place: int) -> int:
        page = chunk.sequence.pages[place // self._page_tokens]
        return page * self._page_tokens + place % self._page_tokens


def _id(chunk: Chunk) -> int:
    sequence = chunk.sequence
    return sequence.output_ids[-1] if sequence.output_ids else sequence.request.prompt_ids[-1]
