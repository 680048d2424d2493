"""Products of constant shape: what a row becomes, to the last bit, whatever rows are computed with it.

Matrix libraries choose their kernels, and with them the order of each sum, by the number of rows and by how the rows lie in
memory. In blocks of `ROWS` rows both are always the same: 16 rows of 4-byte numbers begin at a multiple of 64 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

ROWS = 16
"""Rows of a product, the last ones zero where there are fewer."""


_SIZES = (1, 4, 16, 32, 64)
"""Rows of a product that may take the place of `ROWS`, where it was tried that they give the same bits."""


def by_blocks(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, sizes: Sequence[int] = (ROWS,)
) -> torch.Tensor:
    """function(*inputs), computed in blocks of one of `sizes` (ascending) rows. inputs: (T, ...) each; returns (T, ...).

    All but the last are of the largest size, the last of the smallest that it fits in, with zeros for missing rows.
    """
    rows = len(inputs[0])
    if not rows:
        return function(*inputs)
    parts = []
    for start in range(0, rows, sizes[-1]):
        block = tuple(x[start : start + sizes[-1]] for x in inputs)
        missing = next(size for size in sizes if size >= len(block[0])) - len(block[0])
        if missing:
            block = tuple(torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) for x in block)
        parts.append(function(*block))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]


def interchangeable_sizes(function: Callable[[torch.Tensor], torch.Tensor], row: torch.Tensor) -> tuple[int, ...]:
    """The sizes of blocks in which `function` gives the same bits for `row`: (q,) in each of their places, as in blocks of
    `ROWS`; () if already there the place matters.

    The order of a sum depends on the shapes, not on the numbers: one row of random numbers shows it.
    """
    expected = function(row.expand(ROWS, -1).contiguous())[:1]

    def same(size: int) -> bool:
        found = function(row.expand(size, -1).contiguous())
        return torch.equal(found, expected.expand_as(found))

    return tuple(size for size in _SIZES if same(size)) if same(ROWS) else ()


class RowWise(nn.Module):
    """An elementwise function applied to each row by itself.

    torch computes what is left over at the end of a vector or of a thread's share by other instructions than the rest, and
    where that is depends on the number of rows.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.stack([self.function(row) for row in rows]).view(x.shape) if len(rows) else x


def own_products(model: nn.Module) -> list[str]:
    """Parameters that the model multiplies by itself, not through a layer of ours: mixtures of experts, convolutions."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in embeddings]


def make_rowwise(model: nn.Module) -> None:
    """Makes every activation of `model` a `RowWise`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_activation(child):
                setattr(parent, name, RowWise(child))


def _is_activation(module: Any) -> bool:
    where = type(module).__module__
    return where in ("transformers.activations", "torch.nn.modules.activation") and not list(module.parameters())
