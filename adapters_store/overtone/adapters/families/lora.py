"""LoRA, rsLoRA and DoRA as PEFT 0.21.2 saves them (arXiv 2106.09685, 2312.03732, 2402.09353).

    delta_W = s B A                              s = alpha / r, with use_rslora alpha / sqrt(r)

A linear layer has `<module>.lora_A.weight` (r, q): A, and `<module>.lora_B.weight` (p, r): B. An embedding is a linear layer
whose inputs are one-hot, p its width and q its vocabulary, and has `lora_embedding_A` (r, q) and `lora_embedding_B` (p, r).
With use_dora both have `lora_magnitude_vector` (p,): m, and the whole weight becomes, the row norms taken in float64,

    W' = diag(g) (W + s B A)                     g = m / (norms of the rows of W + s B A)
    delta_W = diag(g - 1) W + diag(g) s B A

where W x is without the layer's bias, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.families.config import (
    COUNT,
    FLAG,
    FRACTION,
    NOT_TRUE,
    NUMBER,
    POSITIVE,
    TEXT,
    UNUSED,
    AdapterConfig,
    Rule,
    is_number,
)
from overtone.adapters.families.patterns import COUNT_PATTERN, Patterns
from overtone.adapters.families.tensors import PREFIX, Stored, by_module, check_finite
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter, UnsupportedAdapter
from overtone.kernels import IDENTITY, WEIGHT, Delta, DiagonalCore, LowRankCore, Term

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
_PEFT_RANK, _PEFT_ALPHA = 8, 8
_CHUNK = 1 << 22
"""How many numbers of a weight are held in float64 at a time."""

_KEPT_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model alone. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ replace its weights."""


def _is_harmless_init(value: object) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _KEPT_BASE)


def _is_number_map(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(is_number(v) for v in value.values()))


# PEFT takes even an empty object as a request for these.
_NULL = Rule(lambda v: v is None, "null", UnsupportedAdapter)
_OBJECT = Rule(lambda v: v is None or isinstance(v, dict), "an object or null")


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    scales = _Scales(config)
    deltas, count = {}, 0
    for module, parts in by_module(tensors, (), (*_LINEAR, *_EMBEDDING, _MAGNITUDE)).items():
        shape = context.base.shape_of_any(module)
        _check_parts(module, parts, module in context.base.embeddings, config.flag("use_dora"))
        core = _core(scales, module, parts, shape)
        terms: tuple[Term, ...] = (Term(IDENTITY, core, IDENTITY),)
        if config.flag("use_dora"):
            terms = _dora_terms(core, parts[_MAGNITUDE], context.base, module)
        deltas[module] = Delta(terms, shape)
        count += sum(part.tensor.numel() for part in parts.values())
    return ParsedWeights(deltas, count)


def _check_parts(module: str, parts: Mapping[str, Stored], embedding: bool, dora: bool) -> None:
    """Raises `InvalidAdapter` for a tensor that this kind of layer does not have, and for one that it lacks."""
    required = (*(_EMBEDDING if embedding else _LINEAR), *((_MAGNITUDE,) if dora else ()))
    for part, stored in parts.items():
        if part not in required:
            layer = "an embedding" if embedding else "a linear layer"
            why = "use_dora is not true" if part == _MAGNITUDE else f"{shown(module)} is {layer} of the base model"
            raise InvalidAdapter(f"{stored.name} has no use: {why}", field=stored.name)
    for part in required:
        if part not in parts:
            beside = next(iter(parts.values())).name
            raise InvalidAdapter(f"{beside} has no {shown(PREFIX + module)}.{part} beside it", field=beside)


class _Scales:
    """Rank and scale of each module, as the configuration has them."""

    def __init__(self, config: AdapterConfig) -> None:
        self._rank, self._alpha = config.count("r") or _PEFT_RANK, config.number("lora_alpha", _PEFT_ALPHA)
        self._ranks = Patterns[int](_map(config, "rank_pattern"), "rank_pattern")
        self._alphas = Patterns[float](_map(config, "alpha_pattern"), "alpha_pattern")
        self._stabilised = config.flag("use_rslora")

    def rank(self, module: str) -> int:
        """r; no tensor has been compared with it yet."""
        found = self._ranks.get(module)
        return self._rank if found is None else found

    def scale(self, module: str, rank: int) -> float:
        """alpha / r or alpha / sqrt(r)."""
        found = self._alphas.get(module)
        alpha = self._alpha if found is None else float(found)
        return alpha / (math.sqrt(rank) if self._stabilised else rank)


