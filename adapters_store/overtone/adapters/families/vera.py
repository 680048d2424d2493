"""VeRA: vectors between two frozen random matrices (ICLR 2024, arXiv 2310.11454), as PEFT 0.21.2 saves it.

    delta_W = diag(lambda_b) B[:p] diag(lambda_d) A[:, :q]        A: (r, q_max), B: (p_max, r), one pair for all modules

`<module>.vera_lambda_b` (p,), `<module>.vera_lambda_d` (r,). `base_model.vera_A` and `base_model.vera_B`, possibly larger
than the layers need, unless save_projection is false. Then they are drawn in this order, A first, uniformly from
+-sqrt(6 / fan_in), fan_in = q_max for A and r for B. Many adapters have the same pair: it is shared by its content.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overtone.adapters.families.config import FLAG, FRACTION, NUMBER, POSITIVE, AdapterConfig
from overtone.adapters.families.random_matrices import (
    RANDOM_KEYS,
    Shape,
    as_drawn,
    at_least,
    check_drawable,
    dtypes_of,
    largest,
    seed_of,
    shared_matrix,
    shared_pair,
    take_saved,
)
from overtone.adapters.families.tensors import Stored, by_module
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.kernels import Delta, DiagonalCore, SharedMatrix, Term, projection

_A, _B = "base_model.vera_A", "base_model.vera_B"
_LAMBDA_B, _LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
_PEFT_RANK = 256


def draw(r: int, shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, q) and B (p, r) float32, bit for bit as PEFT draws them for layers of at most `shape` (p, q)."""
    p, q = shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.empty(r, q, dtype=torch.float32), torch.empty(p, r, dtype=torch.float32)
    for matrix in (a, b):
        torch.nn.init.kaiming_uniform_(matrix, generator=generator)
    return a, b


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    r = config.count("r") or _PEFT_RANK
    others = dict(tensors)
    saved = take_saved(others, (_A, _B), config)
    modules = by_module(others, (_LAMBDA_B, _LAMBDA_D))
    shapes = {module: context.base.shape(module) for module in modules}
    vectors = {
        module: (parts[_LAMBDA_B].floats((shapes[module][0],)), parts[_LAMBDA_D].floats((r,)))
        for module, parts in modules.items()
    }
    a, b = _saved_pair(saved, r, shapes, context) if saved else _drawn_pair(config, r, shapes, context)
    deltas = {module: Delta((_term(a, b, *vectors[module]),), shape) for module, shape in shapes.items()}
    return ParsedWeights(deltas, sum(x.numel() for pair in vectors.values() for x in pair))


def _term(a: SharedMatrix, b: SharedMatrix, lambda_b: torch.Tensor, lambda_d: torch.Tensor) -> Term:
    return Term(projection(a), DiagonalCore(lambda_d), projection(b), lambda_b.to(torch.float32))


def _saved_pair(
    saved: list[Stored], r: int, shapes: Mapping[str, Shape], context: ParserContext
) -> tuple[SharedMatrix, SharedMatrix]:
    """A (r, q_max) and B transposed (r, p_max)."""
    p, q = largest(shapes.values())
    a, b = at_least(saved[0], (r, q), growing=(1,)), at_least(saved[1], (p, r), growing=(0,))
    return shared_matrix(a, context.memo), shared_matrix(b.T, context.memo)


def _drawn_pair(
    config: AdapterConfig, r: int, shapes: Mapping[str, Shape], context: ParserContext
) -> tuple[SharedMatrix, SharedMatrix]:
    """`_saved_pair`, drawn."""
    shape, seed, dtypes = largest(shapes.values()), seed_of(config), dtypes_of(shapes, context.base)
    check_drawable(r * sum(shape), context.max_numbers)

    def make() -> tuple[SharedMatrix, SharedMatrix, torch.Tensor, torch.Tensor]:
        a, b = as_drawn(draw(r, shape, seed), dtypes)
        return shared_pair(a, b.T)

    return context.memo.get(("vera", r, shape, seed, dtypes), make)[:2]


VERA = Family(
    name="vera",
    keys={
        **RANDOM_KEYS,
        "r": POSITIVE,
        # Training only.
        "vera_dropout": FRACTION,
        "d_initial": NUMBER,
        "init_weights": FLAG,
    },
    parse=_parse,
)
