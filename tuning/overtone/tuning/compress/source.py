"""What is compressed, whatever it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from overtone.errors import InvalidRequest
from overtone.tuning.compress.spectra import Spectrum


class Source(Protocol):
    """Deltas of linear layers, one at a time."""

    @property
    def kind(self) -> str:
        """ "lora", another family, or "model"."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module -> (p, q) of its delta."""

    @property
    def size_bytes(self) -> int:
        """Of the files that hold it."""

    @property
    def origin(self) -> Mapping[str, object]:
        """What the new adapter's configuration repeats: base_model_name_or_path and the like."""

    @property
    def left_out(self) -> Sequence[str]:
        """What changes the base model and is not among the modules."""

    @property
    def warnings(self) -> Sequence[str]: ...

    def spectrum(self, module: str) -> Spectrum:
        """Read anew each time, and the same each time."""


def is_target(module: str, targets: Sequence[str] | None) -> bool:
    """Whether a target is the module's name or its end after a dot."""
    return targets is None or any(module == target or module.endswith(f".{target}") for target in targets)


def check_targets(targets: Sequence[str] | None, modules: Sequence[str]) -> None:
    """Raises `InvalidRequest` for a target that no module answers to."""
    for target in targets or ():
        if not any(is_target(module, [target]) for module in modules):
            raise InvalidRequest(f"no layer of the source is called {target}", field="targets")


def check_rest(left_out: Sequence[str], rest: str, why: str) -> None:
    """Raises `InvalidRequest`, naming the first, unless what is left out may be dropped."""
    if left_out and rest == "error":
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        message = f"{left_out[0]}{more} {why}; to compress without it, set rest to drop"
        raise InvalidRequest(message, field="rest", metadata={"first": left_out[0]})