def _core(scales: _Scales, module: str, parts: Mapping[str, Stored], shape: tuple[int, int]) -> LowRankCore:
    """s B A, A and B as stored."""
    p, q = shape
    down, up = (parts[name] for name in (_EMBEDDING if _EMBEDDING[0] in parts else _LINEAR))
    rank = scales.rank(module)
    a, b = down.floats((rank, q)), up.floats((p, rank))
    scale = scales.scale(module, rank)
    check_finite(up.name, b.to(torch.float32) * scale, f"once scaled by {scale:g}")
    return LowRankCore(a, b, scale)


def _map(config: AdapterConfig, key: str) -> Mapping[str, Any]:
    value = config.values.get(key, {})
    assert isinstance(value, dict)
    return value


def _dora_terms(core: LowRankCore, magnitude: Stored, base: BaseDescription, module: str) -> tuple[Term, Term]:
    """diag(g - 1) W and diag(g) s B A."""
    wanted = magnitude.floats(core.shape[:1]).to(torch.float64)
    norms = _row_norms(base.weight(module), core)
    if bool((norms == 0).any()):
        row = int((norms == 0).nonzero()[0])
        message = f"{magnitude.name}[{row}] scales a row of the adapted weight that is zero, which has no direction"
        raise InvalidAdapter(message, field=magnitude.name)
    gain = wanted / norms
    check_finite(magnitude.name, gain.to(torch.float32), "once divided by the norms of the adapted weight's rows")
    change = DiagonalCore((gain - 1).to(torch.float32))
    return Term(WEIGHT, change, IDENTITY), Term(IDENTITY, core, IDENTITY, gain.to(torch.float32))


def _row_norms(weight: torch.Tensor, core: LowRankCore) -> torch.Tensor:
    """The norms of the rows of W + K. weight: (p, q) floating point, on any device; returns (p,) float64 on the CPU."""
    a, b = core.a.to(torch.float64), core.b.to(torch.float64) * core.scale
    rows = max(1, _CHUNK // weight.shape[1])
    chunks = zip(torch.split(weight, rows), torch.split(b, rows), strict=True)
    norms = [torch.linalg.vector_norm(w.to("cpu", torch.float64) + part @ a, dim=1) for w, part in chunks]
    return torch.cat(norms)


LORA = Family(
    name="lora",
    keys={
        "r": POSITIVE,
        "lora_alpha": NUMBER,
        "rank_pattern": COUNT_PATTERN,
        "alpha_pattern": Rule(_is_number_map, "a map of module names to finite numbers, or null"),
        "use_rslora": FLAG,
        "use_dora": FLAG,
        # Training only.
        "lora_dropout": FRACTION,
        "init_lora_weights": Rule(
            _is_harmless_init, "true, false or one of " + ", ".join(_KEPT_BASE), UnsupportedAdapter
        ),
        "eva_config": _OBJECT,
        # PEFT leaves these two behind when it converts an adapter back to the base model as it was.
        "corda_config": _OBJECT,
        "lora_ga_config": _OBJECT,
        # A guide of PEFT's resets init_lora_weights after LoftQ, so only this tells that the base model is another one.
        "loftq_config": UNUSED,
        # Of no effect without the key that each of them serves.
        "qalora_group_size": COUNT,
        "megatron_core": TEXT,
        # Other forward passes, other layers or other weights of the base model.
        "lora_bias": NOT_TRUE,
        "use_qalora": NOT_TRUE,
        "ensure_weight_tying": NOT_TRUE,
        "use_bdlora": _NULL,
        "arrow_config": _NULL,
        "kasa_config": _NULL,
        "velora_config": _NULL,
        "monteclora_config": _NULL,
        "megatron_config": _NULL,
        "alora_invocation_tokens": UNUSED,
        "layer_replication": UNUSED,
        "target_parameters": UNUSED,
        "trainable_token_indices": UNUSED,
    },
    parse=_parse,
)
