"""One process's model, and what is done with it: learned, saved, loaded again from the files, scored."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench.quality.arms import Arm, Rate
from bench.quality.folders import merged, nbytes
from bench.quality.score import loss, score
from bench.quality.tasks import Sample, Sizes, Task, split
from bench.quality.tokens import encode
from bench.quality.train import Pace, learn

from overtone.models.base import model_source

Row = dict[str, Any]
_SHOTS = 8


@dataclass(frozen=True)
class Setting:
    """model: as a server is given it; cache: of converted models; work: keeps projectors and trained LoRAs."""

    model: str = "demo"
    cache: Path = Path(".overtone/models")
    work: Path = Path(".overtone/quality")
    sizes: Sizes = field(default_factory=Sizes)
    pace: Pace = field(default_factory=Pace)

    def key(self) -> Row:
        """What a row is of, so that rows of another setting are not taken for done."""
        sizes = self.sizes
        about = {"model": self.model, "steps": self.pace.steps, "batch": self.pace.batch}
        return {**about, "train": sizes.train, "validation": sizes.validation, "test": sizes.test}


class Workbench:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._splits: dict[str, dict[str, list[Sample]]] = {}

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._source)

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model = AutoModelForCausalLM.from_pretrained(self._source, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def samples(self, task: Task, part: str) -> list[Sample]:
        if task.name not in self._splits:
            self._splits[task.name] = split(task, self.setting.sizes)
        return self._splits[task.name][part]

    def base(self, task: Task, shots: int) -> Row:
        """The base alone, with the first `shots` samples of the training part in front of every prompt."""
        examples = "".join(f"{one.prompt} {one.answers[0]}\n" for one in self.samples(task, "train")[:shots])
        asked = [Sample(examples + one.prompt, one.answers) for one in self.samples(task, "test")]
        return _scored(score(self.model, self.tokenizer, task, asked))

    def learned(self, task: Task, arm: Arm, rate: Rate, seed: int, folder: Path | None) -> Row:
        """Learns from the training part; `validation_loss` of the adapter as it is in memory. folder: to save it to."""
        pace, work = self.setting.pace, self.setting.work
        tuned = arm.make(rate, seed, work / "projectors").attach(self.model, seed=seed, total_steps=pace.steps)
        train, validation = (encode(task, self.samples(task, part), self.tokenizer) for part in ("train", "validation"))
        try:
            started, busy = time.perf_counter(), time.process_time()
            train_loss = learn(self.model, tuned, train, pace, lr=rate.lr, seed=seed)
            seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
            validation_loss = loss(self.model, validation)
            parameters = tuned.trainable_parameters
            if folder is not None:
                tuned.save(folder, self.setting.model)
        finally:
            tuned.detach()  # type: ignore[attr-defined]
        times = {name: round(value, 1) for name, value in seconds.items()}
        losses = {"train_loss": train_loss, "validation_loss": validation_loss}
        return {"trainable_parameters": parameters, **losses, **times}

    def score_of(self, task: Task, folder: Path) -> Row:
        """Of an adapter's files on the test part."""
        with merged(self.model, folder, self.setting.work / "projectors"):
            found = score(self.model, self.tokenizer, task, self.samples(task, "test"))
        return {"bytes": nbytes(folder), **_scored(found)}

    @cached_property
    def _source(self) -> str:
        return model_source(self.setting.model, self.setting.cache)


def _scored(found: Any) -> Row:
    return {"score": found.score, "exact": found.exact, "test_loss": found.loss}
