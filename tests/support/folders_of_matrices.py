"""Random valid folders of the families whose adapters are matrices: LoRA, VB-LoRA, DCFT, VeRA, RandLoRA, PiCa."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from support.folders import EMBEDDING, FLOATS, INTEGERS, NAMES, Draws, Folder, Shape
from support.oracle_folder import basis_digest
from support.oracle_random import randlora_pair
from support.oracle_tensors import PREFIX, matching

_Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def lora(draw: _Draw) -> Folder:
    d = Draws(draw)
    modules = d.modules((*NAMES, EMBEDDING))
    shapes = {name: (d.size(), d.size()) for name in modules}
    ranks, alphas = d.patterns(modules, lambda: d.integer(1, 30)), d.patterns(modules, d.number)
    config = {"peft_type": "LORA", "rank_pattern": ranks, "alpha_pattern": alphas}
    config |= {"r": d.integer(1, 30)} if d.flag() else {}
    config |= {"lora_alpha": d.number()} if d.flag() else {}
    config |= {"use_rslora": d.flag()} if d.flag() else {}
    dora = d.flag()
    config |= {"use_dora": True} if dora else {}
    tensors = {}
    for name, (p, q) in shapes.items():
        rank = matching(ranks, name, config.get("r", 8))
        down, up = ("lora_embedding_A", "lora_embedding_B") if name == EMBEDDING else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{name}.{down}": d.floats(rank, q), f"{name}.{up}": d.floats(p, rank)}
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = d.floats(p)
    folder = d.folder(
        {n: s for n, s in shapes.items() if n != EMBEDDING}, config, tensors, embedding=shapes.get(EMBEDDING)
    )
    return _with_base_copies(d, folder, modules)


def _with_base_copies(d: Draws, folder: Folder, modules: Sequence[str]) -> Folder:
    """PEFT saves frozen weights beside adapted heads and embeddings."""
    copies = {}
    for name in modules:
        if name in (EMBEDDING, "lm_head") and d.flag():
            weight = folder.embeddings[name].T if name == EMBEDDING else folder.linears[name]
            copies[f"{PREFIX}{name}.base_layer.weight"] = weight.to(d.one_of(weight.dtype, torch.float32))
    return Folder(folder.linears, folder.embeddings, folder.config, {**folder.tensors, **copies})


@st.composite
def vblora(draw: _Draw) -> Folder:
    d = Draws(draw)
    length, r, h = d.integer(1, 8), d.integer(1, 5), d.integer(1, 12)
    k = d.integer(1, h)
    compact = d.flag()
    shapes = {name: (d.size(length), d.size(length)) for name in d.modules()}
    tensors = {"base_model.vblora_vector_bank": d.floats(h, length)}
    for name, (p, q) in shapes.items():
        for side, grid in (("A", (r, q // length)), ("B", (p // length, r))):
            full = f"{name}.vblora_logits_{side}"
            if compact:
                chosen = torch.argsort(d.uniform(*grid, h), -1)[..., :k].to(d.one_of(*INTEGERS))
                # Away from a sum of 1, where rounding decides whether the last one is negative.
                weights = torch.softmax(d.normal(*grid, k), -1)[..., :-1] * 0.9
                tensors |= {f"{full}_topk_indices": chosen, f"{full}_topk_weights": weights.to(d.one_of(*FLOATS))}
            else:
                tensors[full] = d.floats(*grid, h)
                if d.flag():
                    tensors[full][..., 1:].masked_fill_(d.uniform(*grid, h - 1) < 0.5, -math.inf)
    config = {"peft_type": "VBLORA", "r": r, "num_vectors": h, "vector_length": length, "topk": k}
    return d.folder(shapes, {**config, "save_only_topk_weights": compact}, tensors)


@st.composite
def dcft(draw: _Draw) -> Folder:
    d = Draws(draw)
    sizes = {name: d.one_of(1, 2, 3, 4, 8, 12) for name in d.modules()}
    shapes = {name: (d.size(size), d.size(size)) for name, size in sizes.items()}
    config = {"peft_type": "DCFT", "lora_r": d.integer(1, 8), "lora_alpha": d.number()}
    rank = d.integer(1, 4) if d.flag() else None
    config |= {"rank": rank} if rank or d.flag() else {}
    if len(set(sizes.values())) == 1 and d.flag():
        config["kernel_size"] = next(iter(sizes.values()))
    tensors = {}
    for name, (p, q) in shapes.items():
        size, inner = sizes[name], rank or d.integer(1, 4)
        kernel = d.floats(*d.one_of((size, size), (1, 1, size, size)))
        parts = {"lora_A": d.floats(inner, q // size), "lora_B": d.floats(p // size, inner), "lora_C": kernel}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return d.folder(shapes, config, tensors)


@st.composite
def vera(draw: _Draw) -> Folder:
    d = Draws(draw)
    shapes = {name: (d.size(), d.size()) for name in d.modules()}
    r = d.integer(1, 40)
    config = {"peft_type": "VERA", "r": r, **_projection(d)}
    tensors = {}
    for name, (p, _) in shapes.items():
        tensors |= {f"{name}.vera_lambda_b": d.floats(p), f"{name}.vera_lambda_d": d.floats(r)}
    if config.get("save_projection", True):
        p, q = (max(shape[side] for shape in shapes.values()) + d.integer(0, 2) for side in (0, 1))
        tensors |= {"base_model.vera_A": d.floats(r, q), "base_model.vera_B": d.floats(p, r)}
    return d.folder(shapes, config, tensors)


def _projection(d: Draws) -> dict[str, Any]:
    config: dict[str, Any] = {"save_projection": d.flag()} if d.flag() else {}
    return config | ({"projection_prng_key": d.seed()} if d.flag() else {})


@st.composite
def randlora(draw: _Draw) -> Folder:
    d = Draws(draw)
    shapes = {name: (d.size(), d.size()) for name in d.modules()}
    r = d.integer(1, 40)
    config = {"peft_type": "RANDLORA", "r": r, **_projection(d)}
    config |= {key: d.flag() for key in ("sparse", "very_sparse") if d.flag()}
    config |= {"randlora_alpha": d.number()} if d.flag() else {}
    tensors = {}
    for name, shape in shapes.items():
        bases = -(-min(shape) // r)
        tensors[f"{name}.randlora_lambda"] = d.floats(r, bases)
        tensors[f"{name}.randlora_gamma"] = d.floats(bases, min(shape))
    if config.get("save_projection", True):
        small, large = (max(f(shape) for shape in shapes.values()) + d.integer(0, 2) for f in (min, max))
        pair = {"randlora_A": d.floats(r, 1, small), "randlora_B": d.floats(large, -(-small // r), r)}
        tensors |= {f"base_model.{part}": matrix for part, matrix in pair.items()}
        tensors |= {f"{name}.{part}": matrix for name in shapes for part, matrix in pair.items() if d.flag()}
    folder = d.folder(shapes, config, tensors)
    if not config.get("save_projection", True):
        assume(all(bool(m.isfinite().all()) for m in randlora_pair(config, list(shapes), folder.linears)))
    return folder


@st.composite
def pica(draw: _Draw) -> Folder:
    """Of its own layout, with P in the file, pinned by its digest, or left to the server."""
    d = Draws(draw)
    names = d.modules()
    kinds = d.draw(
        st.lists(
            st.sampled_from([*names, "q_proj", "proj", "self_attn", "layers.1", "mlp", "head"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    # Of each layer, also of those that will be left alone, the first kind that is in its name.
    of = {name: next((kind for kind in kinds if kind in name), None) for name in names}
    kinds = [kind for kind in kinds if kind in of.values()]
    assume(kinds)
    outputs = {kind: d.size() for kind in kinds}
    shapes = {name: (d.size() if kind is None else outputs[kind], d.size()) for name, kind in of.items()}
    adapted = {name: shapes[name] for name, kind in of.items() if kind is not None}
    linears = d.weights(shapes)
    own = d.flag()
    rank = d.integer(1, min(q if own else min(p, q) for p, q in adapted.values()))
    tensors = {kind: d.floats(p, rank) for kind, p in outputs.items()}
    bases = _own_bases(d, adapted, rank) if own else _base_svd(linears, adapted)
    config = {"target_modules": kinds, "rank": rank, **({"peft_type": "PICA"} if d.flag() else {})}
    if d.flag():
        config["basis_sha256"] = basis_digest({n: b[:rank].float().contiguous() for n, b in bases.items()})
    tensors |= {f"basis.{name}": basis for name, basis in bases.items()} if own else {}
    return Folder(linears, {}, config, tensors, pica=True)


def _own_bases(d: Draws, adapted: Mapping[str, Shape], rank: int) -> dict[str, torch.Tensor]:
    """Orthonormal rows, `rank` of them or more."""
    bases = {}
    for name, (_, q) in adapted.items():
        basis = torch.linalg.qr(d.normal(q, d.integer(rank, q)))[0].T
        bases[name] = basis.to(d.one_of(torch.float16, torch.float32, torch.float64)).contiguous()
    return bases


def _base_svd(linears: Mapping[str, torch.Tensor], adapted: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    return {name: torch.linalg.svd(linears[name].float(), full_matrices=False)[2] for name in adapted}
