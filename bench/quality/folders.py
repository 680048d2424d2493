"""Adapter folders in a plain model, as a server that has parsed their files would merge them into its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from overtone.adapters import AdapterFiles, ParserContext, parse_adapter
from overtone.adapters.files import DOCUMENTATION, layout_of
from overtone.adapters.projectors import Projectors
from overtone.adapters.resident import make_resident
from overtone.kernels import FrameBank
from overtone.models.dense_deltas import DenseDeltas
from overtone.tuning.methods.attach import describe


def files_of(folder: Path) -> AdapterFiles:
    layout = layout_of({path.name for path in folder.iterdir()} - DOCUMENTATION)
    return AdapterFiles((folder / layout.config).read_bytes(), (folder / layout.weights).read_bytes(), layout)


def nbytes(folder: Path) -> int:
    """Of the two files that a server reads."""
    files = files_of(folder)
    return len(files.config) + len(files.weights)


@contextmanager
def merged(model: Any, folder: Path, projectors: Path) -> Iterator[None]:
    """The model with what the folder's files say, until the end of the block; then to the last bit as before.

    projectors: where PiCa's are kept, as `PicaMethod` has it.
    """
    base = describe(model)
    kept = Projectors(projectors / base.fingerprint[:16], base)
    parsed = parse_adapter(files_of(folder), ParserContext(base, projectors=kept))
    deltas = make_resident("", parsed.family, parsed.deltas).deltas
    weights = {name: model.get_submodule(name).weight for name in deltas}
    clean = {name: weight.detach().clone() for name, weight in weights.items()}
    dense = DenseDeltas(FrameBank(torch.device("cpu")))
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                dense.add_to(weight, deltas[name].terms)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(clean[name])
