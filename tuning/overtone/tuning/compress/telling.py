"""The report of a compression, from what was chosen and what was stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from overtone.adapters import AdapterFiles
from overtone.tuning.compress.choosing import Selection
from overtone.tuning.compress.config import DTYPES, Config
from overtone.tuning.compress.curve import Point, by_chance, curve_each, curve_over_all
from overtone.tuning.compress.folder import Coefficients, bytes_each, size_of
from overtone.tuning.compress.refit import Refitted
from overtone.tuning.compress.report import Activation, ModuleReport, Report, relative
from overtone.tuning.compress.source import Source
from overtone.tuning.compress.verdict import verdict


def report_of(
    config: Config,
    source: Source,
    chosen: Mapping[str, Selection],
    kept: Mapping[str, Coefficients],
    fitted: Mapping[str, Refitted],
    files: AdapterFiles,
) -> Report:
    errors = {module: _error(one, kept.get(module)) for module, one in chosen.items()}
    energy = sum(one.energy for one in chosen.values())
    share = sum(one.kept for one in chosen.values()) / energy
    counts = {module: one.values.numel() for module, one in chosen.items()}
    chance = by_chance(chosen, counts)
    return Report(
        source=source.kind,
        family=config.family,
        dtype=config.dtype,
        coefficients=sum(counts.values()),
        bytes_in=source.size_bytes,
        bytes_out=size_of(files),
        kept=share,
        random_kept=chance,
        relative_error=relative(sum(errors.values()), energy),
        verdict=verdict(share, chance),
        activation=_activation(fitted.values()),
        modules=tuple(_module(m, one, errors[m], fitted.get(m)) for m, one in chosen.items()),
        curve=_curve(config, chosen, size_of(files)),
        left_out=tuple(source.left_out),
        warnings=tuple(source.warnings),
    )


def _error(one: Selection, kept: Coefficients | None) -> float:
    """||delta_W - stored||_F^2, by Parseval."""
    if kept is None:
        return one.dropped
    return one.dropped + float((one.values - kept.values.to(torch.float64)).square().sum())


def _module(name: str, one: Selection, error: float, fitted: Refitted | None) -> ModuleReport:
    share = one.kept / one.energy
    chance = by_chance({name: one}, {name: one.values.numel()})
    return ModuleReport(
        name=name,
        shape=one.shape,
        coefficients=one.values.numel(),
        norm=one.energy**0.5,
        kept=share,
        random_kept=chance,
        relative_error=relative(error, one.energy),
        verdict=verdict(share, chance),
        activation=None if fitted is None else _activation([fitted]),
    )


def _activation(fitted: Iterable[Refitted]) -> Activation | None:
    """Over all that prompts reached."""
    reached = [one for one in fitted if one.energy > 0]
    if not reached:
        return None
    energy = sum(one.energy for one in reached)
    plain, after = sum(one.plain for one in reached), sum(one.fitted for one in reached)
    return Activation(relative(plain, energy), relative(after, energy), max(one.tokens for one in reached))


def _curve(config: Config, chosen: Mapping[str, Selection], size: int) -> tuple[Point, ...]:
    each = {module: bytes_each(one.shape, DTYPES[config.dtype]) for module, one in chosen.items()}
    overhead = size - sum(each[module] * one.values.numel() for module, one in chosen.items())
    return (curve_each if config.coefficients is not None else curve_over_all)(chosen, each, overhead)
