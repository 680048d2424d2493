"""Which layers of which models are measured, at which batches, in order of importance: a run that has no more time leaves
out the rest."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cases.common import Cell

Layers = tuple[int, tuple[int, ...]]
LLAMA_3_8B: Sequence[Layers] = (
    (4096, (4096,)),
    (4096, (1024, 1024)),
    (4096, (14336, 14336)),
    (14336, (4096,)),
)
OTHERS: Sequence[Layers] = (
    (576, (576,)),
    (576, (192, 192)),
    (576, (1536, 1536)),
    (1536, (576,)),
    (896, (4864, 4864)),
    (4864, (896,)),
    (3584, (18944, 18944)),
    (18944, (3584,)),
    (4096, (11008, 11008)),
    (11008, (4096,)),
)
"""SmolLM2-135M, Qwen2.5-0.5B, Qwen2.5-7B, Llama-2-7B."""
ROWS = (64, 1, 8, 256)
POPULARITIES = ("distinct", "identical", "zipf")
PROMPTS = (2048, 512)
_SMALL: Sequence[Layers] = ((192, (96, 96)), (96, (192, 96)))


def single_rows(operator: str, sizes: Sequence[int]) -> list[Cell]:
    """Distinct adapters at all batches of Llama-3-8B, then the other models, then what is more popular."""
    found = [Cell(operator, q, widths, rows, n) for n in sizes for rows in ROWS for q, widths in LLAMA_3_8B]
    found += [Cell(operator, q, widths, rows, sizes[0]) for rows in (64, 1) for q, widths in OTHERS]
    found += [
        Cell(operator, q, widths, rows, n, popularity)
        for rows in (64, 256, 8)
        for n in sizes
        for popularity in POPULARITIES[1:]
        for q, widths in LLAMA_3_8B
    ]
    return found + [Cell(operator, q, widths, rows, sizes[0]) for rows in (8, 256) for q, widths in OTHERS]


def inputs(operator: str) -> list[Cell]:
    """One cell a number of inputs."""
    sizes = dict.fromkeys(q for q, _ in (*LLAMA_3_8B, *OTHERS))
    return [Cell(operator, q, (), rows) for rows in ROWS for q in sizes]


def first(cells: Sequence[Cell]) -> list[Cell]:
    """Distinct adapters, Llama-3-8B."""
    return [c for c in cells if c.popularity == "distinct" and (c.q, c.widths) in LLAMA_3_8B]


def prompts(operator: str, sizes: Sequence[int]) -> list[Cell]:
    return [
        Cell(operator, q, widths, rows, n, "prompt", adapters)
        for adapters in (1, 8)
        for rows in PROMPTS
        for n in sizes
        for q, widths in LLAMA_3_8B
    ]


def small(operator: str, size: int, *, rows: int = 3) -> list[Cell]:
    return [
        Cell(operator, q, widths, rows, size, popularity)
        for (q, widths), popularity in zip(_SMALL, ("distinct", "zipf"), strict=True)
    ]


def small_prompts(operator: str, size: int) -> list[Cell]:
    return [Cell(operator, q, widths, 20, size, "prompt", 2) for q, widths in _SMALL[:1]]
