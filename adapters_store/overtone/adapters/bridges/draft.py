"""An adapter between two folders: what was read, as far as it is converted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import safetensors.torch
import torch

from overtone.adapters.bridges.source import Source
from overtone.adapters.families import FAMILIES
from overtone.adapters.families.config import check_config, read_config
from overtone.adapters.families.types import Family
from overtone.adapters.files import AdapterFiles, Layout
from overtone.adapters.text import shown
from overtone.errors import UnsupportedAdapter


@dataclass(frozen=True)
class Draft:
    """changes: what was done to the source, in words."""

    layout: Layout
    config: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor]
    changes: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Source) -> Self:
        """Raises `UnsupportedAdapter` for a family that is not served."""
        draft = cls(source.layout, source.config, source.tensors)
        draft.family()
        if source.weights == source.layout.weights:
            return draft
        return draft.with_tensors(draft.tensors, f"{shown(source.weights)} is now {source.layout.weights}")

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type", self.layout.peft_type))

    def family(self) -> Family:
        if self.peft_type not in FAMILIES:
            message = f"the adapter family {shown(self.peft_type)} is not served; served are {', '.join(FAMILIES)}"
            raise UnsupportedAdapter(message, field="peft_type", metadata={"peft_type": shown(self.peft_type)})
        return FAMILIES[self.peft_type]

    def with_tensors(self, tensors: Mapping[str, torch.Tensor], change: str) -> Self:
        return replace(self, tensors=tensors, changes=(*self.changes, change))

    def with_config(self, config: Mapping[str, object], change: str) -> Self:
        return replace(self, config=config, changes=(*self.changes, change))

    def map_tensors(self, change: str, of: Callable[[str, torch.Tensor], torch.Tensor]) -> Self:
        """`of` for every tensor. Says so only if any of them became another one."""
        tensors = {name: of(name, tensor) for name, tensor in self.tensors.items()}
        if all(tensors[name] is tensor for name, tensor in self.tensors.items()):
            return self
        return self.with_tensors(tensors, change)

    def files(self) -> AdapterFiles:
        """The two files. Raises `InvalidAdapter` for a configuration that the server refuses whatever its model."""
        text = json.dumps(dict(self.config), indent=2, ensure_ascii=False) + "\n"
        # A clone: safetensors refuses tensors that share memory.
        tensors = {n: t.clone(memory_format=torch.contiguous_format) for n, t in self.tensors.items()}
        files = AdapterFiles(text.encode(), safetensors.torch.save(tensors, {"format": "pt"}), self.layout)
        check_config(read_config(files), self.family().keys)
        return files
