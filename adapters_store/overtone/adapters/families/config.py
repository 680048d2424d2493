"""adapter_config.json: every key is known and its value harmless or applied, or the adapter is refused by that key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from overtone.adapters.base import BaseDescription
from overtone.adapters.files import CONFIG_FILE, MAX_CONFIG_BYTES, AdapterFiles, refuse_pickle
from overtone.adapters.text import read_json_object, shown
from overtone.errors import InvalidAdapter, UnsupportedAdapter


@dataclass(frozen=True)
class Rule:
    """Which values a key may have, in code and in words, and the error for all others."""

    accepts: Callable[[object], bool]
    expects: str
    error: type[InvalidAdapter] = InvalidAdapter


def is_number(value: object) -> bool:
    """A finite number of JSON that fits a float; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_layers(value: object) -> bool:
    return is_count(value) or (isinstance(value, list) and all(is_count(v) for v in value))


def one_of(*allowed: str) -> Rule:
    return Rule(lambda v: v in allowed, "one of " + ", ".join(allowed))


TEXT = Rule(lambda v: v is None or isinstance(v, str), "text or null")
FLAG = Rule(lambda v: v is None or isinstance(v, bool), "true, false or null")
COUNT = Rule(lambda v: v is None or is_count(v), "a whole number >= 0 or null")
NUMBER = Rule(is_number, "a finite number")
FRACTION = Rule(lambda v: is_number(v) and 0 <= float(v) <= 1, "a number from 0 to 1")  # type: ignore[arg-type]
UNUSED = Rule(lambda v: v is None or v in ([], {}), "null or empty", UnsupportedAdapter)

NAMES = Rule(lambda v: v is None or isinstance(v, str) or _is_names(v), "text, a list of text or null")
ANYTHING = Rule(lambda v: True, "anything")
NOT_TRUE = Rule(lambda v: v is None or v is False, "false", UnsupportedAdapter)
POSITIVE = Rule(lambda v: is_count(v) and v != 0, "a whole number >= 1")

COMMON_KEYS: Mapping[str, Rule] = {
    "peft_type": Rule(lambda v: isinstance(v, str), "text"),
    "task_type": TEXT,
    "base_model_name_or_path": TEXT,
    "base_fingerprint": TEXT,
    "revision": TEXT,
    "peft_version": TEXT,
    "inference_mode": FLAG,
    "target_modules": NAMES,
    # What these three leave out has no tensors either.
    "exclude_modules": NAMES,
    "layers_to_transform": Rule(lambda v: v is None or _is_layers(v), "a layer, a list of layers or null"),
    "layers_pattern": NAMES,
    "modules_to_save": UNUSED,
    # The class and package of the model that PEFT had loaded.
    "auto_mapping": ANYTHING,
    "bias": Rule(lambda v: v in (None, "none"), '"none"', UnsupportedAdapter),
    # Of the layers that it may be true for: see `check_orientation`.
    "fan_in_fan_out": FLAG,
}

SPECTRUM_KEYS: Mapping[str, Rule] = {
    "init_weights": FLAG,
    "scale": NUMBER,
    "n_frequency": Rule(lambda v: v is None or (is_count(v) and v != 0), "a whole number >= 1 or null"),
    "n_frequency_pattern": UNUSED,
}
"""Of LoCA and sDCTFT."""


@dataclass(frozen=True)
class AdapterConfig:
    """A checked configuration: `values` holds only keys that a `Rule` accepted, nulls left out."""

    values: Mapping[str, object]

    def text(self, key: str, default: str = "") -> str:
        return str(self.values.get(key, default))

    def number(self, key: str, default: float) -> float:
        """Of a key whose rule admits only numbers."""
        return float(self.values.get(key, default))  # type: ignore[arg-type]

    def count(self, key: str) -> int | None:
        """Of a key whose rule admits only whole numbers."""
        value = self.values.get(key)
        return value if isinstance(value, int) else None

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.values.get(key, default))


def read_config(files: AdapterFiles) -> dict[str, object]:
    """The configuration as a JSON object that names its peft_type; nothing else is checked yet."""
    name, raw = files.layout.config, files.config
    refuse_pickle(name, raw)
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidAdapter(f"{name} has {len(raw)} bytes, more than the {MAX_CONFIG_BYTES} allowed", field=name)
    config = read_json_object(raw, name)
    if files.layout.peft_type:
        config.setdefault("peft_type", files.layout.peft_type)
    if not isinstance(config.get("peft_type"), str):
        raise InvalidAdapter(f"{name} does not say its peft_type", field="peft_type")
    return config


def check_config(
    config: Mapping[str, object], family_keys: Mapping[str, Rule], name: str = CONFIG_FILE
) -> AdapterConfig:
    """Raises the error of the first key that is unknown or has a value that we would not apply."""
    rules = {**COMMON_KEYS, **family_keys}
    for key, value in config.items():
        if key not in rules:
            raise InvalidAdapter(f"{name} has the unknown key {shown(key)!r}", field=shown(key) or name)
        if not rules[key].accepts(value):
            message = f"{key} in {name} must be {rules[key].expects}, not {shown(value)}"
            raise rules[key].error(message, field=key)
    return AdapterConfig({key: value for key, value in config.items() if value is not None})


def check_targets(config: AdapterConfig, modules: frozenset[str]) -> None:
    """Raises `InvalidAdapter` unless target_modules and layers_to_transform tell the same modules as the tensors.

    A text other than a list is a regular expression for PEFT; it says nothing that the tensors do not, and is not run.
    """
    targets = config.values.get("target_modules")
    if isinstance(targets, list):
        wanted = set(targets)
        used = {m: wanted.intersection(_suffixes(m)) for m in sorted(modules)}
        stray = next((m for m, entries in used.items() if not entries), None)
        if stray is not None:
            raise InvalidAdapter(f"{shown(stray)} has tensors but is not in target_modules", field="target_modules")
        unused = sorted(wanted - set().union(*used.values()))
        if unused:
            message = f"target_modules names {shown(unused[0])}, but no module so called has tensors"
            raise InvalidAdapter(message, field="target_modules")
    layers = config.values.get("layers_to_transform")
    if layers is not None:
        allowed = {str(n) for n in (layers if isinstance(layers, list) else [layers])}
        stray = next((m for m in sorted(modules) if not allowed & set(m.split("."))), None)
        if stray is not None:
            message = f"{shown(stray)} has tensors but its layer is not in layers_to_transform"
            raise InvalidAdapter(message, field="layers_to_transform")


def check_orientation(config: AdapterConfig, modules: frozenset[str], base: BaseDescription) -> None:
    """Raises `UnsupportedAdapter` if fan_in_fan_out is true and a linear layer that is no Conv1D has tensors.

    PEFT sets it to true itself for a Conv1D and an embedding ignores it, so that false is right for every layer.
    """
    if not config.flag("fan_in_fan_out"):
        return
    linears = sorted(modules - base.embeddings.keys())
    stray = next((m for m in linears if m not in base.conv1d), None if linears else "")
    if stray is not None:
        what = f"{shown(stray)} is a linear layer" if stray else "none has tensors"
        raise UnsupportedAdapter(
            f"fan_in_fan_out is true, which only the Conv1D layers of GPT-2 and its kin can be, but {what}",
            field="fan_in_fan_out",
        )


def _suffixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
