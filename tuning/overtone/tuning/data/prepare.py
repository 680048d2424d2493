"""The data of a run, made ready: checked and counted where that is possible, the evaluation set held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overtone.errors import InvalidRequest
from overtone.tuning.data.collate import collate
from overtone.tuning.data.encode import Encoder
from overtone.tuning.data.intake import Intake, Tally
from overtone.tuning.data.orders import Buffered, Index, Order, Permuted
from overtone.tuning.data.sources import FileSource, Source, held_out, source_of
from overtone.tuning.data.stream import Position, Shape, StepStream
from overtone.tuning.data.types import Batch, Sample

if TYPE_CHECKING:
    from overtone.tuning.config import TuneConfig

FULL_SHUFFLE_BYTES = 256 << 20
"""Up to here `shuffle="auto"` reads everything once before the first step and shuffles all of it."""


@dataclass(frozen=True, slots=True)
class TuningData:
    """samples: in one pass, None if they were not counted; evaluation: its batches, empty without an evaluation set."""

    order: Order
    intake: Intake
    shape: Shape
    rewindable: bool
    samples: int | None
    evaluation: Sequence[Batch]
    evaluation_tally: Tally
    identity: object

    @property
    def steps_per_epoch(self) -> int | None:
        return None if self.samples is None else self.shape.steps_per_epoch(self.samples)

    def stream(self, position: Position) -> StepStream:
        return StepStream(
            self.order,
            self.intake,
            self.shape,
            rewindable=self.rewindable,
            counted=self.samples is not None,
            position=position,
        )


def prepare(config: TuneConfig, encoder: Encoder, pad: int) -> TuningData:
    """Raises `InvalidRequest` with the field for data that cannot be used as the settings ask."""
    source = source_of(config.data, "data")
    intake = _intake(config, encoder, "data")
    order, samples = _order(config, source, intake)
    evaluation_intake = _intake(config, encoder, "data" if config.eval_data is None else "eval_data")
    evaluation = _evaluation(config, source, evaluation_intake)
    evaluation.sort(key=lambda sample: len(sample.input_ids))
    size = config.batch_size
    return TuningData(
        order=order,
        intake=intake,
        shape=Shape(size, config.accumulation, config.group_by_length, pad, config.seed),
        rewindable=source.rewindable,
        samples=samples,
        evaluation=[collate(evaluation[at : at + size], pad) for at in range(0, len(evaluation), size)],
        evaluation_tally=evaluation_intake.tally,
        identity=source.identity(),
    )


def _intake(config: TuneConfig, encoder: Encoder, field: str) -> Intake:
    return Intake(encoder, malformed=config.malformed, too_long=config.too_long, field=field)


def _order(config: TuneConfig, source: Source, intake: Intake) -> tuple[Order, int | None]:
    if _shuffles_all(config, source):
        assert isinstance(source, FileSource)
        index = Index()
        samples = _scan(config, source, intake, index)
        return Permuted(source, index, config.seed), samples
    size = 1 if config.shuffle == "none" else config.shuffle_buffer
    order = Buffered(source, size, config.seed, held_out(config.eval_fraction, config.seed))
    if config.steps is not None:
        return order, None
    if not source.rewindable:
        raise InvalidRequest("epochs needs data that can be read twice: give steps, or a file", field="epochs")
    return order, _scan(config, source, intake, None)


def _shuffles_all(config: TuneConfig, source: Source) -> bool:
    seekable = isinstance(source, FileSource) and source.rewindable
    if config.shuffle == "full" and not seekable:
        raise InvalidRequest("shuffle full needs files: an iterable or a pipe has shuffle buffer", field="shuffle")
    if config.shuffle == "auto" and isinstance(source, FileSource) and seekable:
        return source.size <= FULL_SHUFFLE_BYTES
    return config.shuffle == "full"


def _scan(config: TuneConfig, source: Source, intake: Intake, index: Index | None) -> int:
    """Looks at every line before the first step, so that a bad one does not end a run in its third hour."""
    is_held_out = held_out(config.eval_fraction, config.seed)
    for raw in source.lines():
        if not is_held_out(raw) and intake.take(raw, count=True) is not None and index is not None:
            index.add(raw)
    if not intake.tally.samples:
        raise InvalidRequest("data: there is no sample that can be learned from", field="data")
    return intake.tally.samples


def _evaluation(config: TuneConfig, source: Source, intake: Intake) -> list[Sample]:
    """The first `eval_samples` of the second file, or of the lines that are held out."""
    if config.eval_data is None and not config.eval_fraction:
        return []
    if config.eval_data is not None:
        lines = iter(source_of(config.eval_data, "eval_data").lines())
    elif source.rewindable:
        is_held_out = held_out(config.eval_fraction, config.seed)
        lines = (raw for raw in source.lines() if is_held_out(raw))
    else:
        raise InvalidRequest(
            "eval_fraction needs data that can be read twice: give eval_data, or a file", field="eval_fraction"
        )
    samples: list[Sample] = []
    for raw in lines:
        sample = intake.take(raw, count=True)
        if sample is not None:
            samples.append(sample)
        if len(samples) == config.eval_samples:
            break
    if not samples:
        field = "eval_fraction" if config.eval_data is None else "eval_data"
        raise InvalidRequest(f"{field}: there is no sample to evaluate on", field=field)
    return samples
