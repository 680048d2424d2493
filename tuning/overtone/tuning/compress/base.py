"""The base model as a compression sees it: its layers' shapes from the configuration, weights only if asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overtone.adapters import BaseDescription
from overtone.errors import BaseModelMismatch, ConfigError
from overtone.models import conv1d
from overtone.models.adapted import adaptable_embeddings, adaptable_modules
from overtone.models.base import model_source
from overtone.models.fingerprint import fingerprint_of
from overtone.models.support import check_supported
from overtone.tuning.compress.checkpoint import Checkpoint


@dataclass(frozen=True)
class Base:
    """name: as the server is given it; source: a folder or hub id that transformers loads; parameters: each one's possible
    names in a checkpoint, its own first; tied: parameters that are another layer's as well."""

    name: str
    source: str
    modules: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]
    conv1d: frozenset[str]
    parameters: Mapping[str, tuple[str, ...]]
    tied: frozenset[str]

    def description(self, *, fingerprint: bool = False) -> BaseDescription:
        """For the server's parsers. fingerprint: whether to compute it, which takes the whole model once."""
        found = fingerprint_of(load_model(self.source)) if fingerprint else ""
        return BaseDescription(self.name, found, self.modules, self.embeddings, self.weight, self.conv1d)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        folder = Path(self.source)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            with _loading(self.name):
                folder = Path(
                    snapshot_download(self.source, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
                )
        return Checkpoint(folder, "model")

    def weight(self, module: str) -> torch.Tensor:
        """(p, q) as stored. Raises `BaseModelMismatch` if the files do not have it."""
        name = self.stored_name(self.checkpoint, f"{module}.weight")
        if name is None:
            raise BaseModelMismatch(f"the files of {self.name} have no {module}.weight", field=module)
        weight = self.checkpoint.tensor(name)
        return weight.T if module in self.conv1d or module in self.embeddings else weight

    def stored_name(self, checkpoint: Checkpoint, parameter: str) -> str | None:
        return next((name for name in self.parameters[parameter] if name in checkpoint.names), None)


def base_of(model: str, cache: Path) -> Base:
    """Reads the configuration of `model`, not its weights. Raises `ConfigError`, `UnsupportedModel`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading(model):
        source = model_source(model, cache)
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_supported(config)
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    turned = conv1d.linearise(skeleton)
    same = _same_parameters(skeleton)
    return Base(
        name=model,
        source=source,
        modules=adaptable_modules(skeleton),
        embeddings=adaptable_embeddings(skeleton),
        conv1d=turned,
        parameters={name: _stored_names(name, names, skeleton.base_model_prefix) for names in same for name in names},
        tied=frozenset(name for names in same if len(names) > 1 for name in names),
    )


def load_model(source: str) -> Any:
    """The plain transformers model in float32, ready to be asked."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _loading(source):
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def _same_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; tied ones have several."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def _stored_names(name: str, same: Sequence[str], prefix: str) -> tuple[str, ...]:
    """GPT-2 and others are published without the prefix of the model inside, or with it."""
    ordered = [name, *(other for other in same if other != name)]
    return tuple(form for one in ordered for form in (one, _other_form(one, f"{prefix}.")))


def _other_form(name: str, prefix: str) -> str:
    return name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot load the model {name!r}: {first_line}", field="model") from error
