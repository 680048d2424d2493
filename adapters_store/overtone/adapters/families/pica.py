"""PiCa: one matrix for all layers of a kind, behind each layer's own singular vectors (ICLR 2026, arXiv 2505.20211).

    delta_W = M_f P        P = Vh[:r] (r, q) of the layer's weight W = U diag(s) Vh, M_f (p, r) of the layer's kind f

pica_adapter.safetensors holds M_f under the name of its kind, an entry of target_modules. As in the authors' code, a linear
layer is of the first kind whose entry is a substring of the layer's full name, and there is no scale. P is computed from
the served model's weights, unless the adapter brings it for all its layers: `basis.<module>` (>= r, q), orthonormal rows.
With basis_sha256 in the configuration an adapter says which P it was trained with; see `basis_digest`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping

import torch

from overtone.adapters.families.config import POSITIVE, UNUSED, AdapterConfig, Rule
from overtone.adapters.families.random_matrices import at_least, shared_matrix
from overtone.adapters.families.tensors import Stored
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.adapters.text import shown
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import IDENTITY, Delta, DenseCore, SharedMatrix, Term, projection

OWN, PINNED, ASSUMED = "own", "pinned", "assumed"
"""Where P came from: the adapter itself; computed here, and it is the one that the adapter names; computed here."""

_BASIS = "basis."
_AUTHORS_RANK = 256
_ORTHONORMAL = 1e-3
"""How far P P^T may be from the identity, for which rounding to float16 leaves room and anything but a basis does not."""


def basis_digest(basis: Mapping[str, torch.Tensor], rank: int) -> str:
    """basis_sha256 of an adapter of this rank. basis: adapted module -> P, (>= rank, q).

    SHA-256, as 64 hexadecimal digits, of these bytes for each module in sorted order of the names: the name in UTF-8, a
    zero byte, P[:rank] as float32, little-endian, row by row.
    """
    digest = hashlib.sha256()
    for module in sorted(basis):
        rows = basis[module][:rank].detach().to("cpu", torch.float32).contiguous()
        digest.update(module.encode() + b"\0" + rows.numpy().tobytes())
    return digest.hexdigest()


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    rank = config.count("rank") or _AUTHORS_RANK
    kinds = _kinds(config)
    members = _members(kinds, context.base.modules)
    bases = {name: tensor for name, tensor in tensors.items() if name.startswith(_BASIS)}
    cores = _cores(kinds, {n: t for n, t in tensors.items() if n not in bases}, members, rank, context)
    adapted = {module: kind for kind, modules in members.items() for module in modules}
    if bases:
        matrices = _own(bases, adapted, rank, context)
    else:
        matrices = {module: context.projectors.get(module, rank) for module in adapted}
    pinned = _is_pinned(config, matrices, rank)
    deltas = {
        module: Delta((Term(projection(matrix), cores[adapted[module]], IDENTITY),), context.base.shape(module))
        for module, matrix in matrices.items()
    }
    basis = OWN if bases else PINNED if pinned else ASSUMED
    return ParsedWeights(deltas, sum(core.matrix.numel() for core in cores.values()), basis)


def _kinds(config: AdapterConfig) -> list[str]:
    """target_modules, in its order, which decides."""
    kinds = config.values.get("target_modules")
    if not isinstance(kinds, list):
        raise InvalidAdapter("target_modules is missing", field="target_modules")
    twice = [kind for kind, times in Counter(kinds).items() if times > 1]
    if twice:
        raise InvalidAdapter(f"target_modules names {shown(twice[0])} twice", field="target_modules")
    return kinds


def _members(kinds: list[str], modules: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Kind -> its layers, at least one each."""
    members: dict[str, list[str]] = {kind: [] for kind in kinds}
    for module in modules:
        kind = next((kind for kind in kinds if kind in module), None)
        if kind is not None:
            members[kind].append(module)
    empty = next((kind for kind, found in members.items() if not found), None)
    if empty is not None:
        message = (
            f"target_modules names {shown(empty)}, but that is part of no layer's name that an earlier entry is not"
        )
        raise InvalidAdapter(message, field="target_modules")
    return members


