"""The end of a run: the adapter that is kept, the record, the plot, and the folder's own name."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from overtone.errors import InvalidRequest
from overtone.tuning.conductor import Conductor
from overtone.tuning.data import TuningData
from overtone.tuning.history import PLOT, History, plot_losses
from overtone.tuning.provenance import versions
from overtone.tuning.result import TuneResult
from overtone.tuning.run_folder import ADAPTER, RunFolder
from overtone.tuning.trainer import TuningTrainer

_LAST_STEPS = 20


def finish(
    conductor: Conductor,
    trainer: TuningTrainer,
    data: TuningData,
    history: History,
    folder: RunFolder,
    settings: Mapping[str, Any],
    started: float,
) -> TuneResult:
    """Raises `InvalidRequest` (field lr) rather than keep an adapter with a number in it that is not finite."""
    config = trainer.config
    keeps_best = config.patience is not None and conductor.best is not None
    if keeps_best and conductor.best is not None:
        trainer.tuned.restore(conductor.best["state"])
    bad = [
        name
        for name, value in trainer.tuned.state().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise InvalidRequest(f"{bad[0]} is not finite after the last step: lower the lr", field="lr")
    folder.clear_adapter()
    trainer.tuned.save(folder.adapter, config.model)
    plot_losses(history.rows(), folder.path / PLOT)
    result = _result(conductor, trainer, data, history, folder, keeps_best)
    result = replace(result, seconds=round(time.monotonic() - started, 1))
    folder.finish(_record(result, data, settings))
    return result


def _result(
    conductor: Conductor,
    trainer: TuningTrainer,
    data: TuningData,
    history: History,
    folder: RunFolder,
    keeps_best: bool,
) -> TuneResult:
    losses = [row["loss"] for row in history.rows() if row.get("loss") is not None][-_LAST_STEPS:]
    best = conductor.best
    return TuneResult(
        folder=folder.out,
        adapter=folder.out / ADAPTER,
        adapter_bytes=sum(each.stat().st_size for each in folder.adapter.rglob("*") if each.is_file()),
        trainable_parameters=trainer.tuned.trainable_parameters,
        steps=conductor.step,
        total_steps=conductor.total_steps,
        stopped_early=conductor.stopped and conductor.step < conductor.total_steps,
        train_loss=sum(losses) / len(losses) if losses else math.nan,
        eval_loss=best["loss"] if keeps_best and best is not None else conductor.last,
        eval_loss_before=conductor.before,
        best_step=None if best is None else best["step"],
        samples=data.samples,
        truncated=data.intake.tally.truncated,
        nonfinite_steps=trainer.skipped,
        seconds=0.0,
        skipped={str(reason): each for reason, each in data.intake.tally.skipped.items()},
    )


def _record(result: TuneResult, data: TuningData, settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = asdict(result)
    del plain["folder"], plain["adapter"]
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()
    }
    return {
        **finite,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": data.intake.tally.state(),
        "evaluation": data.evaluation_tally.state(),
        "versions": versions(),
        "settings": dict(settings),
    }
