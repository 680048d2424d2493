"""The canonical form of an adapter: one safetensors file whose SHA-256 is the adapter's version.

For every module `<module>.rows` and `.cols` (n,) int32 and `.values` (n,) float32, sorted by (row, col), unique, every
scale folded in. What else must be known is JSON under one metadata key: with more than one, the order in which the writer
puts them would make equal adapters differ in their bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch

from overtone.adapters.base import BaseDescription
from overtone.adapters.families import ParsedAdapter
from overtone.adapters.safetensors_reader import Limits, SafetensorsFile, read_safetensors
from overtone.errors import BaseModelMismatch, InvalidAdapter
from overtone.kernels import Delta, FrameKind, SparseCore

FORMAT = 1
_METADATA_KEY = "overtone"
_LIMITS = Limits(header_bytes=32 << 20, tensors=100_000)
"""Wider than for uploads: a module takes three tensors here and two there, and these files are our own."""


@dataclass(frozen=True)
class StoredAdapter:
    """A decoded blob."""

    family: str
    deltas: Mapping[str, Delta]


def encode(adapter: ParsedAdapter) -> bytes:
    """The blob. Equal adapters give equal bytes, in any process."""
    tensors = {}
    for module, delta in adapter.deltas.items():
        tensors[f"{module}.rows"] = delta.core.rows
        tensors[f"{module}.cols"] = delta.core.cols
        tensors[f"{module}.values"] = delta.core.values
    modules = {
        name: {"shape": list(d.shape), "analysis": d.analysis.value, "synthesis": d.synthesis.value}
        for name, d in adapter.deltas.items()
    }
    facts = {
        "format": FORMAT,
        "family": adapter.family,
        "base_fingerprint": adapter.base_fingerprint,
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "parameter_count": adapter.parameter_count,
        "modules": modules,
    }
    return safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(facts, sort_keys=True, separators=(",", ":"))})


def digest_of(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def decode(blob: bytes, base: BaseDescription) -> StoredAdapter:
    """The adapter in a blob, checked anew: nothing read from disk reaches the kernels on trust.

    Raises `InvalidAdapter` if it is malformed and `BaseModelMismatch` if it does not fit `base`.
    """
    file = read_safetensors(blob, "the stored adapter", _LIMITS)
    try:
        facts = json.loads(file.metadata[_METADATA_KEY])
        if facts["format"] != FORMAT:
            raise InvalidAdapter(f"the stored adapter has format {facts['format']}, not {FORMAT}")
        if facts["base_fingerprint"] not in ("", base.fingerprint):
            raise BaseModelMismatch(
                "the stored adapter was checked against another base model than the one served; upload it again",
                field="base_fingerprint",
            )
        modules = facts["modules"]
        deltas = {name: _delta(file, name, modules[name], base) for name in sorted(modules)}
        family = str(facts["family"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidAdapter("the stored adapter lacks what its format demands") from error
    if len(file.tensors) != 3 * len(deltas):
        raise InvalidAdapter("the stored adapter has tensors that belong to no module")
    return StoredAdapter(family, deltas)


def _delta(file: SafetensorsFile, module: str, facts: Mapping[str, object], base: BaseDescription) -> Delta:
    shape = base.shape(module)
    if facts["shape"] != list(shape):
        message = f"{module} is {facts['shape']} in the stored adapter and {list(shape)} in the base model"
        raise BaseModelMismatch(message, field=module)
    rows, cols, values = (file.tensors[f"{module}.{part}"] for part in ("rows", "cols", "values"))
    core = SparseCore(rows, cols, values, shape)
    if not _sound(core):
        raise InvalidAdapter(f"the stored coefficients of {module} are malformed", field=module)
    return Delta(FrameKind(facts["analysis"]), core, FrameKind(facts["synthesis"]))


def _sound(core: SparseCore) -> bool:
    """Whether the promises of `SparseCore` hold."""
    (p, q), n = core.shape, core.values.numel()
    dtypes = (core.rows.dtype, core.cols.dtype, core.values.dtype)
    if dtypes != (torch.int32, torch.int32, torch.float32) or n == 0:
        return False
    if any(tuple(t.shape) != (n,) for t in (core.rows, core.cols, core.values)):
        return False
    flat = core.rows.to(torch.int64) * q + core.cols
    return (
        bool(((core.rows >= 0) & (core.rows < p) & (core.cols >= 0) & (core.cols < q)).all())
        and bool((flat[1:] > flat[:-1]).all())
        and bool(core.values.isfinite().all())
    )
