"""`tune`: from settings to an adapter folder that a server loads."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy
import torch
from transformers import set_seed

from overtone.errors import InvalidRequest
from overtone.models.base import load_checkpoint
from overtone.models.fingerprint import fingerprint_of
from overtone.models.support import context_tokens
from overtone.tuning.checkpoint import read_checkpoint
from overtone.tuning.conductor import Conductor
from overtone.tuning.config import TuneConfig
from overtone.tuning.data import Encoder, TuningData, prepare
from overtone.tuning.finishing import finish
from overtone.tuning.history import History
from overtone.tuning.progress import Progress
from overtone.tuning.provenance import settings_of
from overtone.tuning.result import TuneResult
from overtone.tuning.run_folder import RunFolder
from overtone.tuning.trainer import TuningTrainer


def tune(config: TuneConfig) -> TuneResult:
    """Tunes one adapter by AdamW on

        loss = sum over learned tokens of -log p(x_t | x_<t) / their number in the step  +  the method's penalty

    and leaves `config.out` with `adapter` (what a server loads), `run.json`, `history.jsonl` and, where matplotlib is
    installed, `loss.png`. Until it is done the folder is called `<out>.partial` and holds the last checkpoint. On the CPU
    a run that was killed and resumed gives the parameters of one that was not, to the last bit, with the same number of
    threads. The random state of the process is as before afterwards.

    Raises `InvalidRequest` with the field for data and settings that do not fit, `ConfigError` and `UnsupportedModel` for
    models that cannot be loaded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidRequest("tuning uses one process: start it without a distributed launcher", field="device")
    started = time.monotonic()
    folder = RunFolder(config.out)
    folder.check(resume=config.resume)
    with _random_state_kept():
        try:
            return _tuned(config, folder, started)
        finally:
            folder.close()


def _tuned(config: TuneConfig, folder: RunFolder, started: float) -> TuneResult:
    model, tokenizer = load_checkpoint(config.model, dtype=config.dtype, device=config.device, cache=config.model_cache)
    _check_model(config, model)
    base = fingerprint_of(model)
    data = prepare(config, _encoder(config, model, tokenizer), _pad(tokenizer))
    total_steps = _total_steps(config, data)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    settings = settings_of(config, data, base=base, dtype=dtype, total_steps=total_steps)
    resumed = folder.begin(settings, resume=config.resume)
    set_seed(config.seed)
    tuned = config.method.attach(model, seed=config.seed, total_steps=total_steps)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    trainer = TuningTrainer(config, model, tuned, total_steps=total_steps, folder=folder.path)
    history = History(folder.path)
    conductor = Conductor(trainer, data, history, folder)
    _begin(conductor, history, read_checkpoint(folder.path) if resumed else None)
    if not conductor.done:
        trainer.add_callback(conductor)
        with closing(Progress(conductor)) as progress:
            trainer.add_callback(progress)
            trainer.train()
    return finish(conductor, trainer, data, history, folder, settings, started)


def _begin(conductor: Conductor, history: History, saved: dict[str, Any] | None) -> None:
    if saved is None:
        history.cut(-1)
    else:
        conductor.resume(saved)


def _check_model(config: TuneConfig, model: Any) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise InvalidRequest("model: a quantised base is not tuned on: give its unquantised checkpoint", field="model")
    limit = context_tokens(model.config)
    if config.max_length > limit:
        raise InvalidRequest(
            f"max_length ({config.max_length}) is more than the model's context ({limit})", field="max_length"
        )


def _encoder(config: TuneConfig, model: Any, tokenizer: Any) -> Encoder:
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config):
        value = getattr(source, "eos_token_id", None)
        ends |= {value} if isinstance(value, int) else set(value or ())
    return Encoder(tokenizer, max_length=config.max_length, too_long=config.too_long, eos=frozenset(ends))


def _pad(tokenizer: Any) -> int:
    pad: int | None = tokenizer.pad_token_id
    end: int = tokenizer.eos_token_id
    return end if pad is None else pad


def _total_steps(config: TuneConfig, data: TuningData) -> int:
    if config.steps is not None:
        return config.steps
    assert data.steps_per_epoch is not None
    return max(1, math.ceil(config.passes * data.steps_per_epoch))


def _checkpoint_activations(model: Any) -> None:
    """By whichever name this version of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The Trainer seeds every generator of the process."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