def _cores(
    kinds: list[str],
    tensors: Mapping[str, torch.Tensor],
    members: Mapping[str, list[str]],
    rank: int,
    context: ParserContext,
) -> dict[str, DenseCore]:
    """Kind -> M, one object for all its layers."""
    stray = next((name for name in sorted(tensors) if name not in members), None)
    if stray is not None:
        raise InvalidAdapter(f"{shown(stray)} has a tensor but is not in target_modules", field=shown(stray))
    cores = {}
    for kind in kinds:
        if kind not in tensors:
            message = f"target_modules names {shown(kind)}, which has no tensor"
            raise InvalidAdapter(message, field="target_modules")
        first, *others = members[kind]
        p = context.base.shape(first)[0]
        odd = next((module for module in others if context.base.shape(module)[0] != p), None)
        if odd is not None:
            message = f"{shown(kind)} is part of the names of {first} with {p} outputs and of {odd} with another number"
            raise InvalidAdapter(message, field=shown(kind))
        cores[kind] = DenseCore(Stored(shown(kind), tensors[kind]).floats((p, rank)))
    return cores


def _own(
    bases: Mapping[str, torch.Tensor], adapted: Mapping[str, str], rank: int, context: ParserContext
) -> dict[str, SharedMatrix]:
    """Module -> the P that the adapter brings, shared by its content."""
    stray = next((name for name in sorted(bases) if name.removeprefix(_BASIS) not in adapted), None)
    if stray is not None:
        raise InvalidAdapter(f"{shown(stray)} belongs to no layer that the adapter changes", field=shown(stray))
    matrices = {}
    for module in adapted:
        name = _BASIS + module
        if name not in bases:
            raise InvalidAdapter(f"{shown(name)} is missing, although other layers have theirs", field=shown(name))
        stored = Stored(shown(name), bases[name])
        rows = at_least(stored, (rank, context.base.shape(module)[1]), growing=(0,)).to(torch.float32)
        _check_orthonormal(stored.name, rows)
        matrices[module] = shared_matrix(rows, context.memo)
    return matrices


def _check_orthonormal(name: str, rows: torch.Tensor) -> None:
    n, q = rows.shape
    # More rows than columns cannot be, and would only cost the product.
    error = float((rows @ rows.T - torch.eye(n)).abs().max()) if n <= q else float("inf")
    if not error <= _ORTHONORMAL:
        raise InvalidAdapter(f"the rows of {name} are not orthonormal: they are off by {error:.3g}", field=name)


def _is_pinned(config: AdapterConfig, matrices: Mapping[str, SharedMatrix], rank: int) -> bool:
    """Whether the configuration says which P it means. Raises `BaseModelMismatch` if that is another."""
    wanted = config.text("basis_sha256")
    if not wanted:
        return False
    found = basis_digest({module: matrix.matrix for module, matrix in matrices.items()}, rank)
    if found != wanted:
        message = f"basis_sha256 is {wanted[:12]}..., but the singular vectors at hand have {found[:12]}..."
        raise BaseModelMismatch(message, field="basis_sha256", metadata={"wanted": wanted[:12], "found": found[:12]})
    return True


def _is_kinds(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and _is_kind(v) for v in value)


def _is_kind(entry: str) -> bool:
    return bool(entry) and not entry.startswith(_BASIS)


PICA = Family(
    name="pica",
    keys={
        "target_modules": Rule(_is_kinds, f'a list of text, not empty and not beginning with "{_BASIS}"'),
        "rank": POSITIVE,
        "basis_sha256": Rule(
            lambda v: v is None or (isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None),
            "64 lower-case hexadecimal digits or null",
        ),
        # Which layers are changed, only target_modules says.
        "exclude_modules": UNUSED,
        "layers_to_transform": UNUSED,
        "layers_pattern": UNUSED,
    },
    parse=_parse,
    checks_targets=False,
)
