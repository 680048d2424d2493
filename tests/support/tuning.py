"""For the tests of tuning: a method small enough to reason about, a model's folder, files of examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from overtone.errors import InvalidRequest
from overtone.tuning.config import TuneConfig
from overtone.tuning.methods.types import Group
from support.tiny import tiny_model, tiny_tokenizer


class LowRankLayer(nn.Module):
    """y = W x + B A dropout(x), B zero at first."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.dropout = dropout
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = functional.dropout(x.to(self.down.dtype), self.dropout, self.training)
        added: torch.Tensor = (dropped @ self.down.T) @ self.up.T
        return self.base(x) + added.to(x.dtype)


class TunedFake:
    """In every third step `down` learns, else `up`: what a resumed run must be told anew."""

    def __init__(self, method: FakeMethod, layers: Mapping[str, LowRankLayer]) -> None:
        self.method = method
        self.layers = layers
        self.begun: list[int] = []

    @property
    def trainable_parameters(self) -> int:
        return sum(each.numel() for group in self.groups for each in group.parameters)

    @property
    def groups(self) -> Sequence[Group]:
        ups = Group("ups", [layer.up for layer in self.layers.values()])
        return [ups, Group("downs", [layer.down for layer in self.layers.values()], lr=0.01, weight_decay=0.1)]

    def begin_step(self, step: int) -> None:
        self.begun.append(step)
        self.method.on_step(step)
        for layer in self.layers.values():
            layer.down.requires_grad_(step % 3 == 2)
            layer.up.requires_grad_(step % 3 != 2)

    def penalty(self) -> torch.Tensor | None:
        if not self.method.penalty:
            return None
        return self.method.penalty * sum((layer.up**2).sum() for layer in self.layers.values())  # type: ignore[return-value]

    def state(self) -> dict[str, torch.Tensor]:
        named = {"up": "up", "down": "down"}
        return {f"{n}.{p}": getattr(layer, p) for n, layer in self.layers.items() for p in named}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        here = self.state()
        if here.keys() != state.keys():
            raise InvalidRequest("another budget", field="method")
        with torch.no_grad():
            for name, tensor in here.items():
                tensor.copy_(state[name])

    def deltas(self) -> dict[str, torch.Tensor]:
        return {name: (layer.up @ layer.down).detach().float() for name, layer in self.layers.items()}

    def save(self, folder: Path, base_name: str) -> None:
        """As LoRA, with alpha = r."""
        folder.mkdir(parents=True)
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.detach().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.detach().contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": self.method.rank, "lora_alpha": self.method.rank, "bias": "none"}
        config |= {"target_modules": list(self.method.targets), "base_model_name_or_path": base_name}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _nothing(step: int) -> None: ...


@dataclass(frozen=True)
class FakeMethod:
    """on_step: called before each step, to look at it or to end it."""

    rank: int = 2
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    penalty: float = 0.0
    on_step: Callable[[int], None] = field(default=_nothing, compare=False)
    made: list[TunedFake] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        return "fake"

    def attach(self, model: nn.Module, *, seed: int, total_steps: int) -> TunedFake:
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        layers: dict[str, LowRankLayer] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in self.targets:
                layers[name] = LowRankLayer(module, self.rank, self.dropout, generator)
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layers[name])
        if not layers:
            raise InvalidRequest(f"no layer is called {self.targets[0]}", field="targets")
        tuned = TunedFake(self, layers)
        self.made.append(tuned)
        return tuned

    @property
    def last_state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.made[-1].state().items()}


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A tiny model's folder, as a user has one."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, items: Iterable[Any]) -> Path:
    """Mappings as JSON; text as it is."""
    lines = (item if isinstance(item, str) else json.dumps(item) for item in items)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def pairs(count: int) -> list[dict[str, str]]:
    """Different lengths, different tokens."""
    words = ("the", "hen", "ate", "in", "error", "on", "a", "theatre")
    return [
        {
            "prompt": f"{words[i % 8]} {words[i * 3 % 8]} {i}:",
            "completion": " " + " ".join(words[(i + k) % 8] for k in range(1 + i % 5)),
        }
        for i in range(count)
    ]


def config_of(folder: Path, data: Any, out: Path, method: Any = None, **changes: Any) -> TuneConfig:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "lr": 0.05, "batch_size": 3, "max_length": 64}
    return TuneConfig(
        data=data,
        method=FakeMethod() if method is None else method,
        out=out,
        **({"model": str(folder)} | settings | changes),
    )
