"""What a compression is asked for, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from overtone.errors import InvalidRequest

Family = Literal["loca", "sdctft"]
Rest = Literal["error", "drop"]
Stored = Literal["float32", "bfloat16", "float16"]

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_BUDGETS = ("coefficients", "total", "bytes", "error")
_LEAST_RIDGE = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One compression: from `source`, an adapter's folder or that of a whole fine-tuned model, to the adapter `target`.

    model: the base, "demo", a folder, a GGUF file or a hub id; model_cache: where converted GGUF files are kept.

    Exactly one budget: coefficients a module; total of all modules, the largest wherever they are; bytes of the two files,
    shared out likewise; error: the fewest coefficients with ||delta_W - stored||_F <= error ||delta_W||_F over all modules
    together. bands: each third of a module's coefficients from its own band of frequencies (sDCTFT's low, middle, high).

    family, dtype: of the adapter that is written. targets: last components of names, or whole names, of the layers to keep;
    None: all. rest: what to do with changes that no layer kept can hold (norms, embeddings, layers outside `targets`).

    refit: a file of prompts (see `prompts`), by which the values are fitted to what the layers really see; ridge: how much
    they are drawn to the plain values, relative to the mean square of an input; max_prompt_tokens: what is read of one
    prompt; refit_memory_mib: what the inputs' second moments may take at a time.

    require_error: refuse a result whose relative error is larger. report: a JSON file to write, and a plot beside it.
    base_name: for base_model_name_or_path; None: as the source says, of a fine-tuned model `model`.

    Raises `InvalidRequest` with the field.
    """

    source: Path
    target: Path
    model: str = "demo"
    model_cache: Path = Path(".overtone/models")
    coefficients: int | None = None
    total: int | None = None
    bytes: int | None = None
    error: float | None = None
    bands: bool = False
    family: Family = "loca"
    dtype: Stored = "float32"
    targets: tuple[str, ...] | None = None
    rest: Rest = "error"
    refit: Path | None = None
    ridge: float = 1e-3
    max_prompt_tokens: int = 512
    refit_memory_mib: int = 1024
    require_error: float | None = None
    report: Path | None = None
    base_name: str | None = None

    def __post_init__(self) -> None:
        self._check_budget()
        self._check_choices()
        for name in ("max_prompt_tokens", "refit_memory_mib"):
            _check_count(name, getattr(self, name))
        if not (math.isfinite(self.ridge) and self.ridge >= _LEAST_RIDGE):
            raise InvalidRequest(
                f"ridge must be a number of at least {_LEAST_RIDGE:g}, not {self.ridge}", field="ridge"
            )
        if self.require_error is not None:
            _check_error("require_error", self.require_error)
        if self.targets is not None and not (self.targets and all(self.targets)):
            raise InvalidRequest("targets must name at least one layer, or be left out for all", field="targets")

    def _check_budget(self) -> None:
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            message = f"give one budget of coefficients, total, bytes and error; given: {found}"
            raise InvalidRequest(message, field=given[1] if given else "coefficients")
        if given == ["error"]:
            assert self.error is not None
            _check_error("error", self.error)
        else:
            _check_count(given[0], getattr(self, given[0]))
        if self.bands and self.coefficients is None:
            raise InvalidRequest("bands share out the coefficients of a module: give coefficients", field="bands")
        if self.refit is not None and self.error is not None:
            message = "refit changes the values, so that no error can be promised beforehand: give another budget"
            raise InvalidRequest(message, field="refit")

    def _check_choices(self) -> None:
        for name, kind in (("family", Family), ("dtype", Stored), ("rest", Rest)):
            if getattr(self, name) not in get_args(kind):
                listed = ", ".join(get_args(kind))
                raise InvalidRequest(f"{name} must be one of {listed}, not {getattr(self, name)!r}", field=name)


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise InvalidRequest(f"{name} must be a whole number of at least 1, not {value!r}", field=name)


def _check_error(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InvalidRequest(f"{name} must be a number between 0 and 1, not {value!r}", field=name)
