"""Random valid adapter folders of any family on random small bases, in memory, written without PEFT.

Hypothesis decides the structure; the numbers come from a seed that it draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from overtone.adapters import BaseDescription
from overtone.adapters.files import PEFT_LAYOUT, PICA_LAYOUT
from support.oracle_tensors import PREFIX

Shape = tuple[int, int]

LARGEST = 24
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
NAMES = (
    *(
        f"model.layers.{i}.{name}"
        for i in range(3)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ),
    "model.layers.1.mlp.xq_proj",  # ends with the letters of another's name
    "model.layers.10.mlp.down_proj",
    "lm_head",
)
EMBEDDING = "model.embed_tokens"
BASE_NAME, FINGERPRINT = "Example/Any", "f" * 64


@dataclass(frozen=True, repr=False)
class Folder:
    """One adapter and the base that it is for. linears, embeddings: name -> weight (p, q), in the model's order; pica:
    whether its files have the names of PiCa's own layout."""

    linears: Mapping[str, torch.Tensor]
    embeddings: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    pica: bool = False

    @property
    def names(self) -> tuple[str, str]:
        """Of the configuration and of the weights."""
        layout = PICA_LAYOUT if self.pica else PEFT_LAYOUT
        return layout.config, layout.weights

    def files(self) -> dict[str, bytes]:
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()}
        raw = json.dumps(dict(self.config)).encode(), save(tensors, {"format": "pt"})
        return dict(zip(self.names, raw, strict=True))

    def base(self) -> BaseDescription:
        weights = {**self.linears, **self.embeddings}
        return BaseDescription(
            BASE_NAME, FINGERPRINT, _shapes(self.linears), _shapes(self.embeddings), weights.__getitem__
        )

    def __repr__(self) -> str:
        def sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
            return {n: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for n, t in tensors.items()}

        return f"Folder({sizes(self.linears)}, {sizes(self.embeddings)}, {self.config}, {sizes(self.tensors)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For Hypothesis."""
        printer.text(repr(self))


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}


class Draws:
    """What the strategies of all families draw."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self._generator = torch.Generator().manual_seed(self.integer(0, 2**16))

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def number(self) -> float | int:
        """A scale, positive, negative or zero."""
        some = st.sampled_from([1, 1.0, 0, -2, 300, 0.1, 1e-30])
        return self.draw(st.one_of(some, st.floats(-1000, 1000), st.integers(-50, 50)))  # type: ignore[no-any-return]

    def seed(self) -> int:
        return int(self.draw(st.one_of(st.integers(0, 1000), st.integers(-(2**63), 2**64 - 1))))

    def size(self, of: int = 1) -> int:
        """A multiple of `of`."""
        return of * self.integer(1, LARGEST // of)

    def shape_of(self, least: int) -> Shape:
        """With at least so many weights."""
        p = self.integer(-(-least // LARGEST), LARGEST)
        return p, self.integer(max(1, -(-least // p)), LARGEST)

    def floats(self, *size: int, dtypes: Sequence[torch.dtype] = FLOATS) -> torch.Tensor:
        """Random numbers around zero, in one of these dtypes."""
        strength = self.one_of(1.0, 0.01, 30.0)
        return self.normal(*size).mul(strength).to(self.one_of(*dtypes))

    def normal(self, *size: int) -> torch.Tensor:
        """float64."""
        return torch.randn(*size, generator=self._generator, dtype=torch.float64)

    def uniform(self, *size: int) -> torch.Tensor:
        """In [0, 1), float64."""
        return torch.rand(*size, generator=self._generator, dtype=torch.float64)

    def below(self, n: int, *size: int) -> torch.Tensor:
        """Whole numbers from 0 to n - 1, int64."""
        return torch.randint(n, size, generator=self._generator)

    def modules(self, names: Sequence[str] = NAMES) -> list[str]:
        return list(self.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True)))

    def patterns(self, names: Sequence[str], value: Callable[[], Any]) -> dict[str, Any]:
        """PEFT's patterns: names, ends of names and expressions, some of which match nothing."""
        name = self.one_of(*names)
        parts = name.split(".")
        keys = [name, parts[-1], ".".join(parts[-2:]), "nothing", r"layers\.\d\..*", "[qv]_proj", "model.layers.1.*"]
        chosen = self.draw(st.lists(st.sampled_from(keys), max_size=3, unique=True))
        return {key: value() for key in chosen}

    def weights(self, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
        dtypes = self.one_of((torch.float32,), (torch.bfloat16,), FLOATS[:3])
        return {name: self.normal(*shape).to(self.one_of(*dtypes)) for name, shape in shapes.items()}

    def others(self, adapted: Mapping[str, Shape]) -> dict[str, Shape]:
        """`adapted` among layers that the adapter leaves alone, in any order."""
        free = [name for name in NAMES if name not in adapted]
        more = self.draw(st.lists(st.sampled_from(free), max_size=2, unique=True)) if free else []
        shapes = {**adapted, **{name: (self.size(), self.size()) for name in more}}
        return {name: shapes[name] for name in self.draw(st.permutations(list(shapes)))}

    def folder(
        self,
        adapted: Mapping[str, Shape],
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        *,
        embedding: Shape | None = None,
    ) -> Folder:
        """adapted: linear layers; tensors: by their names after the common prefix, unless they have it."""
        linears = self.weights(self.others(adapted))
        embeddings = {} if embedding is None else self.weights({EMBEDDING: embedding})
        modules = [*adapted, *embeddings]
        full = {n if n.startswith("base_model.") else PREFIX + n: t for n, t in tensors.items()}
        return Folder(linears, embeddings, {**self._common(modules), **config}, full)

    def _common(self, modules: Sequence[str]) -> dict[str, Any]:
        """Keys that every family has; they say what the tensors say, or nothing."""
        layers = sorted({int(part) for name in modules for part in name.split(".") if part.isdigit()})
        whole = bool(layers) and all(any(part.isdigit() for part in name.split(".")) for name in modules)
        entries = sorted({name if self.flag() else name.rpartition(".")[2] for name in modules})
        common = {
            "base_model_name_or_path": self.one_of(None, BASE_NAME, BASE_NAME.lower(), "another/base"),
            "base_fingerprint": self.one_of(None, FINGERPRINT),
            "task_type": self.one_of(None, "CAUSAL_LM"),
            "target_modules": self.one_of(entries, None, r".*\.(q|v)_proj"),
            "layers_to_transform": self.one_of(None, layers if whole else None),
            "bias": self.one_of("none", None),
            "inference_mode": True,
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "peft_version": "0.21.2",
            "auto_mapping": self.one_of(None, {"base_model_class": "LlamaForCausalLM"}),
        }
        return {key: value for key, value in common.items() if key == "bias" or value is not None or self.flag()}
