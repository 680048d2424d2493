"""A compression from end to end: read, choose, fit, write, tell."""

from __future__ import annotations

from collections.abc import Mapping

from overtone.adapters.bridges import check_target, write_folder
from overtone.adapters.files import CONFIG_FILES
from overtone.errors import InvalidRequest
from overtone.tuning.compress.adapter_source import AdapterSource
from overtone.tuning.compress.base import Base, base_of
from overtone.tuning.compress.budget import choose
from overtone.tuning.compress.calibrate import refit_all
from overtone.tuning.compress.choosing import OnModule, Selection
from overtone.tuning.compress.config import Config
from overtone.tuning.compress.folder import Coefficients, adapter_files, check, stored
from overtone.tuning.compress.model_source import ModelSource
from overtone.tuning.compress.plot import write_plot
from overtone.tuning.compress.refit import Refitted
from overtone.tuning.compress.report import Report, write_json
from overtone.tuning.compress.source import Source
from overtone.tuning.compress.telling import report_of


def compress(config: Config, on_module: OnModule = lambda stage, module: None) -> Report:
    """Writes `config.target`. Raises errors of `overtone.errors` that name the field or the module; then there is none."""
    check_target(config.target)
    base = base_of(config.model, config.model_cache)
    source = open_source(config, base)
    chosen = _with_energy(choose(config, source, on_module))
    fitted = refit_all(config, base, source, chosen, on_module) if config.refit is not None else {}
    kept = _stored(config, chosen, fitted)
    files = adapter_files(kept, config, source)
    check(files, base, kept)
    report = report_of(config, source, chosen, kept, fitted, files)
    if config.require_error is not None and report.relative_error > config.require_error:
        message = (
            f"the relative error is {report.relative_error:.3g}, more than {config.require_error:g}: nothing is written"
        )
        raise InvalidRequest(message, field="require_error", metadata={"relative_error": str(report.relative_error)})
    write_folder(config.target, files)
    if config.report is not None:
        write_json(report, config.report)
        write_plot(report, config.report.with_suffix(".png"))
    return report


def open_source(config: Config, base: Base) -> Source:
    """By what the folder has. Raises `InvalidRequest` if it is neither an adapter nor a model."""
    if not config.source.is_dir():
        raise InvalidRequest(f"{config.source} is not a folder", field="source")
    if any((config.source / name).exists() for name in CONFIG_FILES):
        return AdapterSource(config, base)
    if (config.source / "config.json").exists():
        return ModelSource(config, base)
    message = f"{config.source} has neither adapter_config.json nor the config.json of a model"
    raise InvalidRequest(message, field="source")


def _with_energy(chosen: Mapping[str, Selection]) -> dict[str, Selection]:
    """Without modules whose delta is zero. Raises `InvalidRequest` if nothing is left."""
    changed = {module: one for module, one in chosen.items() if one.energy > 0}
    if not changed:
        raise InvalidRequest("the source changes nothing: every delta is zero", field="source")
    return changed


def _stored(config: Config, chosen: Mapping[str, Selection], fitted: Mapping[str, Refitted]) -> dict[str, Coefficients]:
    """Of modules with any coefficients."""
    kept = {}
    for module, one in chosen.items():
        if one.values.numel():
            values = fitted[module].values if module in fitted else one.values
            kept[module] = stored(module, one.shape, values, one.places, config.dtype)
    return kept
