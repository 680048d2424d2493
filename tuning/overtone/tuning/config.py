"""Every setting of one tuning run, checked once. The command's options are made from these fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from overtone.tuning.config_checks import check_data, check_run, check_value

if TYPE_CHECKING:
    from overtone.tuning.methods.types import Method

LEARNING_RATES = {
    "loca": 5e-3,
    "sdctft": 5e-3,
    "dcft": 1e-3,
    "pica": 1e-3,
    "lora": 2e-4,
    "fourierft": 5e-2,
}
"""Where `lr` is not given (docs/tuning.md says where they come from)."""


def _about(help: str, *, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    return {"help": help, "least": least, "most": most}


@dataclass(frozen=True)
class TuneConfig:
    """How one adapter is tuned. A wrong value raises InvalidRequest with the field's name.

    data, eval_data: a JSONL file, several, or (not from the command line) an iterable of mappings or lines; method: what
    is tuned, with its budget; out: the folder that the run becomes when it is done, which must not exist yet.
    """

    data: str | Path | Sequence[str | Path] | Iterable[Any]
    method: Method
    out: Path
    model: str = field(
        default="demo", metadata=_about("Base model: 'demo' (the built-in one), a hub id, a folder or a GGUF file.")
    )
    eval_data: str | Path | Sequence[str | Path] | Iterable[Any] | None = None
    eval_fraction: float = field(
        default=0.0, metadata=_about("Share of the lines that is held out and evaluated on.", least=0, most=0.9)
    )
    eval_samples: int = field(
        default=256, metadata=_about("The most samples that are evaluated on; they stay in memory.", least=1)
    )
    epochs: float | None = field(default=None, metadata=_about("Passes over the data (1 if there are no steps)."))
    steps: int | None = field(default=None, metadata=_about("Optimiser steps, instead of epochs.", least=1))
    batch_size: int = field(default=8, metadata=_about("Samples that are computed together.", least=1))
    accumulation: int = field(default=1, metadata=_about("Batches in one optimiser step.", least=1))
    lr: float | None = field(default=None, metadata=_about("Learning rate; unset: the method's own."))
    schedule: Literal["constant", "linear", "cosine"] = field(
        default="linear", metadata=_about("How the learning rate falls.")
    )
    warmup: float = field(
        default=0.06, metadata=_about("Steps over which it rises first; below 1 a share of all.", least=0)
    )
    weight_decay: float = field(default=0.0, metadata=_about("AdamW's, where the method has none of its own.", least=0))
    max_grad_norm: float = field(
        default=1.0, metadata=_about("Gradients are scaled down to this norm; 0: never.", least=0)
    )
    max_length: int = field(default=512, metadata=_about("The most tokens of a sample.", least=2))
    too_long: Literal["error", "skip", "truncate"] = field(
        default="error", metadata=_about("What becomes of a longer sample.")
    )
    malformed: Literal["error", "skip"] = field(
        default="error", metadata=_about("What becomes of a line that is no sample.")
    )
    shuffle: Literal["auto", "full", "buffer", "none"] = field(
        default="auto", metadata=_about("All lines, those in a buffer, or none; auto: all of up to 256 MiB.")
    )
    shuffle_buffer: int = field(default=10_000, metadata=_about("Lines in the buffer.", least=2))
    group_by_length: bool = field(
        default=False, metadata=_about("Make batches of samples of like length: less padding.")
    )
    seed: int = field(default=0, metadata=_about("Of the order, the method and dropout.", least=0, most=2**32 - 1))
    eval_every: int | None = field(
        default=None, metadata=_about("Steps between evaluations; unset: ten in the run.", least=1)
    )
    patience: int | None = field(
        default=None,
        metadata=_about("Stop after this many evaluations without a better loss, and keep the best.", least=1),
    )
    save_every: int = field(default=50, metadata=_about("Steps between checkpoints; 0: none.", least=0))
    resume: bool = field(default=False, metadata=_about("Go on with the interrupted run, if there is one."))
    nonfinite: Literal["error", "skip"] = field(
        default="error", metadata=_about("What becomes of a step whose loss or gradient is NaN or infinite.")
    )
    nonfinite_limit: int = field(default=10, metadata=_about("The most steps that are skipped so.", least=0))
    gradient_checkpointing: bool = field(
        default=False, metadata=_about("Compute activations twice instead of keeping them.")
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata=_about("Numbers of the base; the adapter is tuned in float32.")
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=_about("Where to compute."))
    model_cache: Path = field(
        default=Path(".overtone/models"), metadata=_about("Folder that keeps converted GGUF models.")
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(TuneConfig, localns={"Method": Any})
        for setting in settings():
            check_value(setting, hints[setting.name], getattr(self, setting.name))
        object.__setattr__(self, "out", Path(self.out))
        check_run(self)
        check_data(self)

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES.get(self.method.name, 1e-3) if self.lr is None else self.lr

    @property
    def passes(self) -> float:
        """Epochs; of no meaning where `steps` is set."""
        return 1.0 if self.epochs is None else self.epochs


def settings() -> list[Field[Any]]:
    """The fields with a plain value, which the command line has options for."""
    return [item for item in fields(TuneConfig) if item.default is not MISSING and item.metadata]
