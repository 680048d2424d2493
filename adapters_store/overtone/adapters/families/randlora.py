"""RandLoRA: full rank out of weighted random bases (ICLR 2025, arXiv 2502.00987), as PEFT 0.21.2 saves it.

With s = min(p, q), L = max(p, q), nb = ceil(s / r), for k < r and j < nb:

    A'[k nb + j, i] = lambda[k, j] gamma[j, i] A[k, i]        A: (r, s_max)           A': (r nb, s)
    B'[j r + k, i] = B[i, j, k]                               B: (L_max, nb_max, r)   B': (r nb, L)
    delta_W = alpha / r B'^T A' if s = q, else alpha / r A'^T B'

The rows of A' and B' are paired by their number although they count k and j in opposite orders: so does PEFT.

`<module>.randlora_lambda` (r, nb), `<module>.randlora_gamma` (nb, s). `base_model.randlora_A` (r, 1, s_max) and
`base_model.randlora_B`, copied beside every module, unless save_projection is false. Then they are drawn, as `draw` says.
Many adapters have the same pair: it is shared by its content.
"""

from __future__ import annotations

import math
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
from overtone.adapters.families.tensors import Stored, by_module, check_finite
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.errors import InvalidAdapter
from overtone.kernels import IDENTITY, Delta, ModulatedCore, SharedMatrix, Term, projection

_A, _B = "base_model.randlora_A", "base_model.randlora_B"
_COPIES = {"randlora_A": _A, "randlora_B": _B}
_LAMBDA, _GAMMA = "randlora_lambda", "randlora_gamma"
_PEFT_RANK, _PEFT_ALPHA = 32, 640.0


def draw(r: int, shape: Shape, seed: int, sparsity: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, 1, s) and B (L, nb, r), bit for bit as PEFT draws them for layers of at most `shape`.

    Uniform numbers in bfloat16 or, of a given sparsity, in float32 0 but for 1 and -1 with a probability of 1 / (2
    sparsity) each; divided by their standard deviation. PEFT draws float16 on a GPU without bfloat16: such an adapter
    must be saved with its matrices.
    """
    small, large, bases = _sizes(r, shape)
    generator = torch.Generator().manual_seed(seed)
    if sparsity is not None:
        a, b = (
            _ternary(torch.rand(size, generator=generator), sparsity) for size in ((r, 1, small), (large, bases, r))
        )
        return _normalised(a), _normalised(b)
    a = _uniform((r, 1, small), generator)
    b = torch.cat([_uniform((large, 1, r), generator) for _ in range(bases)], dim=1)
    return _normalised(a), _normalised(b)


def _sizes(r: int, shape: Shape) -> tuple[int, int, int]:
    """s, L, nb."""
    small = min(shape)
    return small, max(shape), -(-small // r)


def _normalised(matrix: torch.Tensor) -> torch.Tensor:
    """Not finite if all numbers are zero, or if there is only one, which has no standard deviation."""
    return matrix / matrix.std() if matrix.numel() > 1 else matrix * math.nan


def _uniform(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    matrix = torch.empty(size, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)


def _ternary(uniform: torch.Tensor, sparsity: float) -> torch.Tensor:
    share = 1 / (2 * sparsity)
    signs = torch.zeros_like(uniform)
    signs[uniform < share] = -1
    signs[uniform > 1 - share] = 1
    return signs


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    r = config.count("r") or _PEFT_RANK
    others = dict(tensors)
    saved = take_saved(others, (_A, _B), config)
    modules = by_module(others, (_LAMBDA, _GAMMA), _COPIES)
    shapes = {module: context.base.shape(module) for module in modules}
    numbers = {module: _numbers(parts, r, shapes[module]) for module, parts in modules.items()}
    pair = _saved_pair(saved, r, shapes, context) if saved else _drawn_pair(config, r, shapes, context)
    scale = config.number("randlora_alpha", _PEFT_ALPHA) / r
    for parts in modules.values():
        _check_copies(parts, {stored.name: stored for stored in saved})
        lam = parts[_LAMBDA]
        check_finite(lam.name, lam.tensor.to(torch.float32) * scale, f"once scaled by {scale:g}")
    deltas = {
        module: Delta((_term(shapes[module], pair, lam, gamma, scale),), shapes[module])
        for module, (lam, gamma) in numbers.items()
    }
    return ParsedWeights(deltas, sum(x.numel() for both in numbers.values() for x in both))


def _numbers(parts: Mapping[str, Stored], r: int, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """lambda, gamma."""
    small, _, bases = _sizes(r, shape)
    return parts[_LAMBDA].floats((r, bases)), parts[_GAMMA].floats((bases, small))


def _term(
    shape: Shape, pair: tuple[SharedMatrix, SharedMatrix], lam: torch.Tensor, gamma: torch.Tensor, scale: float
) -> Term:
    basis, large = pair
    if min(shape) == shape[1]:
        return Term(IDENTITY, ModulatedCore(basis, gamma, lam, scale), projection(large))
    return Term(projection(large), ModulatedCore(basis, gamma, lam, scale, transposed=True), IDENTITY)


def _check_copies(parts: Mapping[str, Stored], saved: Mapping[str, Stored]) -> None:
    """Raises `InvalidAdapter` for a copy beside a module that is not one."""
    for part, original in _COPIES.items():
        if part not in parts:
            continue
        copy = parts[part]
        if original not in saved:
            raise InvalidAdapter(f"{copy.name} is there, but save_projection is false", field=copy.name)
        if copy.tensor.dtype != saved[original].tensor.dtype or not torch.equal(copy.tensor, saved[original].tensor):
            raise InvalidAdapter(f"{copy.name} differs from {original}, of which it is a copy", field=copy.name)


def _saved_pair(
    saved: list[Stored], r: int, shapes: Mapping[str, Shape], context: ParserContext
) -> tuple[SharedMatrix, SharedMatrix]:
    """A (r, s_max) and B' (nb_max r, L_max)."""
    small = max(min(shape) for shape in shapes.values())
    large, bases = max(max(shape) for shape in shapes.values()), -(-small // r)
    a = at_least(saved[0], (r, 1, small), growing=(2,))
    b = at_least(saved[1], (large, bases, r), growing=(0, 1))
    return shared_matrix(a[:, 0], context.memo), shared_matrix(b.flatten(1).T, context.memo)


def _drawn_pair(
    config: AdapterConfig, r: int, shapes: Mapping[str, Shape], context: ParserContext
) -> tuple[SharedMatrix, SharedMatrix]:
    """`_saved_pair`, drawn."""
    shape, seed, dtypes = largest(shapes.values()), seed_of(config), dtypes_of(shapes, context.base)
    small, large, bases = _sizes(r, shape)
    sparsity = math.sqrt(small) if config.flag("very_sparse") else 3.0 if config.flag("sparse") else None
    check_drawable(r * (small + large * bases), context.max_numbers)

    def make() -> tuple[SharedMatrix, SharedMatrix, torch.Tensor, torch.Tensor]:
        a, b = as_drawn(draw(r, shape, seed, sparsity), dtypes)
        return shared_pair(a[:, 0], b.flatten(1).T)

    return context.memo.get(("randlora", r, shape, seed, sparsity, dtypes), make)[:2]


RANDLORA = Family(
    name="randlora",
    keys={
        **RANDOM_KEYS,
        "r": POSITIVE,
        "randlora_alpha": NUMBER,
        # How the matrices are drawn, if they are not saved.
        "sparse": FLAG,
        "very_sparse": FLAG,
        # Training only.
        "randlora_dropout": FRACTION,
        "init_weights": FLAG,
    },
    parse=_parse,
)
