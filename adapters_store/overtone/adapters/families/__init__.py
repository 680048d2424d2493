"""Adapter families: from an adapter's two files to deltas. One parser per file; a new family is one more entry here."""

from __future__ import annotations

from collections.abc import Mapping

from overtone.adapters.base import BaseDescription
from overtone.adapters.families.c3a import C3A
from overtone.adapters.families.config import (
    AdapterConfig,
    check_config,
    check_orientation,
    check_targets,
    read_config,
)
from overtone.adapters.families.dcft import DCFT
from overtone.adapters.families.fourierft import FOURIERFT
from overtone.adapters.families.loca import LOCA
from overtone.adapters.families.lora import LORA
from overtone.adapters.families.pica import PICA
from overtone.adapters.families.randlora import RANDLORA
from overtone.adapters.families.sdctft import SDCTFT
from overtone.adapters.families.shira import SHIRA
from overtone.adapters.families.tensors import without_base_copies
from overtone.adapters.families.types import Family, ParsedAdapter, ParserContext
from overtone.adapters.families.vblora import VBLORA
from overtone.adapters.families.vera import VERA
from overtone.adapters.families.waveft import WAVEFT
from overtone.adapters.files import AdapterFiles
from overtone.adapters.safetensors_reader import read_safetensors
from overtone.adapters.text import shown
from overtone.errors import BaseModelMismatch, UnsupportedAdapter

FAMILIES: Mapping[str, Family] = {
    "LOCA": LOCA,
    "SDCTFT": SDCTFT,
    "MACP": SDCTFT,
    "FOURIERFT": FOURIERFT,
    "WAVEFT": WAVEFT,
    "C3A": C3A,
    "SHIRA": SHIRA,
    "LORA": LORA,
    "VBLORA": VBLORA,
    "DCFT": DCFT,
    "VERA": VERA,
    "RANDLORA": RANDLORA,
    "PICA": PICA,
}
"""By the `peft_type` of adapter_config.json. MaCP is the later name of sDCTFT."""

__all__ = ["FAMILIES", "ParsedAdapter", "ParserContext", "parse_adapter"]


def parse_adapter(files: AdapterFiles, context: ParserContext, *, strict_base: bool = False) -> ParsedAdapter:
    """The deltas of an adapter. Whatever in its files would not be applied is an error that names it.

    With `strict_base` an adapter that names another base model is refused, without it that is a warning. Raises
    `InvalidAdapter` or one of its kinds, for any bytes.
    """
    base = context.base
    raw = read_config(files)
    peft_type = str(raw["peft_type"])
    if peft_type not in FAMILIES:
        message = f"the adapter family {shown(peft_type)} is not served; served are {', '.join(FAMILIES)}"
        raise UnsupportedAdapter(message, field="peft_type", metadata={"peft_type": shown(peft_type)})
    family = FAMILIES[peft_type]
    config = check_config(raw, family.keys, files.layout.config)
    warnings = _check_base(config, base, strict_base)
    tensors = read_safetensors(files.weights, files.layout.weights).tensors
    parsed = family.parse(config, without_base_copies(tensors, base), context)
    check_orientation(config, frozenset(parsed.deltas), base)
    if family.checks_targets:
        check_targets(config, frozenset(parsed.deltas))
    return ParsedAdapter(
        family=family.name,
        deltas=parsed.deltas,
        base_model_name_or_path=config.text("base_model_name_or_path"),
        base_fingerprint=config.text("base_fingerprint"),
        parameter_count=parsed.parameter_count,
        warnings=warnings,
        basis=parsed.basis,
    )


def _check_base(config: AdapterConfig, base: BaseDescription, strict: bool) -> tuple[str, ...]:
    fingerprint = config.text("base_fingerprint")
    if fingerprint and fingerprint != base.fingerprint:
        message = (
            f"made for the base model with fingerprint {shown(fingerprint)}, but {shown(base.fingerprint)} is served"
        )
        raise BaseModelMismatch(message, field="base_fingerprint")
    name = config.text("base_model_name_or_path")
    if not name or name.rstrip("/").casefold() == base.name.rstrip("/").casefold():
        return ()
    message = f"made for the base model {shown(name)}, but {shown(base.name)} is served"
    if strict:
        raise BaseModelMismatch(message, field="base_model_name_or_path")
    return (message,)
