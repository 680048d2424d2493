"""Samples for tuning: JSON lines, streamed, tokenised by the base's own tokenizer, shuffled, in padded batches."""

from overtone.tuning.data.collate import Step, collate
from overtone.tuning.data.encode import Encoder
from overtone.tuning.data.intake import Skipped, Tally
from overtone.tuning.data.prepare import TuningData, prepare
from overtone.tuning.data.stream import Position, StepStream
from overtone.tuning.data.types import IGNORED, Batch, Place, Sample

__all__ = [
    "IGNORED",
    "Batch",
    "Encoder",
    "Place",
    "Position",
    "Sample",
    "Skipped",
    "Step",
    "StepStream",
    "Tally",
    "TuningData",
    "collate",
    "prepare",
]
