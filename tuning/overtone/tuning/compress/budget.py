"""From the budget that was asked for to the coefficients that it buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from overtone.errors import InvalidRequest
from overtone.tuning.compress.choosing import (
    OnModule,
    Selection,
    choose_banded,
    choose_each,
    choose_over_all,
    fewest_for_error,
    wanted_for_error,
)
from overtone.tuning.compress.config import DTYPES, Config
from overtone.tuning.compress.folder import bytes_each, size_with
from overtone.tuning.compress.histogram import Histogram
from overtone.tuning.compress.picking import Picked
from overtone.tuning.compress.source import Source

MOST = 1 << 26
"""Coefficients that are chosen among all modules at a time: in memory they take some hundred bytes each."""


def choose(config: Config, source: Source, on_module: OnModule) -> dict[str, Selection]:
    """Raises `InvalidRequest` for bytes or an error that no number of coefficients meets."""
    dtype = DTYPES[config.dtype]
    if config.coefficients is not None:
        choose_all = choose_banded if config.bands else choose_each
        return choose_all(source, config.coefficients, on_module)
    if config.error is not None:
        wanted = partial(_bounded, "error", partial(wanted_for_error, error=config.error, dtype=dtype))
        return choose_over_all(source, wanted, partial(fewest_for_error, error=config.error, dtype=dtype), on_module)
    most = config.total
    if config.bytes is not None:
        most = config.bytes // min(bytes_each(shape, dtype) for shape in source.shapes.values())
    assert most is not None
    field, cut = ("total", _all) if config.bytes is None else ("bytes", partial(_fitting, config, source))
    return choose_over_all(source, partial(_bounded, field, partial(_at_most, most)), cut, on_module)


def _at_most(n: int, histograms: Mapping[str, Histogram]) -> int:
    return min(n, sum(one.count for one in histograms.values()))


def _bounded(field: str, wanted: Callable[[Mapping[str, Histogram]], int], histograms: Mapping[str, Histogram]) -> int:
    n = wanted(histograms)
    if n > MOST:
        message = f"this {field} takes about {n} coefficients, more than the {MOST} that are chosen at a time"
        raise InvalidRequest(message, field=field, metadata={"coefficients": str(n)})
    return n


def _all(picked: Picked) -> int:
    return picked.values.numel()


def _fitting(config: Config, source: Source, picked: Picked) -> int:
    """The most of the largest coefficients whose files have at most `config.bytes`."""
    assert config.bytes is not None
    groups, modules = picked.groups, list(source.shapes)

    def size(n: int) -> int:
        counts = torch.bincount(groups[:n], minlength=len(modules)).tolist()
        return size_with(dict(zip(modules, counts, strict=True)), config, source)

    fits, too_many = 0, picked.values.numel() + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if size(middle) <= config.bytes:
            fits = middle
        else:
            too_many = middle
    if fits == 0 and picked.values.numel():
        message = f"one coefficient takes {size(1)} bytes with its configuration, more than the {config.bytes} allowed"
        raise InvalidRequest(message, field="bytes")
    return fits
